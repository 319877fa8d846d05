"""What a person who measures did wrong, or lacks: one line, and exit code 2."""


class PerfError(Exception):
    """The message names the thing, and what would be right."""
