"""Binomial tree broadcast: the ranks that have the data double in every round."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy


def broadcast_binomial_tree(world_size: int, root: int) -> Schedule:
    """Counting ranks from the root, rank v in [2^k, 2^(k+1)) reads in round k+1 from rank v - 2^k.

    ceil(log2 n) rounds. Of S bytes a rank loads S and stores S; no rank is read by more than ceil(log2 n) others.
    Source: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH (2005).
    """

    def rounds() -> Iterator[Round]:
        have = 1
        while have < world_size:
            yield [
                copy(
                    (root + v) % world_size,
                    Location((root + v - have) % world_size, "output", 0),
                    Location((root + v) % world_size, "output", 0),
                )
                for v in range(have, min(2 * have, world_size))
            ]
            have *= 2

    return Schedule("broadcast", "binomial_tree", world_size, rounds, root=root)
