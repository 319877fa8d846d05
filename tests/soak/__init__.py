"""Peers that misbehave for as long as one likes, beside some that do not."""
