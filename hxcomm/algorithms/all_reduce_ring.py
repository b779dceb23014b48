"""Ring all_reduce: chunks travel round the ring twice, once gathering contributions, once as results."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Rotation, Round, Schedule, copy, reduce


def all_reduce_ring(world_size: int) -> Schedule:
    """In round k rank r adds its part to the partial result of chunk r-k, which it reads from rank r-1; after n-1
    rounds chunk r+1 is complete at rank r. In n-1 more rounds each rank reads from rank r-1 what that has got last.

    2(n-1) rounds between neighbours only. Of S bytes each hop of the ring carries 2S(n-1)/n, the least possible. Chunk
    c is reduced in the order c, c+1, ... c-1, which is that of ranks for chunk 0 only.
    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, JPDC 69 (2009).
    """
    n = world_size
    if n == 1:
        return Schedule(
            "all_reduce", "ring", 1, lambda: [[reduce(0, [Location(0, "input", 0)], Location(0, "output", 0))]]
        )

    def rounds() -> Iterator[Round]:
        for k in range(1, n):
            # Two slots: rank r+1 reads the partial of round k-1 while rank r stores that of round k.
            came = Location(n - 1, "input", n - 1) if k == 1 else Location(n - 1, "scratch", (k - 1) % 2)
            goes = Location(0, "scratch", k % 2) if k < n - 1 else Location(0, "output", 1)
            yield Rotation([reduce(0, [came, Location(0, "input", n - k)], goes)], rotated=("input", "output"))
        for k in range(n - 1):
            chunk = (n - k) % n
            yield Rotation(
                [copy(0, Location(n - 1, "output", chunk), Location(0, "output", chunk))], rotated=("output",)
            )

    return Schedule("all_reduce", "ring", n, rounds, pieces=n, scratch=2 if n > 2 else 0)
