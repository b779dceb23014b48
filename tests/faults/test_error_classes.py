"""On every way through torch's layers a program that catches hxcomm's error classes gets them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel

Group = Any
Way = Callable[[Group], Callable[[], object]]  # prepares with a healthy group, returns the call that is to fail

NUMBERS = 8


def ones() -> torch.Tensor:
    return torch.ones(NUMBERS)


def sync(group: Group) -> Callable[[], object]:
    return lambda: dist.all_reduce(ones(), group=group)


def started(group: Group) -> dist.Work:
    work = dist.all_reduce(ones(), group=group, async_op=True)
    assert work is not None
    return work


def wait(group: Group) -> Callable[[], object]:
    return lambda: started(group).wait()


def wait_with_a_timeout(group: Group) -> Callable[[], object]:
    return lambda: started(group).wait(timedelta(seconds=100))


def future(group: Group) -> Callable[[], object]:
    return lambda: started(group).get_future().wait()


def chained_future(group: Group) -> Callable[[], object]:
    return lambda: started(group).get_future().then(lambda done: done.value()).wait()


def collected_futures(group: Group) -> Callable[[], object]:
    return lambda: torch.futures.wait_all([started(group).get_future()])


def coalesced(group: Group) -> Callable[[], object]:
    def call() -> None:
        with dist._coalescing_manager(group, async_ops=True) as manager:
            dist.all_reduce(ones(), group=group)
        manager.wait()

    return call


def functional_form(group: Group) -> Callable[[], object]:
    return lambda: functional.all_reduce(ones(), "sum", group) + 1


def wait_tensor(group: Group) -> Callable[[], object]:
    return lambda: functional.wait_tensor(torch.ops._c10d_functional.all_reduce(ones(), "sum", group.group_name))


def gradient_of_a_collective(group: Group) -> Callable[[], object]:
    given = torch.ones(NUMBERS * dist.get_world_size(), requires_grad=True)
    taken = functional.reduce_scatter_single_autograd(given, "sum", 0, group).sum()
    return lambda: taken.backward()


def compiled(group: Group) -> Callable[[], object]:
    call = torch.compile(lambda x: functional.all_reduce(x, "sum", group) * 2, fullgraph=True, backend="aot_eager")
    call(ones())
    return lambda: call(ones())


def backward(model: torch.nn.Module) -> Callable[[], object]:
    loss = model(ones()).sum()
    return lambda: (loss.backward(), model)  # DDP's hooks go with the model


def data_parallel(group: Group) -> Callable[[], object]:
    return backward(DistributedDataParallel(torch.nn.Linear(NUMBERS, 1, bias=False), process_group=group))


def compressing_data_parallel(group: Group) -> Callable[[], object]:
    model = DistributedDataParallel(torch.nn.Linear(NUMBERS, 1, bias=False), process_group=group)
    model.register_comm_hook(group, default_hooks.fp16_compress_hook)
    return backward(model)


def sharded(group: Group) -> torch.nn.Module:
    return fully_shard(torch.nn.Linear(NUMBERS, NUMBERS), mesh=DeviceMesh.from_group(group, "cpu"))


def fully_sharded(group: Group) -> Callable[[], object]:
    model = sharded(group)
    return lambda: model(ones())


def fully_sharded_backward(group: Group) -> Callable[[], object]:
    return backward(sharded(group))


def redistribute(group: Group) -> Callable[[], object]:
    tensor = DTensor.from_local(ones(), DeviceMesh.from_group(group, "cpu"), [Partial()], run_check=False)
    return lambda: tensor.redistribute(placements=[Replicate()]).to_local() + 1


def objects(group: Group) -> Callable[[], object]:
    return lambda: dist.all_gather_object([None] * dist.get_world_size(), "text", group=group)


WAYS: tuple[Way, ...] = (
    sync,
    wait,
    wait_with_a_timeout,
    future,
    chained_future,
    collected_futures,
    coalesced,
    functional_form,
    wait_tensor,
    gradient_of_a_collective,
    compiled,
    data_parallel,
    compressing_data_parallel,
    fully_sharded,
    fully_sharded_backward,
    redistribute,
    objects,
)


def raised_by(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def fail(cause: str, group: Group, call: Callable[[], object]) -> tuple[str, str]:
    """Lets a call of rank 0 fail for this cause, which rank 1 sees to. Returns what rank 0's call raised."""
    rank = dist.get_rank()
    if rank == 1 and cause == "PeerFailedError":
        dist.destroy_process_group(group)  # leaves a group that is still needed
    if rank == 1 and cause == "CommTimeoutError":
        assert raised_by(lambda: started(group).wait(timedelta(milliseconds=1)))[0] == cause
    if rank == 0 and cause == "AbortedError":
        group._get_backend(torch.device("cpu")).abort()
    if cause == "CommTimeoutError":
        dist.barrier()  # of all ranks: rank 0 calls when the time is up, and not before
    if rank == 1 and cause == "MismatchError":
        # Another reduce op: all that torch's own check of the calls (DETAIL) leaves to the backend.
        raised_by(lambda: dist.all_reduce(ones(), dist.ReduceOp.MAX, group=group))
    return raised_by(call) if rank == 0 else ("", "")


def fail_in_every_way(rank: int, world_size: int, cause: str, debug: str) -> dict[str, tuple[str, str]]:
    dist.set_debug_level(getattr(dist.DebugLevel, debug))
    raised = {}
    for way in WAYS if debug == "OFF" else ALL_REDUCES:
        group = dist.new_group()
        raised[way.__name__] = fail(cause, group, way(group))
        dist.barrier()
        if rank == 0 or cause != "PeerFailedError":
            dist.destroy_process_group(group)
    torch._dynamo.reset()
    dist.set_debug_level(dist.DebugLevel.OFF)
    return raised


ALL_REDUCES = (sync, wait, future, chained_future, functional_form, wait_tensor, compiled, data_parallel)
# Ways through a callback in Python, whose exceptions torch turns into a RuntimeError that quotes class and message.
THROUGH_PYTHON = {"chained_future", "compressing_data_parallel"}


# With DETAIL torch compares calls over gloo first, and a rank that is late or gone is gloo's to notice.
@pytest.mark.parametrize(
    ("cause", "debug"),
    [
        ("MismatchError", "OFF"),
        ("MismatchError", "DETAIL"),
        ("PeerFailedError", "OFF"),
        ("CommTimeoutError", "OFF"),
        ("AbortedError", "OFF"),
    ],
)
def test_an_error_keeps_its_class_on_every_way_through_torch(
    rank_pool: Callable[[int], Any], cause: str, debug: str
) -> None:
    raised = rank_pool(2).run(fail_in_every_way, cause, debug)[0]
    for way, (name, message) in raised.items():
        quoted = way in THROUGH_PYTHON and name == "RuntimeError" and f"{cause}: " in message
        assert name == cause or quoted, (way, name, message)
    assert len(raised) == len(WAYS if debug == "OFF" else ALL_REDUCES)
