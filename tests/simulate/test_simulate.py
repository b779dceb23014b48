"""`hxcomm simulate`: closed forms come out, illegal algorithms are named with their rule, wrong words are refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hxcomm.cli import main
from hxcomm.simulate import arguments

# Round numbers: 1 GB/s is 1 byte a nanosecond. Reducing takes no time to speak of.
CHIP = """
name = "plain"
[memory]
bandwidth_bytes_per_s = 1e21
capacity_bytes = 1e9
[compute.flops_per_s]
float16 = 1e12
[[links]]
topology = "ring"
bandwidth_bytes_per_s = 1e9
latency_ns = 500
forwarding = "cut_through"
"""
NEIGHBOURS = """
[legal]
neighbours_only = true
max_sources = 2
"""
NS = 1000


@pytest.fixture
def chip(tmp_path: Path) -> str:
    path = tmp_path / "plain.toml"
    path.write_text(CHIP)
    return str(path)


@pytest.fixture
def neighbours(tmp_path: Path) -> str:
    path = tmp_path / "neighbours.toml"
    path.write_text(CHIP + NEIGHBOURS)
    return str(path)


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status = main(["simulate", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == 0
    return found


def times(found: dict[str, Any]) -> dict[tuple[str, int], int]:
    return {(row["algorithm"], row["size"]): row["total_ps"] for row in found["rows"]}


@pytest.mark.parametrize("n", [4, 8, 64])
def test_a_ring_takes_what_the_closed_form_says_and_a_bidirectional_one_half_of_the_bytes(
    n: int, chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 1 << 20
    found = simulated(
        capsys, "all_reduce", "--chips", str(n), "--chip", chip, "--sizes", "1MiB", "--algo", "ring,ring_bidirectional"
    )
    hops = 2 * (n - 1)
    assert times(found) == {
        ("ring", size): hops * (500 + size // n) * NS,
        ("ring_bidirectional", size): hops * (500 + size // n // 2) * NS,
    }


@pytest.mark.parametrize(
    ("op", "factor"), [("all_reduce", 2 * 3 / 4), ("all_gather", 3 / 4), ("reduce_scatter", 3 / 4)]
)
def test_bandwidths_are_those_of_nccl_tests(
    op: str, factor: float, chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = simulated(capsys, op, "--chips", "4", "--chip", chip, "--sizes", "4GiB", "--algo", "ring")
    (row,) = found["rows"]
    assert row["algbw_gbps"] == 1000 * row["size"] / row["total_ps"]
    assert row["busbw_gbps"] == row["algbw_gbps"] * factor
    assert row["busbw_gbps"] == pytest.approx(1.0, rel=1e-5)  # of a link, and 1e-5 of the time are hops


def test_a_torus_beats_the_ring_of_its_ranks_and_rows_are_its_rows(
    neighbours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("all_reduce", "--chips", "16", "--chip", neighbours, "--topology", "torus:4x4", "--sizes", "16MiB")
    found = simulated(capsys, *words)
    assert found["fastest"] == {str(16 << 20): "torus"}
    assert set(found["refused"]) >= {"one_shot", "two_shot", "ring"}
    # All four links of a chip carry alike: a fourth of what a ring would carry, in as many bytes a link.
    carried = {link["nbytes"] for link in found["looked_into"]["links"]}
    assert max(carried) == min(carried)


def test_small_and_large_sizes_have_different_winners_and_a_run_of_sizes_is_one_line(
    chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "all_reduce", "--chips", "8", "--chip", chip, "--sizes", "1KiB..64MiB"]) == 0
    text = capsys.readouterr().out
    wins = [line for line in text.splitlines() if line.startswith("fastest ")]
    assert len(wins) >= 2
    assert wins[-1].endswith("to 64 MiB: ring_bidirectional")


def test_what_is_printed_names_units_links_winners_and_the_critical_path(
    chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["all_reduce", "--chips", "2", "--chip", chip, "--sizes", "64KiB", "--algo", "ring", "--dtype", "float32"]
    assert main(["simulate", *words]) == 0
    assert capsys.readouterr().out.splitlines() == GOLDEN.splitlines()


GOLDEN = """\
all_reduce, 2 chips plain, float32, simulated
links: ring of 2, two directions, 1 GB/s a link, 500 ns a hop, cut_through
size: bytes of the largest buffer (all_gather: all outputs together; reduce_scatter: the whole input);
algbw: size/time; busbw: as NCCL-tests define it, to compare with a link's bandwidth; GB/s: 1e9 bytes/s.

      size  algorithm       time     algbw     busbw
                                    (GB/s)    (GB/s)
    64 KiB  ring         66.5 us     0.985     0.985

fastest at 64 KiB: ring

all_reduce ring of 64 KiB: links
chip 0  ──  1→0       64 KiB   98% ████████████████████  ──  chip 1
            0→1       64 KiB   98% ████████████████████
bytes that each link carried, and the part of 66.5 us that it was busy

all_reduce ring of 64 KiB: critical path, 66.5 us: 65.5 us on links, 0 ps reducing, 1 us hops and launch
    begins      takes      after  what
      0 ps    32.8 us       0 ps  link 0->1, round 1, 32 KiB
   33.3 us       0 ps     500 ns  chip 1 reduces, round 1, 96 KiB
   33.3 us    32.8 us       0 ps  link 1->0, round 2, 32 KiB
"""


def test_links_that_reach_neighbours_only_refuse_what_needs_every_chip_naming_the_rule(
    neighbours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "all_reduce", "--chips", "8", "--chip", neighbours, "--sizes", "1MiB"]) == 0
    text = capsys.readouterr().out
    assert "\nnot legal on these links:\n" in text
    (refused,) = [line for line in text.splitlines() if line.startswith("  all_reduce one_shot, 8 ranks, round 1: ")]
    assert refused.endswith("max_sources: 8 sources, a chip reduces at most 2 at a time")
    assert "fastest at 1 MiB: ring_bidirectional" in text


def test_an_illegal_algorithm_that_was_asked_for_ends_with_status_1(
    neighbours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["all_reduce", "--chips", "8", "--chip", neighbours, "--sizes", "1MiB", "--algo", "two_shot"]
    assert main(["simulate", *words]) == 1
    assert "not legal on these links:\n  all_reduce two_shot, 8 ranks, round 1: " in capsys.readouterr().out


def test_a_slow_link_slows_the_ring_and_a_dead_one_sends_messages_the_other_way_or_is_refused(
    chip: str, neighbours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("all_reduce", "--chips", "8", "--sizes", "8MiB", "--algo", "ring", "--chip")
    (whole,) = times(simulated(capsys, *words, chip)).values()
    (slow,) = times(simulated(capsys, *words, chip, "--faults", "slow-link:3-4:0.5x")).values()
    (dead,) = times(simulated(capsys, *words, chip, "--faults", "dead-link:3-4")).values()
    # The way round is 7 hops over links that the ring leaves idle.
    assert whole < dead < slow
    assert main(["simulate", *words, neighbours, "--faults", "dead-link:3-4"]) == 1
    assert "neighbours_only: from rank 3 to rank 4 it is 7 hops" in capsys.readouterr().out
    assert main(["simulate", *words, chip, "--topology", "line:8", "--faults", "dead-link:3-4"]) == 2
    assert "cannot reach rank" in capsys.readouterr().err


def test_an_open_line_has_algorithms_between_neighbours(neighbours: str, capsys: pytest.CaptureFixture[str]) -> None:
    for op in ("all_reduce", "all_gather", "broadcast", "reduce"):
        root = ("--root", "2") if op in ("broadcast", "reduce") else ()
        found = simulated(
            capsys, op, "--chips", "5", "--chip", neighbours, "--topology", "line:5", "--sizes", "1MiB", *root
        )
        assert list(found["fastest"].values()) == ["ring" if root else "line"]


def test_one_value_of_the_chip_changes_the_times_that_depend_on_it(
    chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("all_reduce", "--chips", "4", "--chip", chip, "--sizes", "1KiB", "--algo", "ring")
    before, after = (simulated(capsys, *words), simulated(capsys, *words, "--set", "links.0.latency_ns=100"))
    assert sum(times(before).values()) - sum(times(after).values()) == 6 * 400 * NS
    assert before["chip_digest"] != after["chip_digest"]


def test_the_critical_path_is_the_time_it_explains(chip: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("all_reduce", "--chips", "4", "--chip", chip, "--sizes", "1KiB,1MiB", "--critical-path", "1KiB:ring")
    found = simulated(capsys, *words)["looked_into"]
    assert (found["size"], found["algorithm"]) == (1 << 10, "ring")
    path = found["critical_path"]
    assert all(before["end_ps"] <= after["start_ps"] for before, after in pairwise(path))
    assert sum(event["what"].startswith("link ") for event in path) == 6


def test_the_events_of_a_trace_are_what_the_links_were_busy_with(
    chip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    words = ("all_reduce", "--chips", "4", "--chip", chip, "--sizes", "1MiB", "--algo", "ring", "--trace", str(file))
    links = simulated(capsys, *words)["looked_into"]["links"]
    events = json.loads(file.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    busy: dict[str, int] = {}
    for event in (e for e in events if e["ph"] == "X"):
        lane = names[event["pid"], event["tid"]]
        busy[lane] = busy.get(lane, 0) + event["args"]["nbytes"]
    assert {lane: nbytes for lane, nbytes in busy.items() if lane.startswith("link")} == {
        f"link {link['source']}->{link['target']}": link["nbytes"] for link in links if link["messages"]
    }


def test_every_picture_that_is_asked_for_is_drawn(
    chip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {option: tmp_path / f"{option[2:]}.png" for option in ("--plot", "--links-plot", "--timeline-plot")}
    words = [word for option, file in files.items() for word in (option, str(file))]
    simulated(capsys, "all_reduce", "--chips", "4", "--chip", chip, "--sizes", "1KiB,1MiB", *words)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files.values())


def test_a_barrier_has_no_size(chip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["size"] for row in simulated(capsys, "barrier", "--chips", "4", "--chip", chip)["rows"]] == [0]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1KiB..64KiB", (1 << 10, 1 << 12, 1 << 14, 1 << 16)),
        ("1KiB..5000", (1 << 10, 1 << 12, 5000)),
        ("1MiB,64,64..256", (64, 256, 1 << 20)),
    ],
)
def test_sizes_are_a_range_times_four_with_its_end_or_a_list(text: str, sizes: tuple[int, ...]) -> None:
    assert arguments.parse_sizes(text) == sizes


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["all_sum", "--chips", "4"], "there is no op 'all_sum'; known are: all_reduce, "),
        (["all_reduce", "--chips", "4", "--algo", "fast"], "--algo: all_reduce has no algorithm 'fast'; it has: "),
        (["all_reduce", "--chips", "4", "--chip", "lpx"], "there is no chip 'lpx'; known are: "),
        (["all_reduce", "--chips", "4", "--topology", "cube"], "topology 'cube'"),
        (["all_reduce", "--chips", "6", "--topology", "torus:4x4"], "6 ranks do not fill"),
        (["all_reduce", "--chips", "4", "--faults", "slow"], "there is no fault 'slow'; they are written slow-link:"),
        (["all_reduce", "--chips", "4", "--faults", "dead-link:0-2"], "there is no link 0-2"),
        (["all_reduce", "--chips", "4", "--set", "links.0.latency"], "--set links.0.latency: write it as KEY=VALUE"),
        (["all_reduce", "--chips", "4", "--set", "links.0.speed=3"], "there is no such key; known are: "),
        (["all_reduce", "--chips", "4", "--set", "links.0.latency_ns=-1"], "links.0.latency_ns"),
        (["all_reduce", "--chips", "4", "--root", "1"], "--root 1: all_reduce has no root"),
        (["broadcast", "--chips", "4", "--root", "4"], "--root 4: the ranks of 4 chips are 0 to 3"),
        (["all_gather", "--chips", "4", "--sizes", "6"], "--sizes: 6 bytes are less than 4 float16 (8 bytes), one for"),
        (["all_reduce", "--chips", "4", "--critical-path", "ring"], "--critical-path ring: write it as SIZE:ALGO"),
        (["all_reduce", "--chips", "4", "--critical-path", "2KiB:ring"], "2048 bytes are not among the sizes of this"),
        (["all_reduce", "--chips", "4", "--trace", "run.txt"], "run.txt: a trace is written as .json"),
        (["all_reduce", "--chips", "4", "--plot", "nowhere/a.png"], "there is no folder nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_word_is_named_with_what_is_allowed(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["all_reduce", "--chips", "0"], "'0' is not a number of chips, 1 or more"),
        (["all_reduce", "--chips", "4", "--sizes", "1MiB..1KiB"], "'1MiB..1KiB' is empty: write it as 1KiB..1GiB"),
        (["all_reduce", "--chips", "4", "--sizes", "big"], "'big': not a size; write a number of bytes"),
        (["all_reduce", "--chips", "4", "--dtype", "float7"], "invalid choice: 'float7'"),
        (["all_reduce"], "the following arguments are required: --chips"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_words_that_the_parser_refuses_are_named_too(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *words])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
