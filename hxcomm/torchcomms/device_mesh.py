"""DeviceMeshes and c10d process groups over communicators, so that DDP, FSDP2, DTensor and `dist.*` run on them.

A group is registered with torch.distributed under a name, as one that init_process_group or new_group makes: torch
finds it by name, destroy_process_group ends it (and the communicator), and dist.new_group inside it makes groups of
backend hxcomm over the communicator's store. Knows torch's bookkeeping of groups; it is torch 2.13's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, _unregister_process_group
from torch.distributed import distributed_c10d as c10d
from torch.distributed._mesh_layout import _MeshLayout
from torch.distributed.device_mesh import DeviceMesh

from hxcomm import c10d as backend
from hxcomm.torchcomms.backend_wrapper import Calls, _BackendWrapper

if TYPE_CHECKING:
    from hxcomm.torchcomms.comm import TorchComm

BACKEND = "torchcomm"


def init_device_mesh(
    mesh_dim_comms: tuple[TorchComm, ...], mesh_dim_names: tuple[str, ...], _global_comm: TorchComm | None = None
) -> DeviceMesh:
    """The mesh whose i-th dimension is the i-th communicator; its group has the dimension's name.

    Global ranks count the last dimension fastest: a rank is arange(sizes).view(sizes)[its ranks in the dimensions].
    _global_comm: a communicator of all ranks of the mesh, which becomes torch.distributed's default group; needed where
    there is more than one dimension. A default group that the program made itself stays the default.

    ValueError where communicators and names do not fit together, or a name is in use; RuntimeError where _global_comm
    is missing. Nothing is communicated.
    """
    if not mesh_dim_comms or len(mesh_dim_comms) != len(mesh_dim_names):
        raise ValueError(f"{len(mesh_dim_comms)} communicators for {len(mesh_dim_names)} mesh dimensions")
    if len(set(mesh_dim_names)) != len(mesh_dim_names):
        raise ValueError(f"mesh dimensions {mesh_dim_names} must have different names")
    if _global_comm is None and len(mesh_dim_comms) > 1:
        raise RuntimeError(
            f"a mesh of {len(mesh_dim_comms)} communicators needs one of all its ranks, too: pass it as _global_comm"
        )
    devices = {comm.get_device().type for comm in (*mesh_dim_comms, *([_global_comm] if _global_comm else []))}
    if len(devices) != 1:
        raise ValueError(f"the communicators of a mesh must be on one device, these are on {sorted(devices)}")
    shape = tuple(comm.get_size() for comm in mesh_dim_comms)
    mesh = torch.arange(math.prod(shape), dtype=torch.int).view(shape)
    coordinate = tuple(comm.get_rank() for comm in mesh_dim_comms)
    rank = int(mesh[coordinate])
    if _global_comm is not None and (_global_comm.get_rank(), _global_comm.get_size()) != (rank, mesh.numel()):
        raise ValueError(
            f"_global_comm '{_global_comm.get_name()}' says rank {_global_comm.get_rank()} of "
            f"{_global_comm.get_size()}; the communicators of the dimensions make this rank {rank} of {mesh.numel()}"
        )
    world = None
    if _global_comm is not None:
        world = _create_torchcomm_process_group(_global_comm, _global_comm.get_name())
    groups = []
    for dimension, (comm, name) in enumerate(zip(mesh_dim_comms, mesh_dim_names, strict=True)):
        along = list(coordinate)
        along[dimension] = slice(None)  # type: ignore[call-overload]
        ranks = mesh[tuple(along)].tolist()
        groups.append(_create_torchcomm_process_group(comm, name, BACKEND, {each: i for i, each in enumerate(ranks)}))
    _become_default(world or groups[0], rank, mesh.numel())
    return DeviceMesh.from_group(groups, devices.pop(), mesh=mesh, mesh_dim_names=mesh_dim_names)


def _flatten_with_comm(
    mesh: DeviceMesh, mesh_dim_name: str, comm: TorchComm, global_ranks: list[int], layout: Any
) -> DeviceMesh:
    """Several dimensions of a mesh as one, with a communicator of its own; mesh[mesh_dim_name] then gives it.

    global_ranks: those of the communicator, in its order. layout: of the dimensions in the mesh (its _layout). The name
    is torchcomms', which has no public one.
    """
    if len(global_ranks) != comm.get_size():
        raise ValueError(f"{len(global_ranks)} global ranks for '{comm.get_name()}', which has {comm.get_size()}")
    root = mesh._get_root_mesh()
    group = _create_torchcomm_process_group(
        comm, mesh_dim_name, BACKEND, {rank: i for i, rank in enumerate(global_ranks)}
    )
    flat = DeviceMesh(
        comm.get_device().type,
        mesh_dim_names=(mesh_dim_name,),
        _init_backend=False,
        _rank=root.get_rank(),
        _layout=_MeshLayout([layout.collapse()]),
        _rank_map=root._rank_map,
        _root_mesh=root,
    )
    flat._dim_group_names = [group.group_name]
    root._pg_registry[group.group_name] = group
    root._flatten_mapping[mesh_dim_name] = flat
    return flat


def _create_torchcomm_process_group(
    comm: TorchComm, group_name: str, backend_str: str = BACKEND, global_ranks_mapping: dict[int, int] | None = None
) -> dist.ProcessGroup:
    """The process group of a communicator, registered with torch.distributed under group_name.

    global_ranks_mapping: global rank -> rank in the group; None: they are the same. ValueError where a group that is in
    use has the name. The name is torchcomms'; programs use it where they need a group without a mesh.
    """
    _register_backend(backend_str)
    _free(group_name)
    name = c10d.GroupName(group_name)
    store = comm.get_options().store or HashStore()
    group = dist.ProcessGroup(store, comm.get_rank(), comm.get_size())
    kind = dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    group._register_backend(comm.get_device(), kind, _BackendWrapper(comm))
    group._set_group_name(name)
    group._set_group_desc(f"communicator {comm.get_name()}")
    c10d._register_pg_in_world(
        group,
        backend_name=backend_str,
        store=store,
        group_name=name,
        backend_config=f"{comm.get_device().type}:{backend_str}",
        rank_mapping=global_ranks_mapping or {rank: rank for rank in range(comm.get_size())},
    )
    return group


def _register_backend(name: str) -> None:
    """So that torch knows the name, and dist.new_group inside such a group makes one of backend hxcomm."""
    if hasattr(dist.Backend, name.upper()):
        return
    default = dict(dist.Backend.default_device_backend_map)
    devices = ["cpu", "hx"] if hasattr(torch, "hx") else ["cpu"]
    dist.Backend.register_backend(name, backend._create, extended_api=True, devices=devices)
    dist.Backend.default_device_backend_map.update(default)  # a program that names no backend gets what it got before


def _free(name: str) -> None:
    """Forgets a group of that name whose communicator has ended, or has other ranks by now."""
    world = c10d._world
    for group in [group for group, known in world.pg_names.items() if known == name]:
        calls = _calls_of(group)
        if calls is None or calls.is_current:
            raise ValueError(f"there is a process group '{name}' already; destroy it, or choose another name")
        # Not destroy_process_group: it ends the communicator, which may live on after reconfigure().
        if world.default_pg is group:
            c10d._update_default_pg(None)
        for known in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config):
            del known[group]
        world.tags_to_pg[world.pg_to_tag.pop(group)].remove(group)
        _unregister_process_group(group.group_name)


def _calls_of(group: dist.ProcessGroup) -> Calls | None:
    """None where the group is not over a communicator."""
    for device in group._device_types:
        calls = getattr(group._get_backend(device), "calls", None)
        if isinstance(calls, Calls):
            return calls
    return None


def _become_default(group: dist.ProcessGroup, rank: int, size: int) -> None:
    """A default group that is not over a communicator stays: it is the program's own. ValueError where it is another
    set of ranks."""
    current = c10d._world.default_pg
    if current is None or _calls_of(current) is not None:
        c10d._update_default_pg(group)
    elif (current.rank(), current.size()) != (rank, size):
        raise ValueError(
            f"the default process group says rank {current.rank()} of {current.size()}, the mesh rank {rank} of {size}"
        )
