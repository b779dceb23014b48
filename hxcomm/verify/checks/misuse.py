"""Misuse: ranks that call differently. Every rank must raise: not hang, not crash, not return an answer.

torch leaves this undefined; most backends then hang or corrupt memory, and it is the most common bug of a distributed
program. Whether the group works afterwards is reported beside the verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist

from hxcomm.verify.collectives import DTYPES, OPS, REDUCING, Call
from hxcomm.verify.context import IDLE, Context, Idle
from hxcomm.verify.registry import check


def usable(context: Context, *_: object) -> None:
    """After the misuse: the group still works."""
    context.meet()
    tensor = context.full(100, context.rank + 1.0)
    dist.all_reduce(tensor)
    expected = float(sum(range(1, context.world_size + 1)))
    context.equal(tensor, torch.full((100,), expected), "all_reduce")


def must_raise(context: Context, call: Callable[[], object], what: str) -> None:
    """Reports the error's class; WrongError where there is none."""
    error = context.raises(call, what)
    context.note("raised", type(error).__name__)


def odd_one_out(context: Context) -> bool:
    """The last rank is the one that calls differently."""
    return context.rank == context.last


def waited(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()


@check(
    "misuse",
    says="Ranks that call with different dtypes all raise",
    cases=[
        *itertools.product(["all_reduce"], ["float32"], ["int32", "float64", "int64"]),
        ("all_reduce", "float16", "bfloat16"),
        *itertools.product(["broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"], ["float32"], ["int32"]),
        ("all_to_all_single", "float32", "float64"),
    ],
    min_ranks=2,
    afterwards=usable,
)
def dtype_mismatch(context: Context, op: str, dtype: str, other: str) -> None:
    chosen = other if odd_one_out(context) else dtype
    call = Call(context, op, DTYPES[chosen])
    must_raise(context, call.issue, f"{op} of {chosen} among {dtype} and {other}")


@check(
    "misuse",
    says="Ranks that call with different element counts all raise",
    cases=OPS,
    min_ranks=2,
    afterwards=usable,
)
def count_mismatch(context: Context, op: str) -> None:
    count = 34 if odd_one_out(context) else 33
    must_raise(context, Call(context, op, shape=(count,)).issue, f"{op} of {count} elements among 33 and 34")


@check("misuse", says="The same, where the collective is async: wait() raises", min_ranks=2, afterwards=usable)
def count_mismatch_async(context: Context) -> None:
    call = Call(context, "all_reduce", shape=(34 if odd_one_out(context) else 33,))
    must_raise(context, lambda: waited(call.issue(True)), "wait() for all_reduce of 33 and 34 elements")


@check(
    "misuse",
    says="Ranks that call with different reduce ops all raise",
    cases=[
        *itertools.product(REDUCING, ["sum"], ["max"]),
        ("all_reduce", "sum", "product"),
        ("all_reduce", "min", "max"),
    ],
    min_ranks=2,
    afterwards=usable,
)
def reduce_op_mismatch(context: Context, op: str, name: str, other: str) -> None:
    chosen = other if odd_one_out(context) else name
    must_raise(context, Call(context, op, reduce_op=chosen).issue, f"{op} with {chosen} among {name} and {other}")


@check(
    "misuse",
    says="Ranks that name different roots all raise",
    cases=["broadcast", "reduce", "gather", "scatter"],
    min_ranks=2,
    afterwards=usable,
)
def root_mismatch(context: Context, op: str) -> None:
    root = context.last if odd_one_out(context) else 0
    must_raise(context, Call(context, op, root=root).issue, f"{op} to or from root {root} among 0 and {context.last}")


@check(
    "misuse",
    says="Ranks that call different collectives all raise",
    cases=[
        ("all_reduce", "broadcast"),
        ("all_reduce", "all_gather_into_tensor"),
        ("all_reduce", "reduce_scatter_tensor"),
        ("all_gather_into_tensor", "all_to_all_single"),
        ("broadcast", "reduce"),
    ],
    min_ranks=2,
    afterwards=usable,
)
def op_mismatch(context: Context, op: str, other: str) -> None:
    chosen = other if odd_one_out(context) else op
    must_raise(context, Call(context, chosen).issue, f"{chosen} among {op} and {other}")


@check("misuse", says="A barrier and an all_reduce do not pair up: all raise", min_ranks=2, afterwards=usable)
def barrier_mismatch(context: Context) -> None:
    issue = dist.barrier if odd_one_out(context) else Call(context, "all_reduce").issue
    must_raise(context, issue, "a barrier among all_reduces")


@check("misuse", says="Split sizes that do not fit one another raise on all ranks", min_ranks=2, afterwards=usable)
def split_mismatch(context: Context) -> None:
    """The last rank sends one row more to rank 0 than rank 0 expects."""
    sent = [2] * context.world_size
    if odd_one_out(context):
        sent[0] = 3
    source, output = context.full(sum(sent), 1.0), context.full(2 * context.world_size, 0.0)
    call = lambda: dist.all_to_all_single(output, source, [2] * context.world_size, sent)  # noqa: E731
    must_raise(context, call, "all_to_all_single with splits that do not fit")


@check("misuse", says="A call that one rank's backend refuses raises on all ranks", min_ranks=2, afterwards=usable)
def refused_on_one_rank(context: Context) -> None:
    """The last rank's list of outputs is one short: only the backend can see that."""
    short = 1 if odd_one_out(context) else 0
    outputs = [context.full(10, 0.0) for _ in range(context.world_size - short)]
    must_raise(context, lambda: dist.all_gather(outputs, context.full(10, 1.0)), "all_gather into a list too short")


@check("misuse", says="A root outside the group raises", min_ranks=2, afterwards=usable)
def no_such_root(context: Context) -> None:
    must_raise(context, lambda: dist.broadcast(context.full(10, 1.0), group_src=context.world_size), "broadcast")


@check(
    "misuse",
    says="An output of the wrong size raises before anything is written",
    cases=["all_gather_into_tensor", "reduce_scatter_tensor"],
    min_ranks=2,
    afterwards=usable,
)
def output_size(context: Context, op: str) -> None:
    small, large = context.full(10, 1.0), context.full(10 * context.world_size + 1, 0.0)
    if op == "all_gather_into_tensor":
        must_raise(context, lambda: dist.all_gather_into_tensor(large, small), "into an output one element too long")
        context.expect(not large.any().item(), "the output was written")
    else:
        must_raise(context, lambda: dist.reduce_scatter_tensor(small, large), "of an input one element too long")
        context.expect(bool((small == 1).all().item()), "the output was written")


@check(
    "misuse", says="A stream of collectives in which one rank skips one raises on all", min_ranks=2, afterwards=usable
)
def one_rank_skips_one(context: Context) -> None:
    """Of broadcast, all_reduce, all_gather the last rank leaves the first out, so it is one ahead."""

    def stream() -> None:
        for op in ("broadcast", "all_reduce", "all_gather_into_tensor")[1 if odd_one_out(context) else 0 :]:
            Call(context, op).issue()

    must_raise(context, stream, "a stream with one call missing on one rank")


@check(
    "misuse",
    says="A receive of another dtype or size than was sent raises",
    cases=["dtype", "count"],
    min_ranks=2,
    spoils=True,
)
def receive_mismatch(context: Context, what: str) -> Idle | None:
    """Of the sender only its return is asked: it may be done before the receiver looks, and learn of it later."""
    if context.rank > 1:
        return IDLE
    if context.rank == 0:
        try:
            dist.send(context.full(33, 1.0), 1)
        except RuntimeError as error:
            if isinstance(error, NotImplementedError) or "does not support" in str(error):
                raise
            context.note("the sender raised", type(error).__name__)
    else:
        tensor = context.full(33, 0, torch.int32) if what == "dtype" else context.full(34, 0.0)
        must_raise(context, lambda: dist.recv(tensor, 0), f"recv with another {what}")
    return None
