"""TorchComms: wrong calls raise on the rank that made them, nothing hangs, and the communicator stays usable; failures
end it on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from hxcomm import torchcomms
from hxcomm.verify.checks.failure import SHORT_S, die, note_error
from hxcomm.verify.checks.torchcomms_semantics import SUM, comm_named, mine, require_sum
from hxcomm.verify.communicators import CommCall
from hxcomm.verify.context import Context
from hxcomm.verify.registry import check

API = "torchcomms"
# In these every rank needs every other, so none can end before the dead one was noticed.
NEED_EVERYONE = ("all_reduce", "all_gather_single", "all_to_all_single", "reduce_scatter_single")


def still_usable(context: Context, *_: object) -> None:
    tensor = mine(context)
    context.comm.all_reduce(tensor, SUM, False)
    require_sum(context, tensor, "all_reduce afterwards")


def _other_device(context: Context) -> torch.Tensor:
    return torch.zeros(4, device="cpu" if context.device.type != "cpu" else "meta")


def _list(context: Context, n: int) -> list[torch.Tensor]:
    return [context.full(4, 0.0) for _ in range(n)]


# Every rank makes the same wrong call, so what one backend finds locally and another by asking its peers raises alike.
WRONG: dict[str, Callable[[Context, Any], Any]] = {
    "device": lambda context, comm: comm.all_reduce(_other_device(context), SUM, False),
    "dtype_mix": lambda context, comm: comm.all_gather_single(
        torch.zeros(4 * context.world_size, dtype=torch.float64, device=context.device), mine(context, 4), False
    ),
    "list_length": lambda context, comm: comm.all_gather(
        _list(context, context.world_size + 1), mine(context, 4), False
    ),
    "output_size": lambda context, comm: comm.all_gather_single(context.full(3, 0.0), mine(context, 4), False),
    "root_too_large": lambda context, comm: comm.broadcast(mine(context), context.world_size, False),
    "root_negative": lambda context, comm: comm.reduce(mine(context), -1, SUM, False),
    "peer_too_large": lambda context, comm: comm.send(mine(context), context.world_size, False),
    "split_sizes": lambda context, comm: comm.all_to_all_v_single(
        mine(context, 8), mine(context, 8), [3] * context.world_size, [8] * context.world_size, False
    ),
    "self_send": lambda context, comm: comm.send(mine(context, 300_001), context.rank, False),
    "self_recv": lambda context, comm: comm.recv(mine(context), context.rank, False),
    "split_duplicates": lambda context, comm: comm.split([0, 0], "twice"),
    "split_out_of_range": lambda context, comm: comm.split([context.world_size], "beyond"),
}


@check(
    "misuse",
    api=API,
    says="A wrong call raises on the rank that makes it, saying the values, and the communicator stays usable",
    cases=WRONG,
    afterwards=still_usable,
)
def wrong_call(context: Context, what: str) -> None:
    error = context.raises(lambda: WRONG[what](context, context.comm), f"a call with a wrong {what.replace('_', ' ')}")
    context.note("the error", type(error).__name__)


@check(
    "misuse",
    api=API,
    says="An unknown hint is an error that lists the known ones",
    afterwards=still_usable,
    optional=True,
)
def unknown_hint(context: Context) -> None:
    error = context.raises(
        lambda: context.comm.all_reduce(mine(context), SUM, False, hints={"no such": "1"}), "an unknown hint"
    )
    context.expect("no such" in str(error), f"the error does not name the hint: {error}")


@check(
    "misuse",
    api=API,
    says="Ranks that call different operations, dtypes, counts, reduce ops or roots raise, all of them",
    cases=["operation", "dtype", "count", "reduce_op", "root"],
    min_ranks=2,
    afterwards=still_usable,
)
def mismatch(context: Context, what: str) -> None:
    odd = context.rank == context.last
    comm = context.comm

    def call() -> Any:
        if what == "operation" and odd:
            return comm.broadcast(mine(context), 0, False)
        if what == "dtype" and odd:
            return comm.all_reduce(mine(context).to(torch.float64), SUM, False)
        if what == "count" and odd:
            return comm.all_reduce(mine(context, 999), SUM, False)
        if what == "reduce_op" and odd:
            return comm.all_reduce(mine(context), torchcomms.ReduceOp.MAX, False)
        if what == "root":
            return comm.broadcast(mine(context), context.last if odd else 0, False)
        return comm.all_reduce(mine(context), SUM, False)

    context.raises(call, f"a call whose {what} differs by rank")


@check("misuse", api=API, says="After finalize() every call raises; a second finalize() does not")
def use_after_finalize(context: Context) -> None:
    comm = comm_named(context, "short life")
    comm.finalize()
    context.raises(lambda: comm.all_reduce(mine(context), SUM, False), "all_reduce after finalize()")
    context.raises(lambda: comm.split([0], "late"), "split after finalize()")
    comm.finalize()


# --- failure ---


@check(
    "failure",
    api=API,
    says="A rank that is killed ends an operation on every other rank, at once",
    cases=itertools.product(
        ("all_reduce", "all_gather_single", "all_to_all_single", "reduce_scatter_single"), ("last",)
    ),
    min_ranks=2,
    spoils=True,
)
def killed_before(context: Context, op: str, which: str) -> None:
    victim = 0 if which == "first" else context.last
    call = CommCall(context, op)
    context.comm.barrier(False)
    context.meet()
    if context.rank == victim:
        die(context)
    error = context.raises(call.issue, f"{op}, although rank {victim} was killed,")
    note_error(context, error, victim)


@check("failure", api=API, says="A call's timeout ends an operation that a peer never joins", min_ranks=2, spoils=True)
def call_timeout(context: Context) -> None:
    if context.rank != 0:
        context.await_key("timed out")
        return
    try:
        error = context.raises(
            lambda: context.comm.all_reduce(mine(context), SUM, False, timeout=timedelta(seconds=SHORT_S)),
            "an all_reduce that nobody joins",
        )
        context.note("the error", type(error).__name__)
    finally:
        context.tell("timed out")


@check(
    "failure",
    api=API,
    says="abort() ends pending work of every rank, runs the abort hooks, and leaves only finalize() and reconfigure()",
    min_ranks=2,
    spoils=True,
    optional=True,
)
def abort(context: Context) -> None:
    comm = context.comm
    if not comm.is_abort_supported():
        raise NotImplementedError("abort is not supported")
    ran: list[int] = []
    comm.register_abort_hook(lambda: ran.append(1))
    context.meet()
    work = comm.all_reduce(mine(context, 300_001), SUM, True) if context.rank != context.last else None
    context.meet()
    if context.rank == 0:
        comm.abort()
        context.expect(comm.is_aborted() and ran == [1], f"is_aborted() {comm.is_aborted()}, abort hooks ran {ran}")
        context.tell("aborted")
    context.await_key("aborted")  # or the last rank's next call would meet the pending one, and differ from it
    if work is not None:
        context.raises(work.wait, "work that was pending at abort()")
    context.raises(lambda: comm.all_reduce(mine(context), SUM, False), "all_reduce after abort()")
    context.expect(comm.is_aborted() and ran == [1], f"is_aborted() {comm.is_aborted()}, abort hooks ran {ran}")
    comm.finalize()
