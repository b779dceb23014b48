"""What the schedule layer raises. No torch here, so that tools and users' algorithms can catch it cheaply."""

from __future__ import annotations


class ScheduleError(ValueError):
    """A Schedule, or a plan, breaks a rule of its own form: the text says which transfer of which round, and why."""


class ProofError(ScheduleError):
    """A Schedule does not compute what its op means: the text says where, what was expected, and what was found."""
