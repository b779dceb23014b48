"""Object collectives: Python objects over a communicator, on CPU and on the chip."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import RankPool

Pool = Callable[[int], RankPool]
OBJECTS = ["foo", 12, {"one": [2, None]}, torch.arange(3)]


def made(device: str) -> Any:
    from hxcomm.torchcomms import new_comm

    return new_comm("hxcomm", device, "objects", abort_process_on_timeout_or_error=False)


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        one.cpu().equal(other) if isinstance(other, torch.Tensor) else one == other
        for one, other in zip(found, expected, strict=True)
    )


def gathers(rank: int, world_size: int, device: str) -> tuple[bool, ...]:
    from hxcomm.torchcomms import objcol

    comm, expected = made(device), OBJECTS[:world_size]
    everywhere: list[Any] = [None] * world_size
    objcol.all_gather_object(comm, everywhere, OBJECTS[rank])
    at_root: list[Any] = ["untouched"] * world_size
    objcol.gather_object(comm, OBJECTS[rank], root=world_size - 1, object_gather_list=at_root)
    last = rank == world_size - 1
    comm.finalize()
    return same(everywhere, expected), same(at_root, expected if last else ["untouched"] * world_size)


def spreads(rank: int, world_size: int, device: str) -> tuple[bool, ...]:
    from hxcomm.torchcomms import objcol

    comm = made(device)
    listed = list(OBJECTS) if rank == 1 else [None] * len(OBJECTS)
    objcol.broadcast_object_list(comm, listed, root=1)
    empty: list[Any] = []
    objcol.broadcast_object_list(comm, empty, root=0)
    own: list[Any] = [None, "kept"]
    objcol.scatter_object_list(comm, 0, own, OBJECTS[:world_size] if rank == 0 else None)
    comm.finalize()
    return same(listed, OBJECTS), empty == [], same(own, [OBJECTS[rank], "kept"])


def passes_on(rank: int, world_size: int, device: str) -> bool:
    """Rank 0 sends to the last one."""
    from hxcomm.torchcomms import objcol

    comm = made(device)
    listed: list[Any] = [None] * len(OBJECTS)
    if rank == 0:
        objcol.send_object_list(comm, list(OBJECTS), dst=world_size - 1)
    if rank == world_size - 1:
        objcol.recv_object_list(comm, listed, src=0)
    comm.finalize()
    return rank != world_size - 1 or same(listed, OBJECTS)


@pytest.mark.parametrize("device", ["cpu", "hx"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_objects_are_gathered_everywhere_and_at_the_root(rank_pool: Pool, world_size: int, device: str) -> None:
    assert rank_pool(world_size).run(gathers, device, backend=None) == [(True, True)] * world_size


@pytest.mark.parametrize("device", ["cpu", "hx"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_lists_of_objects_are_broadcast_and_scattered(rank_pool: Pool, world_size: int, device: str) -> None:
    assert rank_pool(world_size).run(spreads, device, backend=None) == [(True, True, True)] * world_size


@pytest.mark.parametrize("device", ["cpu", "hx"])
def test_lists_of_objects_are_sent_and_received(rank_pool: Pool, device: str) -> None:
    assert rank_pool(3).run(passes_on, device, backend=None) == [True] * 3


def wrong_calls(rank: int, world_size: int) -> list[str]:
    from hxcomm.torchcomms import objcol

    comm, messages = made("cpu"), []
    for call in (
        lambda: objcol.all_gather_object(comm, [None], "x"),
        lambda: objcol.gather_object(comm, "x", root=rank),
        lambda: objcol.scatter_object_list(comm, rank, [], ["x"] * world_size),
        lambda: objcol.scatter_object_list(comm, rank, [None]),
        lambda: objcol.scatter_object_list(comm, rank, [None], ["x"]),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    after: list[Any] = [None] * world_size
    objcol.all_gather_object(comm, after, rank)
    assert after == list(range(world_size))
    comm.finalize()
    return messages


def test_lists_of_wrong_lengths_are_named_before_anything_is_sent(rank_pool: Pool) -> None:
    for rank, messages in enumerate(rank_pool(2).run(wrong_calls, backend=None)):
        assert messages == [
            "object_list has 1 places, and objects has 2 ranks",
            f"rank {rank} is the root of gather_object and gave no object_gather_list",
            "scatter_object_output_list must be a list with at least one place",
            f"rank {rank} is the root of scatter_object_list and gave no scatter_object_input_list",
            "scatter_object_input_list has 1 places, and objects has 2 ranks",
        ]


class Unknown:
    """Not among what torch.load(weights_only=True) makes."""


def sends_code(rank: int, world_size: int) -> list[str]:
    """Rank 0's object is read by others in each way. What is refused is refused where it arrives, after it was sent."""
    from hxcomm.torchcomms import objcol

    comm = made("cpu")
    calls: dict[str, Callable[[list[Any], bool], Any]] = {
        "all_gather": lambda into, safe: objcol.all_gather_object(comm, into, Unknown(), weights_only=safe),
        "gather": lambda into, safe: objcol.gather_object(comm, Unknown(), 1, into, weights_only=safe),
        "broadcast": lambda into, safe: objcol.broadcast_object_list(comm, into, 0, weights_only=safe),
        "scatter": lambda into, safe: objcol.scatter_object_list(
            comm, 0, into, [Unknown()] * 2 if rank == 0 else None, weights_only=safe
        ),
        "recv": lambda into, safe: (
            objcol.send_object_list(comm, into, 1)
            if rank == 0
            else objcol.recv_object_list(comm, into, 0, weights_only=safe)
        ),
    }
    refused = []
    for name, call in calls.items():
        into: list[Any] = [Unknown() if rank == 0 else None, Unknown()]
        try:
            call(into, True)
        except pickle.UnpicklingError as error:
            assert "Unknown" in str(error)
            refused.append(name)
        into = [Unknown() if rank == 0 else None, Unknown()]
        call(into, False)
        assert isinstance(into[0], Unknown)
    comm.finalize()
    return refused


def test_an_object_that_could_run_code_is_refused_unless_the_caller_trusts_the_peers(rank_pool: Pool) -> None:
    assert rank_pool(2).run(sends_code, backend=None) == [
        ["all_gather", "scatter"],
        ["all_gather", "gather", "broadcast", "scatter", "recv"],
    ]


def with_pickle(rank: int, world_size: int) -> bool:
    from hxcomm.torchcomms import objcol

    comm = made("cpu")
    everywhere: list[Any] = [None] * world_size
    objcol.all_gather_object(comm, everywhere, {rank: OBJECTS[rank]})
    comm.finalize()
    return everywhere == [{0: "foo"}, {1: 12}]


def test_the_environment_chooses_pickle(rank_pool: Pool) -> None:
    outcomes = rank_pool(2).run(with_pickle, backend=None, env={"TORCHCOMMS_SERIALIZATION": "pickle"})
    assert outcomes == [True, True]
