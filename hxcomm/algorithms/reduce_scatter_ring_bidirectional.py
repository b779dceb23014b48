"""Bidirectional ring reduce_scatter: partial results of half of each block travel each way round the ring."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Rotation, Round, Schedule, Transfer, reduce


def reduce_scatter_ring_bidirectional(world_size: int) -> Schedule:
    """In round k rank r adds its part to the partial result of half of block r-k-1, which it reads from rank r-1, and
    to that of the other half of block r+k+1 from rank r+1; what it completes in round n-1 is its own block.

    n-1 rounds between neighbours only. Of blocks of S bytes each hop carries S(n-1)/2 in either direction: half as much
    as in reduce_scatter_ring, on twice as many links. Half 0 of block r is reduced in the order r+1, r+2, ... r, half 1
    in the order r-1, r-2, ... r.
    Source: as all_reduce_ring_bidirectional, its first half.
    """
    n = world_size
    if n == 1:
        return Schedule(
            "reduce_scatter",
            "ring_bidirectional",
            1,
            lambda: [[reduce(0, [Location(0, "input", 0)], Location(0, "output", 0))]],
        )

    def adds(half: int, k: int) -> Transfer:
        before, block = (n - 1, n - k - 1) if half == 0 else (1, (k + 1) % n)
        own = Location(0, "input", 2 * block + half)
        # Two slots for each half: the next rank reads the partial of round k-1 while this one stores that of round k.
        came = Location(before, "scratch", 2 * half + (k - 1) % 2)
        if k == 1:
            came = Location(before, "input", 2 * block + half)
        goes = Location(0, "scratch", 2 * half + k % 2) if k < n - 1 else Location(0, "output", half)
        return reduce(0, [came, own], goes)

    def rounds() -> Iterator[Round]:
        for k in range(1, n):
            yield Rotation([adds(half, k) for half in (0, 1)], rotated=("input",), step=2)

    return Schedule("reduce_scatter", "ring_bidirectional", n, rounds, pieces=2, scratch=4 if n > 2 else 0)
