"""One rank's part of a Program (programs.py): issues each step, waits as it says, and compares every tensor.

A tensor is laid out in a larger one, of which nothing else may change; an input must hold what it held.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import exact
import numpy as np
import programs
import torch
import torch.distributed as dist
from exact import Array
from programs import Program, Step
from torch_arrays import from_torch, reduce_op_of, to_torch


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return from_torch(one).tobytes() == from_torch(other).tobytes()


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def place(content: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of this content, and the larger one that it is a view of."""
    shape = content.shape
    if layout == "expanded" and shape and shape[0]:
        base = content[:1].clone()
        return base.expand(shape), base
    if layout == "offset":
        base = torch.ones(content.numel() + 8, dtype=content.dtype)
        view = base[3 : 3 + content.numel()].view(shape)
    elif layout == "strided":
        base = torch.ones((*shape, 2), dtype=content.dtype)
        view = base[..., 1]
    elif layout == "stepped" and shape:
        base = torch.ones((3 * shape[0] + 2, *shape[1:]), dtype=content.dtype)
        view = base[2::3]
    elif layout == "transposed":
        base = torch.ones(tuple(reversed(shape)), dtype=content.dtype)
        view = base.permute(tuple(reversed(range(len(shape)))))
    else:
        base = view = torch.empty(shape, dtype=content.dtype)
    view.copy_(content)
    return view, base


class Call:
    """One step on one member of its group."""

    def __init__(self, step: Step, number: int, members: list[int], group: Any, remark: str = "") -> None:
        self.step, self.number, self.group, self.remark = step, number, group, remark
        self.size, self.me = len(members), members.index(dist.get_rank())
        self.root = step.root % self.size
        self.later = step.how != "sync"
        self.reduce_op = reduce_op_of(step.reduce_op, self.me)
        self.given = programs.inputs(step, self.size, self.me)
        self.expected = programs.outputs(step, self.size, self.me)
        self.tensors = 0
        self.checks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str]] = []
        self.parts: list[Call] = []
        self.problems: list[str] = []

    def laid_out(self, before: torch.Tensor, after: torch.Tensor, written: bool, what: str) -> torch.Tensor:
        layout = programs.layout_of(self.step, self.me, self.tensors, written)
        view, base = place(before, layout)
        self.tensors += 1
        self.checks.append((view, after, base, base.clone(), f"{what} ({layout or 'contiguous'})"))
        return view

    def stored(self, array: Array) -> torch.Tensor:
        return to_torch(
            np.ascontiguousarray(exact.store(array, self.step.dtype) if self.step.op in programs.REDUCING else array),
            self.step.dtype,
        ).reshape(array.shape)

    def inputs(self) -> list[torch.Tensor]:
        held = [self.stored(array) for array in self.given]
        return [self.laid_out(each, each, False, f"input {i}") for i, each in enumerate(held)]

    def outputs(self) -> list[torch.Tensor]:
        made = []
        for i, array in enumerate(self.expected):
            after = to_torch(np.ascontiguousarray(array), self.step.dtype).reshape(array.shape)
            made.append(self.laid_out(torch.zeros_like(after), after, True, f"output {i}"))
        return made

    def in_place(self) -> torch.Tensor:
        after = to_torch(np.ascontiguousarray(self.expected[0]), self.step.dtype).reshape(self.expected[0].shape)
        return self.laid_out(self.stored(self.given[0]), after, True, "tensor")

    def issue(self) -> None:
        handle = CALLS[self.step.op](self)
        handles = handle if isinstance(handle, list) else [handle]
        self.handles = [each for each in handles if each is not None]

    def finish(self) -> list[str]:
        """Waits, and says what is wrong."""
        for handle in self.handles:
            if self.step.how == "future" and hasattr(handle, "get_future"):
                handle.get_future().wait()
            elif self.step.how == "poll" and hasattr(handle, "is_completed"):
                while not handle.is_completed():
                    os.sched_yield()
            handle.wait()
        for part in self.parts:
            self.problems += part.finish()
        where = f"step {self.number}{self.remark}, {self.step}"
        for view, after, base, base_before, what in self.checks:
            same = same_numbers if self.step.op in programs.REDUCING else same_bits
            if not same(view, after):
                self.problems.append(f"{where}: {what} is {str(view)[:300]} instead of {str(after)[:300]}")
            if base.numel() > view.numel():
                base_before.as_strided(view.size(), view.stride(), view.storage_offset()).copy_(view)
                if not same_bits(base, base_before):
                    self.problems.append(f"{where}: something beside {what} was written")
        return self.problems


# --- the calls ---


def all_gather_into_tensor(call: Call) -> Any:
    given = call.inputs()[0]
    return dist.all_gather_into_tensor(call.outputs()[0], given, group=call.group, async_op=call.later)


def gather(call: Call) -> Any:
    given, taken = call.inputs()[0], call.outputs() if call.me == call.root else None
    return dist.gather(given, taken, group=call.group, async_op=call.later, group_dst=call.root)


def scatter(call: Call) -> Any:
    given = call.inputs() if call.me == call.root else None
    return dist.scatter(call.outputs()[0], given, group=call.group, async_op=call.later, group_src=call.root)


def reduce_scatter(call: Call) -> Any:
    given = call.inputs()
    return dist.reduce_scatter(call.outputs()[0], given, call.reduce_op, group=call.group, async_op=call.later)


def reduce_scatter_tensor(call: Call) -> Any:
    given = call.inputs()[0]
    return dist.reduce_scatter_tensor(call.outputs()[0], given, call.reduce_op, group=call.group, async_op=call.later)


def all_gather(call: Call) -> Any:
    given = call.inputs()[0]
    return dist.all_gather(call.outputs(), given, group=call.group, async_op=call.later)


def all_to_all(call: Call) -> Any:
    given = call.inputs()
    return dist.all_to_all(call.outputs(), given, group=call.group, async_op=call.later)


def all_to_all_single(call: Call) -> Any:
    sent = [call.step.pair(call.me, other, call.size) for other in range(call.size)]
    got = [call.step.pair(other, call.me, call.size) for other in range(call.size)]
    splits: Any = (got, sent)
    if len(call.step.rows) == 1 and (call.step.seed + call.me) % 2:  # equal ones may be left out, on some ranks only
        splits = (None, None)
    given = call.inputs()[0]
    return dist.all_to_all_single(call.outputs()[0], given, *splits, group=call.group, async_op=call.later)


def exchange(call: Call) -> Any:
    """Everybody with everybody, itself included where it is a batch, in an order of each rank's own."""
    given, taken = call.inputs(), call.outputs()
    operations: list[Any] = []
    for other in range(call.size):
        if call.step.op == "batch" or other != call.me:
            operations.append((dist.irecv, taken[other], other))
            operations.append((dist.isend, given[other], other))
        else:
            taken[other].copy_(given[other])
    order = np.random.default_rng([call.step.seed, call.me]).permutation(len(operations))
    tag = call.step.seed % 3
    chosen = [operations[i] for i in order]
    if call.step.op == "batch":
        batch = [dist.P2POp(op, tensor, group=call.group, tag=tag, group_peer=peer) for op, tensor, peer in chosen]
        return dist.batch_isend_irecv(batch)
    return [
        op(tensor, group=call.group, tag=tag, **{"group_src" if op is dist.irecv else "group_dst": peer})
        for op, tensor, peer in chosen
    ]


def send_recv(call: Call) -> Any:
    to, tag = (call.root + 1) % call.size, call.step.seed % 3
    given = call.inputs()[0]
    if to == call.root:
        return None
    if call.me == call.root:
        send = dist.isend if call.later else dist.send
        return send(given, group=call.group, tag=tag, group_dst=to)
    if call.me == to:
        receive = dist.irecv if call.later else dist.recv
        work: Any = receive(call.outputs()[0], group=call.group, tag=tag, group_src=call.root)
        return work if call.later else None
    return None


def any_source(call: Call) -> Any:
    """A tag of its own for each step: nothing else may be taken for it."""
    given, tag = call.inputs()[0], 1000 + call.number
    if call.me != call.root:
        return dist.isend(given, group=call.group, tag=tag, group_dst=call.root)
    taken = call.outputs()
    taken[call.me].copy_(given)
    members = dist.get_process_group_ranks(call.group)
    for _ in range(call.size - 1):
        tensor = torch.zeros_like(given).contiguous()
        source = members.index(dist.recv(tensor, group=call.group, tag=tag))
        taken[source].copy_(tensor)
    return None


def all_reduce_coalesced(call: Call) -> Any:
    call.parts = parts_of(call)
    tensors = [part.in_place() for part in call.parts]
    return dist.all_reduce_coalesced(tensors, call.reduce_op, group=call.group, async_op=call.later)


def all_gather_coalesced(call: Call) -> Any:
    call.parts = parts_of(call)
    given = [part.inputs()[0] for part in call.parts]
    taken = [list(of_rank) for of_rank in zip(*(part.outputs() for part in call.parts), strict=True)]
    return dist.distributed_c10d.all_gather_coalesced(taken, given, call.group, call.later)


def managed(call: Call) -> Any:
    call.parts = parts_of(call)
    device = torch.device("cpu") if call.step.seed % 2 else None  # None: torch joins the calls into one itself
    with dist._coalescing_manager(call.group, device, async_ops=call.later) as manager:
        for part in call.parts:
            CALLS[part.step.op](part)
    return manager if call.later else None


def parts_of(call: Call) -> list[Call]:
    members = dist.get_process_group_ranks(call.group)
    made = [
        Call(step, call.number, members, call.group, f", tensor {number}")
        for number, step in enumerate(call.step.parts())
    ]
    for part in made:
        part.handles, part.later = [], False
    return made


def objects(call: Call) -> Any:
    mine = call.given[0].tobytes()
    expected = [each.tobytes() for each in call.expected]
    if call.step.op == "all_gather_object":
        taken: list[Any] = [None] * call.size
        dist.all_gather_object(taken, mine, group=call.group)
    else:
        taken = [mine if call.me == call.root else None]
        dist.broadcast_object_list(taken, group=call.group, group_src=call.root)
    if taken != expected:
        call.problems.append(f"step {call.number}, {call.step}: {str(taken)[:300]} instead of {str(expected)[:300]}")


CALLS: dict[str, Callable[[Call], Any]] = {
    "barrier": lambda call: dist.barrier(call.group, async_op=call.later),
    "all_reduce": lambda call: dist.all_reduce(call.in_place(), call.reduce_op, call.group, call.later),
    "reduce": lambda call: dist.reduce(
        call.in_place(), op=call.reduce_op, group=call.group, async_op=call.later, group_dst=call.root
    ),
    "broadcast": lambda call: dist.broadcast(
        call.in_place(), group=call.group, async_op=call.later, group_src=call.root
    ),
    "all_gather": all_gather,
    "all_gather_into_tensor": all_gather_into_tensor,
    "gather": gather,
    "scatter": scatter,
    "reduce_scatter": reduce_scatter,
    "reduce_scatter_tensor": reduce_scatter_tensor,
    "all_to_all": all_to_all,
    "all_to_all_single": all_to_all_single,
    "exchange": exchange,
    "batch": exchange,
    "send_recv": send_recv,
    "any_source": any_source,
    "all_reduce_coalesced": all_reduce_coalesced,
    "all_gather_coalesced": all_gather_coalesced,
    **{f"managed_{op}": managed for op in programs.MANAGED},
    "all_gather_object": objects,
    "broadcast_object_list": objects,
}


# --- a whole program ---


def run_steps(steps: list[tuple[int, Step]], members: list[list[int]], handles: list[Any], problems: list[str]) -> None:
    """These steps, in order; each async one is waited for when its rank's lag is over, or at the end."""
    pending: list[tuple[int, int, Call]] = []
    me = dist.get_rank()
    end = len(steps) + max(max(step.lags) for _, step in steps)
    for turn in range(end + 1):
        if turn < len(steps):
            number, step = steps[turn]
            if me in members[step.group]:
                call = Call(step, number, members[step.group], handles[step.group])
                call.issue()
                pending.append((turn + step.lags[me % len(step.lags)] if call.later else turn, turn, call))
        due = sorted(entry[:2] for entry in pending if entry[0] <= turn)
        for _, issued in due:
            (entry,) = (each for each in pending if each[1] == issued)
            pending.remove(entry)
            problems += entry[2].finish()


def execute(rank: int, world_size: int, program: Program) -> list[str]:
    """What is wrong on this rank; nothing, where all is well."""
    torch.set_num_threads(1)
    members = programs.groups(world_size)
    handles = [dist.group.WORLD, *(dist.new_group(ranks) for ranks in members[1:])]
    problems: list[str] = []

    def share(thread: int) -> None:
        steps = [pair for pair in enumerate(program.steps) if pair[1].group % program.threads == thread]
        try:
            if steps:
                run_steps(steps, members, handles, problems)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
            for group, ranks in zip(handles, members, strict=True):  # so that the others need not time out
                if rank in ranks:
                    group.abort()

    threads = [threading.Thread(target=share, args=(thread,)) for thread in range(1, program.threads)]
    for thread in threads:
        thread.start()
    share(0)
    for thread in threads:
        thread.join()
    # Nobody leaves what a peer still needs. Over the store, so that a rank with problems meets those without.
    store = dist.distributed_c10d._get_default_store()
    store.set(f"done/{rank}", "")
    store.wait([f"done/{each}" for each in range(world_size)])
    return problems
