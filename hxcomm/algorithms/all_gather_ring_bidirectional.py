"""Bidirectional ring all_gather: half of each block travels each way round the ring."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Rotation, Round, Schedule, Transfer, copy


def all_gather_ring_bidirectional(world_size: int) -> Schedule:
    """In round k each rank reads half of block r-k from rank r-1 and the other half of block r+k from rank r+1.

    n-1 rounds between neighbours only (one, local, for one rank). Of blocks of S bytes each hop carries S(n-1)/2 in
    either direction: half as much as in all_gather_ring, on twice as many links.
    Source: as all_reduce_ring_bidirectional, its second half.
    """
    n = world_size

    def passes(half: int, k: int) -> Transfer:
        before, block = (n - 1, n - k) if half == 0 else (1, k)
        came = Location(before, "input", half) if k == 1 else Location(before, "output", 2 * block + half)
        return copy(0, came, Location(0, "output", 2 * block + half))

    def rounds() -> Iterator[Round]:
        own = [copy(0, Location(0, "input", half), Location(0, "output", half)) for half in (0, 1)]
        if n == 1:
            yield own
        for k in range(1, n):
            passed = [passes(half, k) for half in (0, 1)]
            yield Rotation([*own, *passed] if k == 1 else passed, rotated=("output",), step=2)

    return Schedule("all_gather", "ring_bidirectional", n, rounds, pieces=2)
