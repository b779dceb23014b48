"""Line all_gather: blocks travel both ways along an open line."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def all_gather_line(world_size: int) -> Schedule:
    """In round k rank r reads block r-k from rank r-1 and block r+k from rank r+1, where there are such.

    n-1 rounds between neighbours of an open line only (one, local, for one rank). Of blocks of S bytes each hop carries
    at most S(n-1) in either direction, those at the ends the most, which is the least possible.
    Source: as all_gather_ring, both ways.
    """
    n = world_size

    def rounds() -> Iterator[Round]:
        own = [copy(r, Location(r, "input", 0), Location(r, "output", r)) for r in range(n)]
        if n == 1:
            yield own
        for k in range(1, n):
            passed = [
                copy(
                    r,
                    Location(r + way, "input", 0) if k == 1 else Location(r + way, "output", r + k * way),
                    Location(r, "output", r + k * way),
                )
                for r in range(n)
                for way in (-1, 1)
                if 0 <= r + k * way < n
            ]
            yield [*own, *passed] if k == 1 else passed

    return Schedule("all_gather", "line", n, rounds)
