"""c10d process groups over communicators: `dist.*`, DDP, FSDP2, DTensor and parallelize_module run on one.

Most of it is `hxcomm verify`'s, whose checks compare with one process and whose default group is here a communicator's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool

Pool = Callable[[int], RankPool]


def communicator(device: str, name: str = "world") -> Any:
    from hxcomm.torchcomms import new_comm

    return new_comm("hxcomm", device, name, abort_process_on_timeout_or_error=False)


def verified(rank: int, world_size: int, device: str, patterns: Sequence[str]) -> tuple[int, list[str]]:
    """How many cases passed with a communicator's group as the default one, and what the others said."""
    from hxcomm.torchcomms.device_mesh import init_device_mesh
    from hxcomm.verify import registry
    from hxcomm.verify.context import Context

    torch.set_num_threads(1)
    registry.load()
    comm = communicator(device)
    init_device_mesh((comm,), ("world",))
    store = comm.get_options().store
    passed, failed = 0, []
    for case in registry.matching(patterns):
        if case.check.spoils or case.check.min_ranks > world_size:
            continue
        context = Context(
            backend="hxcomm",
            device=torch.device(device),
            rank=rank,
            world_size=world_size,
            timeout_s=100,
            store=dist.PrefixStore(case.id, store),
            announce=lambda status: None,
        )
        try:
            case.check.function(context, *case.arguments)
            context.destroy_groups()
            passed += 1
        except Exception as error:
            failed.append(f"{case.id}: {type(error).__name__}: {error}")
            break  # the other ranks may be elsewhere
    dist.destroy_process_group()
    return passed, failed


def all_pass(outcomes: list[Any], least: int) -> None:
    assert [failed for _, failed in outcomes] == [[]] * len(outcomes)
    assert min(passed for passed, _ in outcomes) >= least


@pytest.mark.parametrize(
    ("patterns", "world_size", "least"),
    [
        (("parallel/data_parallel*",), 2, 12),
        (("parallel/*shard*", "parallel/checkpoints*", "parallel/clipped*"), 2, 5),
        (("parallel/tensor_parallel*", "parallel/sequence*", "parallel/loss*", "parallel/operators*"), 2, 5),
        (("parallel/redistribute*",), 2, 10),
        (("parallel/pipeline*",), 2, 3),
        (("parallel/data_parallel[*", "parallel/tensor_parallel*"), 4, 6),
    ],
    ids=["data_parallel", "sharded", "tensor_parallel", "redistribute", "pipeline", "four_ranks"],
)
def test_training_over_a_communicator_gives_what_one_process_gives(
    rank_pool: Pool, patterns: tuple[str, ...], world_size: int, least: int
) -> None:
    all_pass(rank_pool(world_size).run(verified, "cpu", patterns, backend=None, timeout_s=200), least)


def test_training_over_a_communicator_of_chips_gives_what_one_process_gives(rank_pool: Pool) -> None:
    patterns = ("parallel/data_parallel[*", "parallel/tensor_parallel*", "parallel/*shard*")
    all_pass(rank_pool(2).run(verified, "hx", patterns, backend=None, timeout_s=200), 8)


@pytest.mark.parametrize(
    ("patterns", "least"),
    [(("semantics/*",), 30), (("point_to_point/*",), 10)],
    ids=["semantics", "point_to_point"],
)
def test_what_torch_distributed_promises_holds_over_a_communicator(
    rank_pool: Pool, patterns: tuple[str, ...], least: int
) -> None:
    all_pass(rank_pool(2).run(verified, "cpu", patterns, backend=None, timeout_s=200), least)


def seen_by_hooks(rank: int, world_size: int) -> tuple[list[tuple[str, int]], list[int]]:
    from hxcomm.torchcomms import OpName
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    comm = communicator("cpu")
    init_device_mesh((comm,), ("world",))
    before: list[tuple[str, int]] = []
    after: list[int] = []

    def pre(name: OpName, op_id: int, args: Any) -> None:
        before.append((name.name, op_id))
        assert isinstance(args.async_op, bool)

    handles = comm.register_pre_hook(pre), comm.register_post_hook(lambda op_id, args: after.append(op_id))
    ones = torch.ones(world_size)
    dist.all_reduce(ones)
    dist.broadcast(ones, src=0)
    dist.reduce(ones, dst=1)
    dist.all_gather([torch.empty(world_size) for _ in range(world_size)], ones)
    dist.all_gather_into_tensor(torch.empty(world_size**2), ones)
    dist.reduce_scatter(torch.empty(world_size), [ones] * world_size)
    dist.reduce_scatter_tensor(torch.empty(1), ones)
    dist.all_to_all_single(torch.empty(world_size), ones)
    splits = [1] * world_size
    dist.all_to_all_single(torch.empty(world_size), ones, splits, splits)
    dist.all_to_all([torch.empty(1) for _ in range(world_size)], list(ones.split(1)))
    dist.scatter(torch.empty(world_size), [ones] * world_size if rank == 0 else None, src=0)
    dist.gather(ones, [torch.empty(world_size) for _ in range(world_size)] if rank == 0 else None, dst=0)
    dist.barrier()
    other = (rank + 1) % world_size
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, ones, other), dist.P2POp(dist.irecv, torch.empty(world_size), other)]
    ):
        work.wait()
    with dist._coalescing_manager(async_ops=True) as block:
        dist.all_reduce(ones)
        dist.all_reduce(torch.ones(3))
    block.wait()
    for handle in handles:
        handle.remove()
    dist.all_reduce(ones)
    dist.destroy_process_group()
    return before, after


def test_hooks_of_the_communicator_see_the_calls_that_torch_makes(rank_pool: Pool) -> None:
    for before, after in rank_pool(2).run(seen_by_hooks, backend=None):
        names = [name for name, _ in before]
        assert names == [
            "all_reduce",
            "broadcast",
            "reduce",
            "all_gather",
            "all_gather_single",
            "reduce_scatter",
            "reduce_scatter_single",
            "all_to_all_single",
            "all_to_all_v_single",
            "all_to_all",
            "scatter",
            "gather",
            "barrier",
            "send",
            "recv",
            "all_reduce",
            "all_reduce",
        ]
        assert [op_id for _, op_id in before] == after == sorted(set(after))


def works_of_hooks(rank: int, world_size: int) -> list[str]:
    from hxcomm.torchcomms import WorkStatus
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    comm = communicator("cpu")
    init_device_mesh((comm,), ("world",))
    told: list[Any] = []
    handle = comm.register_post_hook(lambda op_id, args: told.append(args.work))
    blocking = torch.ones(2)
    dist.all_reduce(blocking)
    assert told[0].status is WorkStatus.COMPLETED
    received = torch.empty(1)
    receive = dist.irecv(received, src=1 - rank)
    assert told[1].status is WorkStatus.INPROGRESS
    dist.barrier()  # the other one has looked, too
    dist.send(torch.ones(1), dst=1 - rank)
    told[1].wait()
    assert (told[1].status, received.item()) == (WorkStatus.COMPLETED, 1.0)
    receive.wait()  # type: ignore[union-attr]
    handle.remove()
    dist.destroy_process_group()
    return [type(each).__name__ for each in told]


def test_post_hooks_of_asynchronous_calls_get_the_work_that_is_under_way(rank_pool: Pool) -> None:
    assert rank_pool(2).run(works_of_hooks, backend=None) == [["TorchWork"] * 4] * 2


def refusing_hook(rank: int, world_size: int) -> list[float]:
    from torch.distributed import _functional_collectives as functional

    from hxcomm.torchcomms.device_mesh import init_device_mesh
    from hxcomm.torchcomms.hooks import NanCheckHook

    comm = communicator("cpu")
    mesh = init_device_mesh((comm,), ("world",))
    check = NanCheckHook()
    check.register_with_comm(comm)
    wrong, right = torch.tensor([float("nan")]), torch.ones(1)
    for call in (
        lambda: dist.all_reduce(wrong),
        lambda: functional.all_reduce(wrong, "sum", mesh),
        lambda: dist.all_gather_into_tensor(torch.empty(world_size), wrong),
    ):
        with pytest.raises(RuntimeError, match=f"on rank {rank} of communicator 'world' holds NaN"):
            call()
    dist.all_reduce(right)
    check.unregister()
    dist.destroy_process_group()
    return right.tolist()


def test_a_hook_that_refuses_a_call_of_torch_is_heard_and_nothing_is_sent(rank_pool: Pool) -> None:
    assert rank_pool(2).run(refusing_hook, backend=None) == [[2.0], [2.0]]


def ends(rank: int, world_size: int) -> list[str]:
    from hxcomm.torchcomms.device_mesh import _create_torchcomm_process_group

    comm = communicator("cpu")
    group = _create_torchcomm_process_group(comm, "mine")
    told = []
    with pytest.raises(ValueError, match="there is a process group 'mine' already"):
        _create_torchcomm_process_group(comm, "mine")
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=group)
    told.append(str(tensor.tolist()))
    comm.finalize()
    with pytest.raises(ValueError, match="it was finalized") as caught:
        dist.all_reduce(tensor, group=group)
    told.append(str(caught.value))
    again = communicator("cpu", "again")
    group = _create_torchcomm_process_group(again, "mine")  # the name is free: its communicator has ended
    dist.all_reduce(tensor, group=group)
    told.append(str(tensor.tolist()))
    dist.destroy_process_group(group)
    told.append(repr(again))
    return told


def test_a_group_ends_with_its_communicator_and_the_communicator_with_its_group(rank_pool: Pool) -> None:
    for told in rank_pool(2).run(ends, backend=None):
        assert told == [
            "[2.0, 2.0, 2.0]",
            "communicator 'world' cannot be used: it was finalized",
            "[4.0, 4.0, 4.0]",
            "TorchComm('again', backend 'hxcomm', cpu, it was finalized)",
        ]


def aborted(rank: int, world_size: int) -> str:
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    comm = communicator("cpu")
    init_device_mesh((comm,), ("world",))
    dist.barrier()
    with pytest.raises(dist.DistBackendError) as caught:
        pending = dist.irecv(torch.ones(3), src=1 - rank)
        if rank == 0:
            comm.abort()
        pending.wait()  # type: ignore[union-attr]
    dist.destroy_process_group()
    return type(caught.value).__name__


def test_abort_of_the_communicator_ends_the_calls_that_torch_made(rank_pool: Pool) -> None:
    assert rank_pool(2).run(aborted, backend=None) == ["AbortedError", "AbortedError"]


def splits(rank: int, world_size: int) -> tuple[int, int, list[float], str]:
    """split_group of the group itself, and new_group within its world, which makes an ordinary group."""
    from hxcomm.torchcomms import TorchComm
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    comm = communicator("cpu")
    mesh = init_device_mesh((comm,), ("world",))
    group = mesh.get_group("world")
    ranks = [0, 2] if rank != 1 else [1]
    part = group.split_group(ranks, group_name=f"part{ranks[0]}", opts=group._get_backend(torch.device("cpu")).options)
    wrapper = part._get_backend(torch.device("cpu"))
    assert isinstance(wrapper.get_comm(), TorchComm)
    tensor = torch.full((2,), float(rank + 1))
    part.allreduce([tensor]).wait()
    new = dist.new_group([0, 1])
    other = torch.ones(1)
    if rank < 2:
        dist.all_reduce(other, group=new)
        assert other.item() == 2
    backend = dist.get_backend(group)
    wrapper.get_comm().finalize()
    dist.destroy_process_group()
    return part.rank(), part.size(), tensor.tolist(), backend


def test_a_group_over_a_communicator_splits_and_new_groups_are_made_within_its_world(rank_pool: Pool) -> None:
    assert rank_pool(3).run(splits, backend=None) == [
        (0, 2, [4.0, 4.0], "torchcomm"),
        (0, 1, [2.0, 2.0], "torchcomm"),
        (1, 2, [4.0, 4.0], "torchcomm"),
    ]
