"""Ring all_gather: blocks travel round the ring."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Rotation, Round, Schedule, copy


def all_gather_ring(world_size: int) -> Schedule:
    """In round k each rank reads from rank r-1 the block that this got in the round before: block r-k.

    n-1 rounds between neighbours only (one, local, for one rank). Of blocks of S bytes each hop carries S(n-1).
    Source: as all_reduce_ring, its second half.
    """
    n = world_size

    def rounds() -> Iterator[Round]:
        own = copy(0, Location(0, "input", 0), Location(0, "output", 0))
        if n == 1:
            yield [own]
        for k in range(1, n):
            came = Location(n - 1, "input", 0) if k == 1 else Location(n - 1, "output", n - k)
            passed = copy(0, came, Location(0, "output", n - k))
            yield Rotation([own, passed] if k == 1 else [passed], rotated=("output",))

    return Schedule("all_gather", "ring", n, rounds)
