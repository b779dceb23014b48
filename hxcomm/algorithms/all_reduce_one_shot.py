"""One-shot all_reduce: every rank reads everything."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, reduce


def all_reduce_one_shot(world_size: int) -> Schedule:
    """Each rank reduces all inputs by itself. For short messages: one hand-over between ranks, the least there is.

    One round. Of S bytes a rank loads n*S and stores S. Reduces in rank order.
    Source: flat all-to-all reduction, as in the custom all_reduce of vLLM and TensorRT-LLM.
    """
    ranks = range(world_size)

    def rounds() -> Iterator[Round]:
        yield [reduce(r, [Location(s, "input", 0) for s in ranks], Location(r, "output", 0)) for r in ranks]

    return Schedule("all_reduce", "one_shot", world_size, rounds)
