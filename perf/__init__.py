"""Measurements: vdev beside its peers, driven from the front-end's side of a shared ring."""
