"""Direct barrier: nothing to do, since every op begins with everyone."""

from __future__ import annotations

from hxcomm.schedule import Schedule


def barrier_direct(world_size: int) -> Schedule:
    """No transfers: entering an op is waiting for every rank's arrival."""
    return Schedule("barrier", "direct", world_size, rounds=tuple)
