"""Device meshes over communicators: shapes, names, sub-meshes, flattening, and models on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch.distributed.tensor import Shard, distribute_tensor

Pool = Callable[[int], RankPool]


def communicator(device: str, name: str = "world") -> Any:
    from hxcomm.torchcomms import new_comm

    return new_comm("hxcomm", device, name, abort_process_on_timeout_or_error=False)


def grid(comm: Any, *shape: int) -> tuple[Any, ...]:
    """One communicator for each dimension of that shape, named d0, d1, ..."""
    mesh = torch.arange(comm.get_size()).view(shape)
    own = (mesh == comm.get_rank()).nonzero()[0].tolist()
    parts = []
    for dimension in range(len(shape)):
        along: list[Any] = list(own)
        along[dimension] = slice(None)
        parts.append(comm.split(mesh[tuple(along)].tolist(), f"d{dimension}"))
    return tuple(parts)


def two_dimensions(rank: int, world_size: int, device: str) -> None:
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    comm = communicator(device)
    rows, columns = grid(comm, 2, 2)
    mesh = init_device_mesh((rows, columns), ("dp", "tp"), _global_comm=comm)
    assert mesh.shape == (2, 2)
    assert mesh.mesh_dim_names == ("dp", "tp")
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert mesh.get_coordinate() in ((rank // 2, rank % 2), [rank // 2, rank % 2])
    assert (dist.get_rank(), dist.get_world_size()) == (rank, 4)
    for name, part, ranks in (
        ("dp", rows, [rank % 2, rank % 2 + 2]),
        ("tp", columns, [rank // 2 * 2, rank // 2 * 2 + 1]),
    ):
        sub = mesh[name]
        group = sub.get_group()
        assert (sub.get_rank(), sub.size(), group.group_name) == (rank, part.get_size(), name)
        assert dist.get_process_group_ranks(group) == ranks
        assert group._get_backend(torch.device(device)).get_comm() is part
        tensor = torch.full((5,), float(rank), device=device)
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [float(sum(ranks))] * 5
    whole = torch.arange(24.0, device=device).view(4, 6)
    shared = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
    assert shared.to_local().tolist() == whole[rank // 2 * 2 :][:2, rank % 2 * 3 :][:, :3].tolist()
    assert shared.full_tensor().equal(whole)
    dist.destroy_process_group()
    for each in (comm, rows, columns):
        assert "finalized" in repr(each)


@pytest.mark.parametrize("device", ["cpu", "hx"])
def test_a_mesh_of_two_dimensions_communicates_along_each_by_its_communicator(rank_pool: Pool, device: str) -> None:
    rank_pool(4).run(two_dimensions, device, backend=None)


def flattened(rank: int, world_size: int) -> None:
    from hxcomm.torchcomms.device_mesh import _flatten_with_comm, init_device_mesh

    comm = communicator("cpu")
    mesh = init_device_mesh(grid(comm, 2, 1, 2), ("pp", "cp", "ep"), _global_comm=comm)
    sub = mesh["pp", "ep"]
    flat_comm = comm.split([0, 1, 2, 3], "pp_ep")
    flat = _flatten_with_comm(mesh, "pp_ep", flat_comm, [0, 1, 2, 3], sub._layout)
    assert (flat.size(), flat.get_rank(), flat.get_local_rank()) == (4, rank, rank)
    assert mesh["pp_ep"].get_group().group_name == "pp_ep"
    tensor = torch.tensor([rank])
    dist.all_reduce(tensor, group=mesh["pp_ep"].get_group())
    assert tensor.item() == 6
    assert distribute_tensor(torch.arange(4), flat, [Shard(0)]).full_tensor().tolist() == [0, 1, 2, 3]
    dist.destroy_process_group()


def test_dimensions_are_flattened_with_a_communicator_of_their_own(rank_pool: Pool) -> None:
    rank_pool(4).run(flattened, backend=None)


def trained(rank: int, world_size: int, device: str) -> None:
    """FSDP2 over one dimension and tensor parallel layers over the other; three steps, compared with ==."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from hxcomm.torchcomms.device_mesh import init_device_mesh
    from hxcomm.verify.models import STEP, Perceptron, backward, exact, rows_of

    torch.set_num_threads(1)
    comm = communicator(device)
    mesh = init_device_mesh(grid(comm, 2, 2), ("dp", "tp"), _global_comm=comm)
    alone: Any = exact(Perceptron(), torch.device(device))
    with torch.no_grad():
        for parameter in alone.parameters():
            if parameter.dim() == 1:  # torch adds a half of the bias on each of two ranks
                parameter.mul_(2)
    model: Any = copy.deepcopy(alone)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizers = [torch.optim.SGD(each.parameters(), lr=STEP) for each in (model, alone)]
    for step in range(3):
        inputs, factors = rows_of(step, rank // 2, torch.device(device))
        backward(model(inputs), factors * 2)  # FSDP2 averages over two
        for part in range(2):
            inputs, factors = rows_of(step, part, torch.device(device))
            backward(alone(inputs), factors)
        for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert ours.grad.full_tensor().equal(theirs.grad), f"gradient of {name} in step {step}"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.full_tensor().equal(theirs), f"{name} at the end"
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "hx"])
def test_sharded_data_and_tensor_parallel_training_on_a_mesh_is_that_of_one_process(
    rank_pool: Pool, device: str
) -> None:
    rank_pool(4).run(trained, device, backend=None, timeout_s=120)


def refused(rank: int, world_size: int) -> list[str]:
    from hxcomm.torchcomms.device_mesh import _flatten_with_comm, init_device_mesh

    comm = communicator("cpu")
    rows, columns = grid(comm, 2, 1)
    messages = []
    calls: list[tuple[type[Exception], Callable[[], Any]]] = [
        (ValueError, lambda: init_device_mesh((), ())),
        (ValueError, lambda: init_device_mesh((comm,), ("a", "b"))),
        (ValueError, lambda: init_device_mesh((rows, columns), ("a", "a"), _global_comm=comm)),
        (RuntimeError, lambda: init_device_mesh((rows, columns), ("a", "b"))),
        (ValueError, lambda: init_device_mesh((rows, rows), ("a", "b"), _global_comm=comm)),
    ]
    for kind, call in calls:
        with pytest.raises(kind) as caught:
            call()
        messages.append(str(caught.value))
    mesh = init_device_mesh((rows, columns), ("a", "b"), _global_comm=comm)
    with pytest.raises(ValueError) as caught:
        _flatten_with_comm(mesh, "c", comm, [0], mesh._layout)
    messages.append(str(caught.value))
    dist.destroy_process_group()
    return messages


def test_communicators_that_make_no_mesh_are_refused_with_the_numbers(rank_pool: Pool) -> None:
    for rank, messages in enumerate(rank_pool(2).run(refused, backend=None)):
        assert messages == [
            "0 communicators for 0 mesh dimensions",
            "1 communicators for 2 mesh dimensions",
            "mesh dimensions ('a', 'a') must have different names",
            "a mesh of 2 communicators needs one of all its ranks, too: pass it as _global_comm",
            f"_global_comm 'world' says rank {rank} of 2; the communicators of the dimensions make this rank "
            f"{3 * rank} of 4",
            "1 global ranks for 'world', which has 2",
        ]


def beside_a_default_group(rank: int, world_size: int) -> None:
    """A program that has called init_process_group keeps its default group."""
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    default = dist.group.WORLD
    comm = communicator("cpu")
    mesh = init_device_mesh((comm,), ("all",))
    assert dist.group.WORLD is default
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    dist.all_reduce(tensor, group=mesh.get_group())
    assert tensor.tolist() == [4.0, 4.0]
    dist.destroy_process_group(mesh.get_group())


def test_the_default_group_of_a_program_stays_beside_a_mesh(rank_pool: Pool) -> None:
    rank_pool(2).run(beside_a_default_group)


def reconfigured(rank: int, world_size: int) -> None:
    """The same communicator with another order of ranks: the old mesh refuses, a new one of the same name works."""
    from hxcomm.torchcomms import new_comm
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    comm = new_comm("hxcomm", "cpu", "moving", abort_process_on_timeout_or_error=False, enable_reconfigure=True)
    store: Any = comm.get_options().store
    store.set(f"handle/{rank}", comm.get_init_handle())
    handles = [store.get(f"handle/{each}").decode() for each in range(world_size)]
    comm.reconfigure(1, handles).wait()
    old = init_device_mesh((comm,), ("world",))
    dist.barrier()
    comm.reconfigure(2, handles[::-1]).wait()
    with pytest.raises(ValueError, match="was made before communicator 'moving' was reconfigured, which has 2 ranks"):
        dist.all_reduce(torch.ones(1), group=old.get_group())
    mesh = init_device_mesh((comm,), ("world",))
    assert (mesh.get_rank(), dist.get_rank()) == (1 - rank, 1 - rank)
    gathered = [torch.empty(1) for _ in range(world_size)]
    dist.all_gather(gathered, torch.tensor([float(rank)]))
    assert [each.item() for each in gathered] == [1.0, 0.0]
    dist.destroy_process_group()


def test_a_mesh_is_made_again_after_reconfigure(run_ranks: Callable[..., list[object]]) -> None:
    run_ranks(reconfigured, 2, backend=None)
