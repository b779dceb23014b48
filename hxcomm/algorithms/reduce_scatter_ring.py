"""Ring reduce_scatter: partial results travel round the ring."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Rotation, Round, Schedule, reduce


def reduce_scatter_ring(world_size: int) -> Schedule:
    """In round k rank r adds its part to the partial result of block r-k-1, which it reads from rank r-1; the block
    that it completes in round n-1 is its own.

    n-1 rounds between neighbours only. Of blocks of S bytes each hop carries S(n-1). The order of reduction of block r
    is r+1, r+2, ... r: that of ranks for the last rank only.
    Source: as all_reduce_ring, its first half.
    """
    n = world_size
    if n == 1:
        return Schedule(
            "reduce_scatter", "ring", 1, lambda: [[reduce(0, [Location(0, "input", 0)], Location(0, "output", 0))]]
        )

    def rounds() -> Iterator[Round]:
        for k in range(1, n):
            block = n - k - 1
            # Two slots: rank r+1 reads the partial of round k-1 while rank r stores that of round k.
            came = Location(n - 1, "input", block) if k == 1 else Location(n - 1, "scratch", (k - 1) % 2)
            goes = Location(0, "scratch", k % 2) if k < n - 1 else Location(0, "output", 0)
            yield Rotation([reduce(0, [came, Location(0, "input", block)], goes)], rotated=("input",))

    return Schedule("reduce_scatter", "ring", n, rounds, scratch=2 if n > 2 else 0)
