"""The tables by which a guest learns what its machine consists of, and is told of changes."""
