"""What each collective means, as data: its buffers, and where the value of every output chunk comes from.

Algorithms fill this in, the prover checks against it, plans carry the numbers. Knows no algorithm, dtype or memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Layout(NamedTuple):
    """A buffer: `blocks` separate memory extents, each cut into `pieces`; chunk index = block * pieces + piece."""

    blocks: int
    pieces: int

    @property
    def chunks(self) -> int:
        return self.blocks * self.pieces


@dataclass(frozen=True)
class Op:
    """One collective. Of n ranks, a buffer has 0 blocks, 1, or n ("each": one per rank).

    The value of block b of rank r's output is made of `contributors` (all ranks, reduced; the root; or rank b), taken
    from block 0 of their inputs or, where `takes` is "own", from their block r.
    `in_place`: input and output of a rank are the same memory.
    """

    name: str
    number: int
    input: Literal["none", "one", "each"]
    output: Literal["none", "one", "each"]
    contributors: Literal["all", "root", "block"]
    takes: Literal["first", "own"] = "first"
    in_place: bool = False
    rooted: bool = False
    input_at_root_only: bool = False
    output_at_root_only: bool = False

    @property
    def reduces(self) -> bool:
        return self.contributors == "all"

    @property
    def uniform(self) -> bool:
        """All blocks of all ranks have equal counts. In all_to_all every pair of ranks may have its own."""
        return self.name != "all_to_all"

    def layout(self, buffer: Literal["input", "output"], world_size: int, pieces: int) -> Layout:
        blocks = {"none": 0, "one": 1, "each": world_size}[self.input if buffer == "input" else self.output]
        return Layout(blocks, pieces)

    def result(self, rank: int, block: int, world_size: int, root: int | None) -> tuple[tuple[int, ...], int] | None:
        """(contributing ranks, block of their inputs) of a block of rank's output; None where it is not defined."""
        if self.output_at_root_only and rank != root:
            return None
        ranks = {"all": tuple(range(world_size)), "root": (root or 0,), "block": (block,)}[self.contributors]
        return ranks, rank if self.takes == "own" else 0


OPS = {
    op.name: op
    for op in (
        Op("all_reduce", 0, "one", "one", "all", in_place=True),
        Op("broadcast", 1, "one", "one", "root", in_place=True, rooted=True),
        Op("reduce", 2, "one", "one", "all", in_place=True, rooted=True, output_at_root_only=True),
        Op("all_gather", 3, "one", "each", "block"),
        Op("reduce_scatter", 4, "each", "one", "all", takes="own"),
        Op("gather", 5, "one", "each", "block", rooted=True, output_at_root_only=True),
        Op("scatter", 6, "each", "one", "root", takes="own", rooted=True, input_at_root_only=True),
        Op("all_to_all", 7, "each", "each", "block", takes="own"),
        Op("barrier", 8, "none", "none", "block"),
    )
}
