"""Determinism: the same bits on every rank and in every run.

torch promises neither. Replicas whose gradients differ in the last bit drift apart, and a run that cannot be repeated
cannot be debugged, so a backend should know whether it has this.
"""

from __future__ import annotations

import hashlib
import itertools
import time

import torch
import torch.distributed as dist

from hxcomm.verify.collectives import DTYPES
from hxcomm.verify.context import Context, Group
from hxcomm.verify.registry import check

ROUNDING = ("float32", "float64", "float16", "bfloat16")
COUNTS = (1, 1001, 100_003)


def numbers(context: Context, dtype: str, count: int) -> torch.Tensor:
    """Of many magnitudes, so that every other order of addition gives other bits. Differs by rank."""
    generator = torch.Generator().manual_seed(1000 + context.rank)
    scale = 10.0 ** torch.randint(-3, 4, (count,), generator=generator)
    return context.on_device((torch.randn(count, generator=generator) * scale).to(DTYPES[dtype]))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def sums(context: Context, dtype: str, group: Group = None, async_op: bool = False) -> list[str]:
    """Digests of all_reduce results, one a count."""
    digests = []
    for count in COUNTS:
        tensor = numbers(context, dtype, count)
        work = dist.all_reduce(tensor, group=group, async_op=async_op)
        if work is not None:
            work.wait()
        digests.append(digest(tensor))
    return digests


@check("determinism", says="all_reduce leaves the same bits on every rank", cases=ROUNDING, min_ranks=2)
def same_bits_on_every_rank(context: Context, dtype: str) -> None:
    own = sums(context, dtype)
    context.tell(f"digests/{context.rank}", " ".join(own))
    for rank in range(context.world_size):
        others = context.await_key(f"digests/{rank}").split()
        different = [count for count, ours, theirs in zip(COUNTS, own, others, strict=True) if ours != theirs]
        context.expect(not different, f"all_reduce of {different} elements differs from that of rank {rank}")


@check("determinism", says="all_reduce gives the same bits again, whoever comes last", cases=ROUNDING, min_ranks=2)
def same_bits_in_every_run(context: Context, dtype: str) -> None:
    first = sums(context, dtype)
    for turn in range(2 * context.world_size):
        if turn % context.world_size == context.rank:
            time.sleep(0.01)  # late: a backend that adds in order of arrival gives itself away
        context.expect(sums(context, dtype) == first, f"repetition {turn} differs in its bits")


@check(
    "determinism",
    says="Another group of the same ranks, sync or async, gives the same bits",
    cases=ROUNDING,
    min_ranks=2,
)
def same_bits_in_every_group(context: Context, dtype: str) -> None:
    first = sums(context, dtype)
    for _, later in itertools.product(range(2), (False, True)):
        context.expect(sums(context, dtype, context.new_group(), later) == first, f"differs with async_op={later}")
