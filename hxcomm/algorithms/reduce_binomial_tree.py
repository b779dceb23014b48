"""Binomial tree reduce: the ranks that hold a partial result halve in every round."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, Transfer, reduce


def reduce_binomial_tree(world_size: int, root: int) -> Schedule:
    """Counting ranks from the root, in round k+1 every 2^(k+1)-th rank v adds the partial result of rank v + 2^k to its
    own.

    ceil(log2 n) rounds. Of S bytes a rank loads at most 2S ceil(log2 n). Partial results stay in scratch; the order of
    reduction is a tree's.
    Source: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH (2005).
    """
    n = world_size

    def rounds() -> Iterator[Round]:
        if n == 1:
            yield [reduce(0, [Location(0, "input", 0)], Location(0, "output", 0))]
        step = 1
        while step < n:
            yield [_add(v, step, n, root) for v in range(0, n - step, 2 * step)]
            step *= 2

    return Schedule("reduce", "binomial_tree", n, rounds, root=root, scratch=1 if n > 2 else 0)


def _add(v: int, step: int, n: int, root: int) -> Transfer:
    def held(v: int) -> Location:
        # Its own input as long as it has added nothing: it adds to the first rank after it in round 1.
        added = step > 1 and v + 1 < n
        return Location((root + v) % n, "scratch" if added else "input", 0)

    rank = (root + v) % n
    goes = Location(rank, "output" if v == 0 and 2 * step >= n else "scratch", 0)
    return reduce(rank, [held(v), held(v + step)], goes)
