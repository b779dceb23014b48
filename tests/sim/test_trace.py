"""The trace of a run: read back with other people's libraries, with order and exact times kept."""

from __future__ import annotations

import builtins
import json
import random
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hxcomm.sim.trace import Event, TraceError, check_path, write_trace

RUN = (
    Event("virtual", 0, "ops", "aten::mm", 0, 1_999, {"nbytes": 512}),
    Event("virtual", 0, "ops", "aten::add", 1_999, 1_002, {}),
    Event("virtual", 0, "collectives", "all_reduce", 3_001, 5_000_000, {"algorithm": "ring"}),
    Event("virtual", 0, "link 0->1", "round 1", 3_001, 2_000_000, {}),
    Event("virtual", 1, "ops", "aten::mm", 500, 1_999, {}),
    Event("real", 0, "ops", "aten::mm", 7 * 10**15, 4_000_000, {}),
    Event("real", 1, "ops", "aten::mm", 7 * 10**15 + 1_000_000, 4_000_000, {}),
)


def chrome(path: Path, events: Iterable[Event]) -> list[dict[str, Any]]:
    write_trace(path, events)
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def lanes(found: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The events by the names of their process and thread."""
    names = {(e["name"], e["pid"], e.get("tid")): e["args"].get("name") for e in found if e["ph"] == "M"}
    by_name: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in (e for e in found if e["ph"] == "X"):
        process = names["process_name", event["pid"], None]
        by_name.setdefault((process, names["thread_name", event["pid"], event["tid"]]), []).append(event)
    return by_name


def test_both_clocks_of_a_run_lie_in_one_file_as_a_process_for_each_rank(tmp_path: Path) -> None:
    found = lanes(chrome(tmp_path / "run.json", RUN))
    assert {name: [event["name"] for event in lane] for name, lane in found.items()} == {
        ("virtual time, rank 0", "ops"): ["aten::mm", "aten::add"],
        ("virtual time, rank 0", "collectives"): ["all_reduce"],
        ("virtual time, rank 0", "link 0->1"): ["round 1"],
        ("virtual time, rank 1", "ops"): ["aten::mm"],
        ("real time, rank 0", "ops"): ["aten::mm"],
        ("real time, rank 1", "ops"): ["aten::mm"],
    }


def test_times_are_microseconds_from_the_beginning_of_each_clock_and_exact_in_the_arguments(tmp_path: Path) -> None:
    found = lanes(chrome(tmp_path / "run.json", RUN))
    add = found["virtual time, rank 0", "ops"][1]
    assert (add["ts"], add["dur"]) == (0.001, 0.002)
    assert add["args"] == {"start_ps": 1_999, "duration_ps": 1_002}
    assert found["real time, rank 1", "ops"][0]["ts"] == 1.0
    assert found["virtual time, rank 0", "collectives"][0]["args"]["algorithm"] == "ring"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the library chrometrace needs Python 3.11")
def test_a_library_for_chrome_traces_reads_every_event_back(tmp_path: Path) -> None:
    import chrometrace

    read = [chrometrace.TraceEvent.from_dict(each) for each in chrome(tmp_path / "run.json", RUN)]
    complete = [each for each in read if each.event_type == chrometrace.TraceEventType.COMPLETE]
    assert [(each.name, each.args["start_ps"], each.args["duration_ps"]) for each in complete] == [
        (event.name, event.start_ps, event.duration_ps) for event in RUN
    ]


def test_events_of_a_row_never_overlap_in_the_nanoseconds_that_viewers_count(tmp_path: Path) -> None:
    seed = 8
    print(f"seed {seed}")
    numbers = random.Random(seed)
    events, now = [], 0
    for _ in range(5_000):
        length = numbers.randrange(1, 10 ** numbers.randrange(1, 11))
        events.append(Event("virtual", 0, "ops", "op", now, length, {}))
        now += length + numbers.choice((0, numbers.randrange(3_000)))
    read = sorted(chrome(tmp_path / "run.json", events)[-len(events) :], key=lambda each: each["args"]["start_ps"])
    # A viewer multiplies by 1000 and drops what is behind the point.
    spans = [(int(each["ts"] * 1000), int(each["ts"] * 1000) + int(each["dur"] * 1000)) for each in read]
    assert [start for start, _ in spans] == [event.start_ps // 1000 for event in events]
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_events_that_overlap_in_part_get_rows_of_the_same_name_and_nested_ones_do_not(tmp_path: Path) -> None:
    outer = Event("virtual", 0, "ops", "outer", 0, 10_000, {})
    inner = Event("virtual", 0, "ops", "inner", 2_000, 3_000, {})
    crossing = Event("virtual", 0, "ops", "crossing", 9_000, 5_000, {})
    found = chrome(tmp_path / "run.json", [crossing, inner, outer])
    rows = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert rows == {1: "ops", 2: "ops"}
    assert {e["name"]: e["tid"] for e in found if e["ph"] == "X"} == {"outer": 1, "inner": 1, "crossing": 2}


def test_the_native_trace_holds_the_same_tracks_and_slices(tmp_path: Path) -> None:
    trace = pytest.importorskip(
        "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="pip install 'hxcomm[trace]'"
    )
    write_trace(tmp_path / "run.pftrace", RUN)
    packets = trace.Trace.FromString((tmp_path / "run.pftrace").read_bytes()).packet
    tracks = {p.track_descriptor.uuid: p.track_descriptor for p in packets if p.HasField("track_descriptor")}

    def name(uuid: int) -> str:
        above = tracks[uuid].parent_uuid
        return f"{name(above)}/{tracks[uuid].name}" if above else str(tracks[uuid].name)

    slices: list[tuple[str, str, int, int]] = []
    begun: dict[int, list[tuple[str, int]]] = {}
    for packet in (p for p in packets if p.HasField("track_event")):
        event = packet.track_event
        if event.type == trace.TrackEvent.TYPE_SLICE_BEGIN:
            notes = {note.name: note.int_value for note in event.debug_annotations}
            assert (notes["start_ps"] - (7 * 10**15 if "real" in name(event.track_uuid) else 0)) // 1000 == (
                packet.timestamp
            )
            begun.setdefault(event.track_uuid, []).append((event.name, packet.timestamp))
        else:
            what, start = begun[event.track_uuid].pop()
            slices.append((name(event.track_uuid), what, start, packet.timestamp))
    assert not any(begun.values())
    assert slices == [
        ("virtual time/rank 0/ops", "aten::mm", 0, 1),
        ("virtual time/rank 0/ops", "aten::add", 1, 3),
        ("virtual time/rank 0/collectives", "all_reduce", 3, 5_003),
        ("virtual time/rank 0/link 0->1", "round 1", 3, 2_003),
        ("virtual time/rank 1/ops", "aten::mm", 0, 2),
        ("real time/rank 0/ops", "aten::mm", 0, 4_000),
        ("real time/rank 1/ops", "aten::mm", 1_000, 5_000),
    ]


def test_the_native_form_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_import = builtins.__import__

    def without_perfetto(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("perfetto"):
            raise ModuleNotFoundError(name)
        return really_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_perfetto)
    with pytest.raises(TraceError, match=r"pip install 'hxcomm\[trace\]', or write a \.json"):
        check_path(tmp_path / "run.pftrace")


@pytest.mark.parametrize(
    ("file", "text"),
    [("run.txt", r"run\.txt: a trace is written as \.json .* or \.pftrace"), ("none/run.json", "there is no folder")],
)
def test_a_path_that_no_trace_can_have_is_refused(tmp_path: Path, file: str, text: str) -> None:
    with pytest.raises(TraceError, match=text):
        write_trace(tmp_path / file, RUN)


@pytest.mark.parametrize(
    "change", [{"clock": "wall"}, {"rank": -1}, {"duration_ps": -1}], ids=lambda change: next(iter(change))
)
def test_an_event_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match="the clock is one of virtual, real"):
        write_trace(tmp_path / "run.json", [RUN[0]._replace(**change)])
