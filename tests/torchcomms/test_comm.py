"""What `hxcomm verify --api torchcomms` cannot see: which algorithm ran, how a process ends, where ranks come from."""

from __future__ import annotations

import inspect
import os
import re
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hxcomm
from hxcomm import torchcomms
from hxcomm.errors import InitError, PeerFailedError
from hxcomm.select import Hints, hint_number
from hxcomm.torchcomms import ReduceOp, hints, rendezvous
from hxcomm.torchcomms.operations import Operations

Run = Callable[..., list[Any]]
SUM = ReduceOp.SUM


def joined(name: str = "main", **more: Any) -> torchcomms.TorchComm:
    given: dict[str, Any] = {"abort_process_on_timeout_or_error": False, "timeout": timedelta(seconds=30), **more}
    return torchcomms.new_comm("hxcomm", "cpu", name=name, **given)


def algorithms_used(name: str) -> dict[str, int]:
    rows = [row for row in hxcomm.statistics() if row["group"] == name]
    return {f"{row['op']} {row['algorithm']}": row["calls"] for row in rows}


# --- hints ---


def hinted(rank: int, world_size: int) -> dict[str, dict[str, int]]:
    comm = joined()
    x = torch.ones(1000)
    comm.all_reduce(x, SUM, False, hints={"algorithm": "ring"})
    comm.all_reduce(x, SUM, False, hints={"algorithm": "all_reduce:one_shot,broadcast:binomial_tree"})
    comm.all_reduce(x, SUM, False)
    whole = joined("whole", hints={"algorithm": "all_reduce:ring"})
    whole.all_reduce(x, SUM, False)
    whole.broadcast(x, 0, False)
    whole.set_hints({})
    whole.all_reduce(x, SUM, False)
    used = {name: algorithms_used(name) for name in ("main", "whole")}
    whole.finalize()
    comm.finalize()
    return used


def test_hints_choose_the_algorithm_of_a_call_and_of_a_communicator(run_ranks: Run) -> None:
    for used in run_ranks(hinted, 2, backend=None):
        assert used["main"] == {"all_reduce ring": 1, "all_reduce one_shot": 1, "all_reduce two_shot": 1}
        assert used["whole"] == {"all_reduce ring": 1, "broadcast direct": 1, "all_reduce two_shot": 1}


def persistent_with_hints(rank: int, world_size: int) -> dict[str, int]:
    comm = joined()
    handle = comm.all_gather_p_init(torch.zeros(2 * world_size), hints={"algorithm": "ring"})
    comm.all_gather_p_exec(handle, torch.ones(2), False)
    comm.all_gather_p_exec(handle, torch.ones(2), False, hints={"algorithm": "direct"})
    used = algorithms_used("main")
    comm.finalize()
    return used


def test_hints_of_a_persistent_all_gather_hold_for_runs_that_give_none(run_ranks: Run) -> None:
    assert run_ranks(persistent_with_hints, 2, backend=None) == [{"all_gather ring": 1, "all_gather direct": 1}] * 2


def windows_by_hint(rank: int, world_size: int) -> list[int]:
    """How far the sequence of collectives goes for one call: one number for each window."""
    comm = joined()
    x = torch.ones(1 << 18)  # 1 MiB
    counts = []
    for chunk in (None, "64KiB", "1MiB"):
        before = comm._process_group._get_sequence_number_for_group()
        comm.all_reduce(x, SUM, False, hints=None if chunk is None else {"chunk": chunk})
        counts.append(comm._process_group._get_sequence_number_for_group() - before)
    comm.finalize()
    return counts


def test_a_chunk_hint_sets_the_window(run_ranks: Run) -> None:
    assert run_ranks(windows_by_hint, 2, backend=None) == [[4, 16, 1]] * 2


def different_hints(rank: int, world_size: int) -> str:
    comm = joined()
    x = torch.ones(1 << 18)
    with pytest.raises(hxcomm.MismatchError) as raised:
        comm.all_reduce(x, SUM, False, hints={"algorithm": ("ring", "two_shot")[rank]})
    comm.all_reduce(x, SUM, False)
    assert x[0] == world_size
    comm.finalize()
    return str(raised.value)


def test_ranks_whose_hints_choose_differently_raise_and_go_on(run_ranks: Run) -> None:
    for message in run_ranks(different_hints, 2, backend=None):
        assert "ring" in message and "two_shot" in message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chunks": "1"}, r"no hint 'chunks'; the hints are algorithm: .*; chunk: .*; determinism: "),
        ({"chunk": 65536}, r"hint chunk is 65536; hints are text"),
        ({"chunk": "lots"}, r"hint chunk is 'lots': not a size"),
        ({"determinism": "yes"}, r"hint determinism is 'yes'.*layout"),
        ({"algorithm": "all_redoce:ring"}, r"no op 'all_redoce'; the ops are: all_reduce"),
        ({"algorithm": "all_reduce:rang"}, r"all_reduce has no algorithm 'rang'; it has: .*ring"),
    ],
)
def test_a_wrong_hint_is_refused_with_what_there_is(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        hints.number_of(given)


def test_equal_hints_have_one_number_and_none_have_none() -> None:
    assert hints.number_of(None) == hints.number_of({}) == 0
    assert hints.number_of({"chunk": "64KiB"}) == hint_number(Hints(segment_bytes=65536)) > 0


# --- who is in it ---


def test_a_process_that_nobody_numbered_is_told_what_to_set() -> None:
    with pytest.raises(InitError, match="neither TORCHCOMM_RANK nor RANK is set; start the program with torchrun"):
        rendezvous.rank_and_size({})
    with pytest.raises(InitError, match="RANK is 'one', which is not a number"):
        rendezvous.rank_and_size({"RANK": "one", "WORLD_SIZE": "2"})
    with pytest.raises(InitError, match="rank 2 of a communicator of 2 ranks"):
        rendezvous.rank_and_size({"RANK": "2", "WORLD_SIZE": "2"})


def test_torchcomms_own_variables_win_over_the_launchers() -> None:
    launcher = {"RANK": "5", "WORLD_SIZE": "8"}
    assert rendezvous.rank_and_size(launcher) == (5, 8)
    assert rendezvous.rank_and_size({**launcher, "TORCHCOMM_RANK": "1", "TORCHCOMM_SIZE": "2"}) == (1, 2)


@pytest.mark.parametrize(
    ("backend", "device", "more", "error", "says"),
    [
        ("hxcomm", "meta", {}, ValueError, "serves devices cpu and hx, not meta"),
        ("hxcom", "cpu", {}, ModuleNotFoundError, "no backend 'hxcom': known are hxcomm"),
        ("hxcomm", "cpu", {"timeout": timedelta(0)}, ValueError, "a timeout of 0.0 s; it must be positive"),
        ("hxcomm", "cpu", {"hints": {"speed": "high"}}, ValueError, "no hint 'speed'"),
    ],
)
def test_new_comm_refuses_what_it_cannot_make(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, more: dict[str, Any], error: type[Exception], says: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(error, match=says):
        torchcomms.new_comm(backend, device, name="x", store=dist.HashStore(), **more)


def test_new_comm_without_a_store_says_which_variables_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InitError, match=r"no store: none was given, and MASTER_ADDR \(None\)"):
        torchcomms.new_comm("hxcomm", "cpu", name="x")


def test_a_store_that_comes_back_at_the_same_address_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port, wait = first.port, timedelta(seconds=20)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    rendezvous.store_for("x", None, 0, wait).set("job", "first")
    del first
    second = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store = rendezvous.store_for("x", None, 0, wait)
    assert not store.check(["job"])
    store.set("job", "second")
    assert store.get("job") == b"second"
    del store, second


def comm_and_process_group(rank: int, world_size: int) -> float:
    """Both front ends at once, each with a group of its own, over one store."""
    comm = joined(store=dist.distributed_c10d._get_default_store())
    x = torch.ones(10)
    works: list[Any] = [comm.all_reduce(x, SUM, True), dist.all_reduce(torch.ones(10), async_op=True)]
    for work in works if rank == 0 else reversed(works):
        work.wait()
    comm.finalize()
    return float(x[0])


def test_a_communicator_and_torch_distributed_share_process_and_store(run_ranks: Run) -> None:
    assert run_ranks(comm_and_process_group, 3) == [3.0] * 3


# --- how it ends ---


def killed_peer(rank: int, world_size: int, abort_process: bool) -> str:
    comm = joined(abort_process_on_timeout_or_error=abort_process)
    comm.register_abort_hook(lambda: print("the abort hook ran", flush=True))
    comm.barrier(False)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        comm.all_reduce(torch.ones(10), SUM, False)
    except PeerFailedError as error:
        assert comm.is_aborted()
        comm.finalize()
        return str(error)
    return "no error"


def test_by_default_a_dead_peer_ends_the_process_with_its_reason(run_ranks: Run) -> None:
    with pytest.raises(AssertionError) as shown:
        run_ranks(killed_peer, 2, True, backend=None, expect={1: signal.SIGKILL})
    text = str(shown.value)
    assert "SIGABRT" in text and "the abort hook ran" in text
    assert re.search(r"PeerFailedError: .*rank 1 .*was killed by SIGKILL", text)
    assert "abort_process_on_timeout_or_error=False) raises the error instead" in text


def test_where_asked_for_it_raises_and_the_process_lives(run_ranks: Run) -> None:
    survivor, _ = run_ranks(killed_peer, 2, False, backend=None, expect={1: signal.SIGKILL})
    assert re.search(r"rank 1 .*was killed by SIGKILL", survivor)


def dropped_then_finalized(rank: int, world_size: int) -> list[float]:
    comm = joined()
    outputs = [torch.zeros(100_000) for _ in range(5)]
    for number, output in enumerate(outputs):
        comm.all_reduce(output.fill_(number), SUM, True)
    comm.finalize()
    return [float(output[-1]) for output in outputs]


def test_finalize_ends_what_was_started_and_dropped(run_ranks: Run) -> None:
    assert run_ranks(dropped_then_finalized, 3, backend=None) == [[0.0, 3.0, 6.0, 9.0, 12.0]] * 3


# --- messages of a rank to itself ---


def to_itself(rank: int, world_size: int) -> str:
    comm = joined()
    x, y = torch.full((300_000,), 7.0), torch.zeros(300_000)
    received = comm.recv(y, rank, True)
    comm.send(x, rank, False)
    received.wait()
    assert torch.equal(x, y)
    with pytest.raises(ValueError) as alone:
        comm.send(x, rank, False)
    batch = comm.batch_op_create()
    batch.send(x, rank)
    with pytest.raises(ValueError, match="it sends itself messages"):
        batch.issue(False)
    comm.finalize()
    return str(alone.value)


def test_a_blocking_send_to_oneself_needs_a_receive_that_was_started(run_ranks: Run) -> None:
    for rank, message in enumerate(run_ranks(to_itself, 2, backend=None)):
        assert message.startswith(f"rank {rank} of 'main': a blocking send with itself, and no recv was started before")


# --- arguments of wrong types ---


def wrong_types(rank: int, world_size: int) -> list[str]:
    comm = joined()
    x = torch.ones(3)
    calls: list[Callable[[], Any]] = [
        lambda: comm.all_reduce(x, "sum", False),  # type: ignore[arg-type]
        lambda: comm.broadcast([1, 2], 0, False),  # type: ignore[arg-type]
        lambda: comm.all_reduce(x, SUM, False, timeout=5),  # type: ignore[arg-type]
        lambda: comm.all_reduce(x, SUM, False, hints="ring"),  # type: ignore[arg-type]
    ]
    said = []
    for call in calls:
        with pytest.raises(TypeError) as raised:
            call()
        said.append(str(raised.value))
    comm.all_reduce(x, SUM, False)
    assert x[0] == world_size
    comm.finalize()
    return said


def test_arguments_of_wrong_types_are_said_in_the_words_of_the_method(run_ranks: Run) -> None:
    for rank, said in enumerate(run_ranks(wrong_types, 2, backend=None)):
        operation, moving, timeout, hint = said
        assert operation.startswith("all_reduce takes (tensor: torch.Tensor, op: ReduceOp, async_op: bool")
        assert operation.endswith(f"and was called with (Tensor, str, bool) on rank {rank}")
        assert moving.startswith("broadcast takes (tensor: ") and "called with (list, int, bool)" in moving
        assert timeout == "a timeout is a datetime.timedelta, not 5"
        assert hint == "hints are a dict of text to text, not 'ring'"


# --- the shape of the API ---


def test_every_operation_ends_with_async_op_hints_and_timeout() -> None:
    for name in torchcomms.OpName.__members__:
        if name not in ("split", "new_window", "finalize"):
            parameters = inspect.signature(getattr(Operations, name)).parameters
            assert list(parameters)[-3:] == ["async_op", "hints", "timeout"], name
            assert parameters["async_op"].default is inspect.Parameter.empty


def test_the_package_offers_the_short_names() -> None:
    assert hxcomm.new_comm is torchcomms.new_comm and hxcomm.TorchComm is torchcomms.TorchComm
    assert hxcomm.ReduceOp is torchcomms.ReduceOp


def test_reduce_ops_know_their_type_and_compare_by_value() -> None:
    assert ReduceOp.SUM.type is torchcomms.RedOpType.SUM
    factor = torch.tensor(2.0)
    assert ReduceOp.PREMUL_SUM(2.0) == ReduceOp.PREMUL_SUM(2.0) != ReduceOp.PREMUL_SUM(3.0)
    assert ReduceOp.PREMUL_SUM(factor) == ReduceOp.PREMUL_SUM(factor) != ReduceOp.PREMUL_SUM(factor.clone())
    with pytest.raises(ValueError, match="takes a real number or a tensor of one element"):
        ReduceOp.PREMUL_SUM("2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a real tensor of one element, not a torch\.float32 tensor of 3"):
        ReduceOp.PREMUL_SUM(torch.ones(3))
