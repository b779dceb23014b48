"""The recorder's dumps hold what happened, and torch's own tool reads them and finds what went wrong."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_calls import SilentComm, analysed

from hxcomm.torchcomms.hook_args import OpName
from hxcomm.torchcomms.hooks import FlightRecorderHook
from hxcomm.torchcomms.work import TorchWork, WorkStatus

SIZE = 3


def recorded(rank: int, calls: Callable[[SilentComm, int], None], size: int = SIZE) -> dict[str, Any]:
    """The dump of one rank that made these calls."""
    comm, recorder = SilentComm(rank, size), FlightRecorderHook(isolated=True)
    recorder.register_with_comm(comm)
    calls(comm, rank)
    return recorder._recorder.dump(include_completed=True)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def every_operation(comm: SilentComm, rank: int) -> None:
    """Each operation once, rightly, with sizes of their own for each rank wherever that is allowed."""
    root = 1
    each = [tensor(2, 3) for _ in range(SIZE)]
    uneven = [tensor(index + 1) for index in range(SIZE)]
    comm.call(OpName.all_reduce, tensor(4))
    comm.call(OpName.broadcast, tensor(5), root)
    comm.call(OpName.reduce, tensor(5), root)
    comm.call(OpName.all_gather, tensor(2, 3), each)
    comm.call(OpName.all_gather_v, uneven[rank], uneven)
    comm.call(OpName.all_gather_single, tensor(2), tensor(2 * SIZE))
    comm.call(OpName.reduce_scatter, each, tensor(2, 3))
    comm.call(OpName.reduce_scatter_v, uneven, uneven[rank])
    comm.call(OpName.reduce_scatter_single, tensor(2 * SIZE), tensor(2))
    comm.call(OpName.all_to_all_single, tensor(SIZE), tensor(SIZE))
    comm.call(OpName.all_to_all_v_single, tensor(SIZE * (rank + 1)), tensor(1 + 2 + 3))
    comm.call(OpName.all_to_all, [tensor(rank + 1) for _ in range(SIZE)], uneven)
    comm.call(OpName.barrier)
    comm.call(OpName.scatter, tensor(2, 3), each if rank == root else [], root)
    comm.call(OpName.gather, tensor(2, 3), each if rank == root else [], root)
    comm.call(OpName.gather_single, tensor(2), tensor(2 * SIZE if rank == root else 0), root)
    comm.call(OpName.new_window, result=None)


def test_fr_trace_finds_nothing_wrong_with_any_operation_rightly_called(tmp_path: Path) -> None:
    database, printed = analysed([recorded(rank, every_operation) for rank in range(SIZE)], tmp_path)
    assert [each.pass_check for each in database.collectives] == [True] * 17, printed
    names = [each.collective_name.removeprefix("gloo:") for each in database.collectives]
    known_as = {"gather_single": "gather", "all_to_all_v_single": "all_to_all"}
    called = {op.name for op in OpName} - {"send", "recv", "split", "finalize"}
    assert sorted(names) == sorted(known_as.get(name, name) for name in called)
    assert [each.collective_seq_id for each in database.collectives] == list(range(1, 18))
    assert [(group.desc, group.size) for group in database.groups] == [("hxcomm", SIZE)]


def test_fr_trace_pairs_messages_in_both_directions_between_collectives_and_in_any_order(tmp_path: Path) -> None:
    def calls(comm: SilentComm, rank: int) -> None:
        comm.call(OpName.all_reduce, tensor(4))
        if rank == 0:
            comm.call(OpName.send, tensor(7), 1)
            comm.call(OpName.recv, tensor(5), 1)
            comm.call(OpName.send, tensor(3), 1)
            comm.call(OpName.recv, tensor(2), 2)
        elif rank == 1:
            comm.call(OpName.send, tensor(5), 0)
            comm.call(OpName.recv, tensor(7), 0)
            comm.call(OpName.recv, tensor(3), 0)
        else:
            comm.call(OpName.send, tensor(2), 0)
        comm.call(OpName.all_reduce, tensor(4))

    database, printed = analysed([recorded(rank, calls) for rank in range(SIZE)], tmp_path)
    assert [each.pass_check for each in database.collectives] == [True] * 6, printed
    messages = sorted(
        (each.group_id, each.input_sizes or each.output_sizes)
        for each in database.collectives
        if each.group_id != "world"
    )
    assert messages == [("world:0-1", [[3]]), ("world:0-1", [[5]]), ("world:0-1", [[7]]), ("world:0-2", [[2]])]


def test_fr_trace_takes_messages_of_a_rank_to_itself(tmp_path: Path) -> None:
    def calls(comm: SilentComm, rank: int) -> None:
        comm.call(OpName.send, tensor(2), rank)
        comm.call(OpName.recv, tensor(2), rank)
        comm.call(OpName.barrier)

    database, printed = analysed([recorded(rank, calls, size=2) for rank in range(2)], tmp_path)
    assert [each.pass_check for each in database.collectives] == [True] * 5, printed


def test_fr_trace_names_the_rank_that_did_not_come(tmp_path: Path) -> None:
    def calls(comm: SilentComm, rank: int) -> None:
        comm.call(OpName.all_reduce, tensor(4))
        if rank != 2:
            comm.call(OpName.broadcast, tensor(4), 0)

    database, printed = analysed([recorded(rank, calls) for rank in range(SIZE)], tmp_path)
    assert [each.missing_ranks for each in database.collectives if not each.pass_check or each.missing_ranks] == [{2}]
    assert "Not all ranks joining collective, sequence number: 2" in printed
    assert "group info: world:hxcomm" in printed and "collective: gloo:broadcast" in printed
    assert f"calls at {__file__}" in printed


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda comm: comm.call(OpName.all_reduce, tensor(5)), "Culprit rank 1; Error type: SIZE_OR_SYNTAX_MISMATCH"),
        (lambda comm: comm.call(OpName.barrier), "Culprit rank 1; Error type: COLLECTIVE_TYPE_MISMATCH"),
        (
            lambda comm: comm.call(OpName.all_reduce, tensor(4, dtype=torch.int64)),
            "Culprit rank 1; Error type: COLLECTIVE_DTYPE_MISMATCH",
        ),
    ],
    ids=["size", "operation", "dtype"],
)
def test_fr_trace_names_the_rank_that_called_something_else(
    tmp_path: Path, wrong: Callable[[SilentComm], None], said: str
) -> None:
    def calls(comm: SilentComm, rank: int) -> None:
        comm.call(OpName.barrier)
        if rank == 1:
            wrong(comm)
        else:
            comm.call(OpName.all_reduce, tensor(4))

    _database, printed = analysed([recorded(rank, calls) for rank in range(SIZE)], tmp_path)
    assert said in printed and "Collective sequence number: 2 has errors" in printed


def test_communicators_split_from_a_recorded_one_are_recorded_under_the_ranks_of_the_first(tmp_path: Path) -> None:
    def calls(comm: SilentComm, rank: int) -> None:
        members = [2, 0]
        if rank in members:  # the others need not call it
            child = SilentComm(members.index(rank), 2, "pair")
            comm.call(OpName.split, members, "pair", result=child)
            child.call(OpName.all_reduce, tensor(4))
            child.call(*((OpName.send, tensor(3), 1) if rank == 2 else (OpName.recv, tensor(3), 0)))
        comm.call(OpName.barrier)

    dumps = [recorded(rank, calls) for rank in range(SIZE)]
    assert {name: config["ranks"] for name, config in dumps[0]["pg_config"].items()} == {
        "world": "[0,1,2]",
        "pair": "[2,0]",
        "pair:0-2": "[0,2]",
    }
    database, printed = analysed(dumps, tmp_path)
    assert [each.pass_check for each in database.collectives] == [True] * 4, printed


def test_a_group_that_comes_back_goes_on_counting_and_another_of_its_name_is_told_apart() -> None:
    comm, recorder = SilentComm(0, SIZE), FlightRecorderHook(isolated=True)
    recorder.register_with_comm(comm)
    for members in ([0, 1], [0, 1], [0, 2]):
        comm.call(OpName.split, members, "pair", result=SilentComm(0, 2, "pair"))
    assert [(e["process_group"][0], e["collective_seq_id"]) for e in entries_of(recorder)] == [
        ("pair", 1),
        ("pair", 2),
        ("pair:[0,2]", 1),
    ]


class Handle:
    """A backend's handle of an operation that ends when told to."""

    def __init__(self) -> None:
        self.done = False

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.done = True


def entries_of(recorder: FlightRecorderHook, include_completed: bool = True) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(recorder.dump_json(include_completed))["entries"]
    return entries


@pytest.fixture
def recorder_and_comm() -> tuple[FlightRecorderHook, SilentComm]:
    comm, recorder = SilentComm(0, 2), FlightRecorderHook(max_entries=4, isolated=True)
    recorder.register_with_comm(comm)
    return recorder, comm


def test_an_entry_follows_its_operation_also_where_the_program_dropped_the_work(
    recorder_and_comm: tuple[FlightRecorderHook, SilentComm],
) -> None:
    recorder, comm = recorder_and_comm
    handle = Handle()
    comm.call(OpName.all_reduce, tensor(2, 3), work=TorchWork(handle))
    (entry,) = entries_of(recorder)
    assert (entry["state"], entry["status"], entry["retired"]) == ("started", "INPROGRESS", False)
    assert "duration_ms" not in entry and entries_of(recorder, include_completed=False) == [entry]
    handle.done = True
    (entry,) = entries_of(recorder)
    assert (entry["state"], entry["status"], entry["retired"]) == ("completed", "COMPLETED", True)
    assert entry["duration_ms"] >= 0 and entries_of(recorder, include_completed=False) == []


def test_an_operation_that_failed_is_retired_without_being_completed(
    recorder_and_comm: tuple[FlightRecorderHook, SilentComm],
) -> None:
    recorder, comm = recorder_and_comm
    work = TorchWork(Handle())
    comm.call(OpName.all_reduce, tensor(1), work=work)
    work._set_status(WorkStatus.TIMEDOUT)
    (entry,) = entries_of(recorder, include_completed=False)
    assert (entry["state"], entry["status"], entry["retired"]) == ("started", "TIMEDOUT", True)


def test_an_operation_that_did_not_start_stays_scheduled(
    recorder_and_comm: tuple[FlightRecorderHook, SilentComm],
) -> None:
    recorder, comm = recorder_and_comm

    def refuse(*_: object) -> None:
        raise ValueError("no")

    comm.register_pre_hook(refuse)
    with pytest.raises(ValueError, match="no"):
        comm.call(OpName.all_reduce, tensor(1))
    assert [entry["state"] for entry in entries_of(recorder)] == ["scheduled"]


def test_works_are_let_go_once_they_have_ended(recorder_and_comm: tuple[FlightRecorderHook, SilentComm]) -> None:
    recorder, comm = recorder_and_comm
    handle = Handle()
    comm.call(OpName.all_reduce, tensor(1), work=TorchWork(handle))
    assert len(recorder._recorder.running) == 1
    handle.done = True
    comm.call(OpName.all_reduce, tensor(1))
    assert len(recorder._recorder.running) == 0
    assert [entry.work for entry in recorder._recorder.entries] == [None, None]


def test_the_oldest_entries_make_room_and_record_ids_go_on(
    recorder_and_comm: tuple[FlightRecorderHook, SilentComm],
) -> None:
    recorder, comm = recorder_and_comm
    for _ in range(6):
        comm.call(OpName.barrier)
    assert recorder.size() == len(recorder) == 4
    assert [(e["record_id"], e["collective_seq_id"], e["op_id"]) for e in entries_of(recorder)] == [
        (2, 3, 2),
        (3, 4, 3),
        (4, 5, 4),
        (5, 6, 5),
    ]
    recorder.reset()
    assert recorder.size() == 0 and entries_of(recorder) == []
    comm.call(OpName.barrier)
    assert [(e["record_id"], e["collective_seq_id"]) for e in entries_of(recorder)] == [(0, 1)]


def test_an_entry_has_every_field_of_the_format_and_ours(
    recorder_and_comm: tuple[FlightRecorderHook, SilentComm],
) -> None:
    recorder, comm = recorder_and_comm
    comm.call(OpName.all_gather, tensor(2, 3, dtype=torch.bfloat16), [tensor(2, 3, dtype=torch.bfloat16)] * 2)
    dump = json.loads(recorder.dump_json())
    assert dump["version"] == "2.10" and re.fullmatch(r"hxcomm \d+\.\d+\.\d+", dump["comm_lib_version"])
    assert dump["pg_config"] == {"world": {"name": "world", "desc": "hxcomm", "ranks": "[0,1]"}}
    assert dump["pg_status"] == {
        "0": {"last_enqueued_collective": 1, "last_started_collective": 1, "last_completed_collective": 1}
    }
    (entry,) = dump["entries"]
    told = {name: entry[name] for name in entry if not name.startswith(("time_", "thread_", "duration", "frames"))}
    assert told == {
        "record_id": 0,
        "pg_id": 0,
        "process_group": ["world", "hxcomm"],
        "collective_seq_id": 1,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "op_id": 0,
        "profiling_name": "gloo:all_gather",
        "backend": "hxcomm",
        "operation": "all_gather",
        "input_sizes": [[2, 3]],
        "input_dtypes": ["BFloat16"],
        "output_sizes": [[2, 2, 3]],
        "output_dtypes": ["BFloat16", "BFloat16"],
        "state": "completed",
        "status": "COMPLETED",
        "retired": True,
        "timeout_ms": 600_000,
    }
    # The stack begins where the program called, not inside this package.
    assert [Path(frame["filename"]).name for frame in entry["frames"][:2]] == ["recorded_calls.py", Path(__file__).name]
    assert entry["time_created_ns"] <= entry["time_discovered_started_ns"] <= entry["time_discovered_completed_ns"]


def test_the_file_is_where_torchcomms_programs_look_for_it(
    recorder_and_comm: tuple[FlightRecorderHook, SilentComm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, comm = recorder_and_comm
    comm.call(OpName.barrier)
    monkeypatch.setenv("TORCHCOMM_FR_DUMP_TEMP_FILE", str(tmp_path / "deep" / "trace_"))
    assert recorder.dump_file(5) == str(tmp_path / "deep" / "trace_5")
    assert pickle.loads((tmp_path / "deep" / "trace_5").read_bytes())["entries"][0]["operation"] == "barrier"
    monkeypatch.setenv("TORCHCOMM_FR_DUMP_DYNAMIC_FILE_NAME", "1")
    assert recorder.dump_file(5) == str(tmp_path / "deep" / "trace_")
    monkeypatch.delenv("TORCHCOMM_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recorder.dump_file(0) == str(tmp_path / "torch" / "comm_lib_trace_rank_0")


def test_an_abort_writes_the_file(
    recorder_and_comm: tuple[FlightRecorderHook, SilentComm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, comm = recorder_and_comm
    monkeypatch.setenv("TORCHCOMM_FR_DUMP_TEMP_FILE", str(tmp_path / "trace_"))
    comm.call(OpName.barrier)
    comm.hooks.abort()
    assert len(pickle.loads((tmp_path / "trace_0").read_bytes())["entries"]) == 1
    recorder.unregister()
    (tmp_path / "trace_0").unlink()
    comm.hooks.abort()
    assert not (tmp_path / "trace_0").exists() and not recorder.is_enabled()


@pytest.fixture
def no_shared_recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("hxcomm.torchcomms.hooks.flight_recorder._shared", None)
    yield


def test_recorders_share_their_entries_unless_isolated(no_shared_recorder: None) -> None:
    first, second, alone = FlightRecorderHook(8), FlightRecorderHook(2048), FlightRecorderHook(isolated=True)
    comm = SilentComm(0, 1)
    first.register_with_comm(comm)
    for _ in range(9):
        comm.call(OpName.barrier)
    assert (first.size(), second.size(), alone.size()) == (8, 8, 0)
    assert (first.is_enabled(), second.is_enabled()) == (True, False)


def test_a_recorder_of_no_entries_records_nothing() -> None:
    nothing, comm = FlightRecorderHook(0), SilentComm(0, 1)
    nothing.register_with_comm(comm)
    comm.call(OpName.barrier)
    assert (nothing.is_enabled(), nothing.size()) == (False, 0)
    with pytest.raises(ValueError, match="max_entries is -1"):
        FlightRecorderHook(-1, isolated=True)


def test_a_communicator_may_be_registered_before_it_has_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHCOMM_FR_DUMP_TEMP_FILE", str(tmp_path / "trace_"))
    comm, recorder = SilentComm(-1, 0), FlightRecorderHook(isolated=True)
    recorder.register_with_comm(comm)
    comm.hooks.abort()
    assert list(tmp_path.iterdir()) == []
    comm.rank, comm.size, comm._uuid = 1, 2, 5
    comm.call(OpName.barrier)
    comm.hooks.abort()
    assert [each.name for each in tmp_path.iterdir()] == ["trace_1"]
    assert json.loads(recorder.dump_json())["pg_config"]["world#5"]["ranks"] == "[0,1]"


def test_a_reconfigured_communicator_is_another_group_whose_numbers_begin_again() -> None:
    comm, recorder = SilentComm(2, 3), FlightRecorderHook(isolated=True)
    recorder.register_with_comm(comm)
    comm.call(OpName.barrier)
    comm.call(OpName.split, [0, 2], "pair", result=None)
    comm.rank, comm.size, comm._uuid = 1, 2, 77
    comm.call(OpName.barrier)
    comm.call(OpName.split, [0, 1], "pair", result=None)
    assert [(e["process_group"][0], e["collective_seq_id"]) for e in entries_of(recorder)] == [
        ("world", 1),
        ("pair", 1),
        ("world#77", 1),
        ("pair", 1),
    ]
