"""The machine's own devices, served in batches: entropy, console, balloon, sockets."""
