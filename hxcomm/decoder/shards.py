"""Which rank owns which heads, MLP columns and vocabulary rows: pure arithmetic on the model's shape.

Decoding one token reads every weight once, so a rank's time is the bytes of its shard. The split makes those equal:
attention goes by whole heads, which rarely divide evenly, and MLP columns, then vocabulary rows, even it out. (Two
ranks of SmolLM2-135M have 6 + 3 query heads; with an even MLP split one would read 8 % more than the mean.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise


class SplitError(ValueError):
    """A model that cannot be split over so many ranks. The text says what can be."""


@dataclass(frozen=True)
class Config:
    """Shape and constants of a Llama-family model."""

    layers: int
    hidden: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    intermediate: int  # MLP columns
    vocabulary: int
    context: int  # positions the model was trained for
    rope_theta: float
    rms_eps: float
    tied: bool  # the output head is the embedding

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Shard:
    """What one rank owns, as ranges into the whole model."""

    heads: range
    kv_heads: range
    columns: range
    rows: range

    @property
    def group(self) -> int:
        """Query heads of this rank per KV head of this rank."""
        return len(self.heads) // len(self.kv_heads)


def split(config: Config, world_size: int) -> list[Shard]:
    """The shard of every rank. Heads, columns and rows are owned exactly once; a KV head by each rank that queries it.

    Raises SplitError when there are more ranks than query heads: such a rank would have no attention to do.
    """
    if world_size > config.heads:
        raise SplitError(
            f"{world_size} ranks, but the model has {config.heads} query heads and each rank needs one: "
            f"use at most {config.heads} ranks"
        )
    heads, kv_heads = split_heads(config, world_size)
    loads = [attention_parameters(config, len(q), len(kv)) for q, kv in zip(heads, kv_heads, strict=True)]
    # 32 columns: a block of most quantised formats, and 128-byte rows of `down`. The rows even out what that leaves,
    # up to a point: with few blocks per rank, columns go singly.
    unit = math.gcd(config.intermediate, 32)
    unit = unit if config.intermediate // unit >= 8 * world_size else 1
    units = level(loads, config.intermediate // unit, mlp_parameters(config, unit))
    loads = [load + mlp_parameters(config, unit * count) for load, count in zip(loads, units, strict=True)]
    rows = ranges(level(loads, config.vocabulary, config.hidden))
    columns = ranges([unit * count for count in units])
    return [Shard(*owned) for owned in zip(heads, kv_heads, columns, rows, strict=True)]


def split_heads(config: Config, world_size: int) -> tuple[list[range], list[range]]:
    """Query heads and KV heads of every rank: several whole KV groups each, or a part of one group each.

    No rank holds parts of two groups: that keeps the copies of KV heads, which cost bytes, to the fewest possible.
    """
    if world_size <= config.kv_heads:
        kv_heads = ranges(even(config.kv_heads, world_size))
        return [range(kv.start * config.group, kv.stop * config.group) for kv in kv_heads], kv_heads
    ranks_of_group = even(world_size, config.kv_heads)
    heads = ranges([count for ranks in ranks_of_group for count in even(config.group, ranks)])
    return heads, [range(kv, kv + 1) for kv, ranks in enumerate(ranks_of_group) for _ in range(ranks)]


def parameters_read(config: Config, shard: Shard) -> int:
    """Weights a rank reads to decode one token (norms and the one embedding row left out: under 0.1 %)."""
    attention = attention_parameters(config, len(shard.heads), len(shard.kv_heads))
    return attention + mlp_parameters(config, len(shard.columns)) + config.hidden * len(shard.rows)


def attention_parameters(config: Config, heads: int, kv_heads: int) -> int:
    return config.layers * config.hidden * config.head_dim * 2 * (heads + kv_heads)


def mlp_parameters(config: Config, columns: int) -> int:
    return config.layers * config.hidden * 3 * columns


def level(loads: list[int], items: int, cost: int) -> list[int]:
    """How many of `items`, each of the same `cost`, every rank takes so that the largest total load is the smallest.

    Like water: ranks that are already above the level take one, as a rank without any would be a special case
    everywhere. Bisects for the lowest level that holds all items.
    """
    loads = [load + cost for load in loads]
    items -= len(loads)

    def taken(height: int) -> list[int]:
        return [max(0, (height - load) // cost) for load in loads]

    low, high = min(loads), max(loads) + cost * items
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(taken(middle)) >= items else (middle + 1, high)
    counts = taken(low)
    excess = sum(counts) - items
    for rank, load in enumerate(loads):
        if excess and counts[rank] and (low - load) % cost == 0:  # took its last item exactly at this level
            counts[rank] -= 1
            excess -= 1
    return [1 + count for count in counts]


def even(items: int, parts: int) -> list[int]:
    """Sizes that differ by at most one, the larger first."""
    return [items // parts + (part < items % parts) for part in range(parts)]


def ranges(sizes: list[int]) -> list[range]:
    """Adjacent ranges of these sizes, from 0."""
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
