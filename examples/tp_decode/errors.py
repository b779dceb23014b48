"""The one exception a user of the program can cause: rank 0 prints it as one line, every rank exits with status 2."""


class UsageError(Exception):
    """What is wrong, where, and what to do about it. Raised by all ranks alike, before the first collective."""
