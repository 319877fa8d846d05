"""A stock Debian guest on devices that vdev serves."""
