"""Bidirectional ring all_reduce: half of the chunks travel each way round the ring."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Rotation, Round, Schedule, Transfer, copy, reduce


def all_reduce_ring_bidirectional(world_size: int) -> Schedule:
    """Two rings at once, as all_reduce_ring: of each of n parts the first half travels upwards, the second downwards.

    2(n-1) rounds between neighbours only. Of S bytes each hop carries S(n-1)/n in either direction: half as much as in
    all_reduce_ring, on twice as many links. Half 0 of part c is reduced in the order c, c+1, ... c-1, half 1 in the
    order c, c-1, ... c+1.
    Source: Jain and Sabharwal, Optimal bucket algorithms for large MPI collectives on torus interconnects, ICS (2010).
    """
    n = world_size
    if n == 1:
        return Schedule(
            "all_reduce",
            "ring_bidirectional",
            1,
            lambda: [[reduce(0, [Location(0, "input", 0)], Location(0, "output", 0))]],
        )

    def chunk(half: int, part: int) -> int:
        return 2 * ((part if half == 0 else -part) % n) + half

    def gathers(half: int, k: int) -> Transfer:
        before = n - 1 if half == 0 else 1  # the rank that this half comes from
        # Two slots for each half: the next rank reads the partial of round k-1 while this one stores that of round k.
        came = Location(before, "scratch", 2 * half + (k - 1) % 2)
        if k == 1:
            came = Location(before, "input", chunk(half, n - 1))
        goes = Location(0, "scratch", 2 * half + k % 2) if k < n - 1 else Location(0, "output", chunk(half, 1))
        return reduce(0, [came, Location(0, "input", chunk(half, n - k))], goes)

    def passes(half: int, k: int) -> Transfer:
        before = n - 1 if half == 0 else 1
        return copy(0, Location(before, "output", chunk(half, n - k)), Location(0, "output", chunk(half, n - k)))

    def rounds() -> Iterator[Round]:
        for k in range(1, n):
            yield Rotation([gathers(half, k) for half in (0, 1)], rotated=("input", "output"), step=2)
        for k in range(n - 1):
            yield Rotation([passes(half, k) for half in (0, 1)], rotated=("output",), step=2)

    return Schedule("all_reduce", "ring_bidirectional", n, rounds, pieces=2 * n, scratch=4 if n > 2 else 0)
