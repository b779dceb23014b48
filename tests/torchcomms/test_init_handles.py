"""What a caller of reconfigure can get wrong: handles come from other processes, so nothing in them is believed."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hxcomm.torchcomms as torchcomms

SUM = torchcomms.ReduceOp.SUM


def alone(name: str = "c", **options: Any) -> torchcomms.TorchComm:
    return torchcomms.new_comm("hxcomm", "cpu", name, store=dist.HashStore(), enable_reconfigure=True, **options)


def changed(handle: str, **fields: Any) -> str:
    return "hxcomm:" + json.dumps({**json.loads(handle[7:]), **fields}, separators=(",", ":"))


def test_handles_from_strangers_are_refused_and_nothing_is_used_up() -> None:
    comm, other = alone(), alone("d")
    own = comm.get_init_handle()
    fields = json.loads(own[7:])
    for wrong, why in [
        (5, "an init handle is text"),
        ("", "none of backend hxcomm"),
        ("gloo:0:1:127.0.0.1:29500", "none of backend hxcomm"),
        ("hxcomm:", "cannot be read"),
        ("hxcomm:" + "[" * 1000, "cannot be read"),
        ("hxcomm:" + "x" * 2000, "has 2007 characters"),
        ("hxcomm:[]", "does not have the fields"),
        ("hxcomm:{}", "does not have the fields"),
        (changed(own, more=1), "does not have the fields"),
        (changed(own, version=2), "is of version 2"),
        (changed(own, version=True), "its version cannot be"),
        (changed(own, pid=-1), "its pid cannot be"),
        (changed(own, pid=1.5), "its pid cannot be"),
        (changed(own, notes=1 << 60), "its notes cannot be"),
        (changed(own, address="/tmp/socket"), "its address cannot be"),
        (changed(own, process="00" * 17), "its process cannot be"),
        (changed(own, process=[]), "its process cannot be"),
        (changed(own, network=fields["network"] + "\n"), "its network cannot be"),
        (own.replace(":", ": ", 2), "is not written as"),
        (other.get_init_handle(), "is of communicator 'd'"),
    ]:
        with pytest.raises(ValueError, match=why):
            comm.reconfigure(1, [own, wrong])  # type: ignore[list-item]
    comm.reconfigure(1, [own]).wait()
    assert (comm.get_rank(), comm.get_size()) == (0, 1)


def test_wrong_calls_of_reconfigure_raise_and_leave_the_group_usable() -> None:
    comm, other = alone(), alone()
    own, foreign = comm.get_init_handle(), other.get_init_handle()
    comm.reconfigure(1, [own])
    with pytest.raises(ValueError, match="uuid 1 was used before"):
        comm.reconfigure(1, [own])
    with pytest.raises(ValueError, match=f"the handle of pid {os.getpid()} .* is given twice"):
        comm.reconfigure(2, [own, own])
    with pytest.raises(ValueError, match=r"this process's own handle .* is not among the 1 given"):
        comm.reconfigure(2, [foreign])
    with pytest.raises(ValueError, match="is not among the 0 given"):
        comm.reconfigure(2, [])
    for uuid in (1.0, True, "2", 1 << 63):
        with pytest.raises(ValueError, match="must be an int of 64 bits"):
            comm.reconfigure(uuid, [own])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a list of init handles"):
        comm.reconfigure(2, own)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 ms"):
        comm.reconfigure(2, [own], timedelta(0))
    with pytest.raises(ValueError, match="there is no hint 'quorum'"):
        comm.reconfigure(2, [own], hints={"quorum": "5"})
    tensor = torch.ones(3)
    comm.all_reduce(tensor, SUM, False)
    comm.reconfigure(-2, {own})
    assert comm.get_size() == 1 and tensor.tolist() == [1, 1, 1]


def test_before_reconfigure_and_after_finalize_there_is_no_group() -> None:
    comm = alone()
    assert (comm.get_rank(), comm.get_size(), comm.is_aborted()) == (-1, 0, False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"reconfigure|finalized"):
            comm.all_reduce(torch.ones(1), SUM, False)
        comm.finalize()
    with pytest.raises(ValueError, match="or is finalized"):
        comm.get_init_handle()
    with pytest.raises(ValueError, match="or is finalized"):
        comm.reconfigure(1, [])


def test_only_communicators_made_for_it_can_be_reconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="backend 'other' cannot be reconfigured"):
        torchcomms.new_comm("other", "cpu", "c", store=dist.HashStore(), enable_reconfigure=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    comm = torchcomms.new_comm("hxcomm", "cpu", "fixed", store=dist.HashStore())
    with pytest.raises(ValueError, match="without enable_reconfigure=True"):
        comm.get_init_handle()
    comm.finalize()
