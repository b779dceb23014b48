"""Collectives of Python objects over a communicator.

An object travels as bytes: `torch.save` by default, plain pickle where TORCHCOMMS_SERIALIZATION=pickle. What arrives is
read with `torch.load(weights_only=True)` unless the caller says otherwise, so a peer cannot make this rank run code;
with `weights_only=False`, or pickle, it can: only for peers that are trusted. All of these block, and all ranks of the
communicator call the same one (of send and recv, the two that are meant). `timeout` is that of each message or
collective underneath. This module knows the communicator's methods and nothing below them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hxcomm import environment

if TYPE_CHECKING:
    from hxcomm.torchcomms.comm import TorchComm


def all_gather_object(
    comm: TorchComm, object_list: list[Any], obj: object, timeout: timedelta | None = None, weights_only: bool = True
) -> None:
    """object_list[r] becomes the object of rank r, on every rank.

    object_list has one place a rank. Raises ValueError where it has not, before anything is sent.
    """
    _expect_one_place_a_rank(comm, "object_list", object_list)
    sizes, packed = _sizes_and_padded(comm, obj, timeout)
    gathered = [torch.empty_like(packed) for _ in sizes]
    comm.all_gather(gathered, packed, async_op=False, timeout=timeout)
    object_list[:] = [_unpack(part[:size], weights_only) for part, size in zip(gathered, sizes, strict=True)]


def gather_object(
    comm: TorchComm,
    obj: object,
    root: int,
    object_gather_list: list[Any] | None = None,
    timeout: timedelta | None = None,
    weights_only: bool = True,
) -> None:
    """object_gather_list[r] becomes the object of rank r on rank `root`; the other ranks need no list."""
    at_root = comm.get_rank() == root
    if at_root:
        if object_gather_list is None:
            raise ValueError(f"rank {root} is the root of gather_object and gave no object_gather_list")
        _expect_one_place_a_rank(comm, "object_gather_list", object_gather_list)
    sizes, packed = _sizes_and_padded(comm, obj, timeout)
    gathered = [torch.empty_like(packed) for _ in sizes] if at_root else []
    comm.gather(gathered, packed, root=root, async_op=False, timeout=timeout)
    if object_gather_list is not None and at_root:
        object_gather_list[:] = [_unpack(part[:size], weights_only) for part, size in zip(gathered, sizes, strict=True)]


def send_object_list(comm: TorchComm, object_list: list[Any], dst: int, timeout: timedelta | None = None) -> None:
    """Sends the objects to rank `dst`, which calls recv_object_list with a list of as many places."""
    packed = [_pack(comm, obj) for obj in object_list]
    comm.send(_sizes(comm, packed), dst=dst, async_op=False, timeout=timeout)
    if packed:
        comm.send(torch.cat(packed), dst=dst, async_op=False, timeout=timeout)


def recv_object_list(
    comm: TorchComm, object_list: list[Any], src: int, timeout: timedelta | None = None, weights_only: bool = True
) -> None:
    """Fills object_list with the objects that rank `src` sends."""
    sizes = torch.empty(len(object_list), dtype=torch.int64, device=comm.get_device())
    comm.recv(sizes, src=src, async_op=False, timeout=timeout)
    if not object_list:
        return
    packed = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=comm.get_device())
    comm.recv(packed, src=src, async_op=False, timeout=timeout)
    object_list[:] = _unpack_all(packed, sizes, weights_only)


def broadcast_object_list(
    comm: TorchComm, object_list: list[Any], root: int, timeout: timedelta | None = None, weights_only: bool = True
) -> None:
    """object_list becomes that of rank `root` on every rank; it has as many places everywhere."""
    at_root = comm.get_rank() == root
    packed = [_pack(comm, obj) for obj in object_list] if at_root else []
    sizes = torch.empty(len(object_list), dtype=torch.int64, device=comm.get_device())
    if at_root:
        sizes = _sizes(comm, packed)
    comm.broadcast(sizes, root=root, async_op=False, timeout=timeout)
    if not object_list:
        return
    together = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=comm.get_device())
    if at_root:
        together = torch.cat(packed)
    comm.broadcast(together, root=root, async_op=False, timeout=timeout)
    if not at_root:
        object_list[:] = _unpack_all(together, sizes, weights_only)


def scatter_object_list(
    comm: TorchComm,
    root: int,
    scatter_object_output_list: list[Any],
    scatter_object_input_list: list[Any] | None = None,
    timeout: timedelta | None = None,
    weights_only: bool = True,
) -> None:
    """scatter_object_output_list[0] becomes the object that rank `root` has for this rank.

    At the root scatter_object_input_list has one object a rank; elsewhere it is not looked at.
    """
    if not isinstance(scatter_object_output_list, list) or not scatter_object_output_list:
        raise ValueError("scatter_object_output_list must be a list with at least one place")
    at_root = comm.get_rank() == root
    packed: list[Tensor] = []
    if at_root:
        if scatter_object_input_list is None:
            raise ValueError(f"rank {root} is the root of scatter_object_list and gave no scatter_object_input_list")
        _expect_one_place_a_rank(comm, "scatter_object_input_list", scatter_object_input_list)
        packed = [_pack(comm, obj) for obj in scatter_object_input_list]
    # All sizes to all ranks: one message fewer than the longest to all and each rank's own to it.
    sizes = (
        _sizes(comm, packed) if at_root else torch.empty(comm.get_size(), dtype=torch.int64, device=comm.get_device())
    )
    comm.broadcast(sizes, root=root, async_op=False, timeout=timeout)
    longest = int(sizes.max())
    own = torch.empty(longest, dtype=torch.uint8, device=comm.get_device())
    comm.scatter(own, [_padded(each, longest) for each in packed], root=root, async_op=False, timeout=timeout)
    scatter_object_output_list[0] = _unpack(own[: int(sizes[comm.get_rank()])], weights_only)


def _expect_one_place_a_rank(comm: TorchComm, name: str, given: Sequence[Any]) -> None:
    if len(given) != comm.get_size():
        raise ValueError(f"{name} has {len(given)} places, and {comm.get_name()} has {comm.get_size()} ranks")


def _pack(comm: TorchComm, obj: object) -> Tensor:
    buffer = io.BytesIO()
    if environment.pickles_objects():
        pickle.dump(obj, buffer)
    else:
        torch.save(obj, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8).to(comm.get_device())


def _unpack(packed: Tensor, weights_only: bool) -> object:
    buffer = io.BytesIO(packed.cpu().numpy().tobytes())
    if environment.pickles_objects():
        return pickle.load(buffer)
    found: object = torch.load(buffer, weights_only=weights_only)
    return found


def _unpack_all(packed: Tensor, sizes: Tensor, weights_only: bool) -> list[object]:
    return [_unpack(part, weights_only) for part in torch.split(packed, sizes.tolist())]


def _sizes(comm: TorchComm, packed: list[Tensor]) -> Tensor:
    return torch.tensor([each.numel() for each in packed], dtype=torch.int64, device=comm.get_device())


def _padded(packed: Tensor, nbytes: int) -> Tensor:
    return torch.cat([packed, packed.new_zeros(nbytes - packed.numel())])


def _sizes_and_padded(comm: TorchComm, obj: object, timeout: timedelta | None) -> tuple[list[int], Tensor]:
    """How many bytes each rank's object has, and this rank's as long as the longest."""
    packed = _pack(comm, obj)
    sizes = torch.empty(comm.get_size(), dtype=torch.int64, device=comm.get_device())
    comm.all_gather_single(sizes, _sizes(comm, [packed]), async_op=False, timeout=timeout)
    found: list[int] = sizes.tolist()
    return found, _padded(packed, max(found))
