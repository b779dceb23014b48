"""The table of measured choices: its schema, what it decides, what ranks agree on, and a real run that writes one."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hxcomm import algorithms, select, tuning
from hxcomm.bench.arguments import UsageError
from hxcomm.cli import main
from hxcomm.select import SEGMENT_BYTES, Layout, Planner
from hxcomm.tune import arguments, deciding
from hxcomm.tune.deciding import Variant
from hxcomm.tuning import Measured, Row, Table

Pool = Callable[[int], Any]

ROWS = (
    Row("all_reduce", "cpu", 128, 64, "two_shot", None, 9.5, Measured("one_shot", None, 12.0)),
    Row("all_reduce", "cpu", 1 << 20, 65536, "ring", 1 << 19, 80.0, None),
    Row("all_reduce", "hx", 1 << 20, 65536, "one_shot", None, 7.0, None),
    Row("all_gather", "cpu", 1 << 20, 65536, "ring", None, 30.0, Measured("direct", None, 40.0)),
)


def table(rows: tuple[Row, ...] = ROWS, hosts: tuple[int, ...] = (0, 0)) -> Table:
    return Table(len(hosts), hosts, "0.1.0", {"cores": 2}, rows)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A right table for two ranks of one host, which HXCOMM_TUNING names."""
    path = tmp_path / "table.json"
    path.write_text(table().text())
    monkeypatch.setenv("HXCOMM_TUNING", str(path))
    return path


@pytest.fixture
def no_selectors() -> Iterator[None]:
    before = list(select._selectors)
    yield
    select._selectors[:] = before


def planner(asked: dict[str, str] | None = None, segment_bytes: int | None = None, world_size: int = 2) -> Planner:
    return Planner(0, Layout(world_size), "g", asked or {}, segment_bytes)


# --- schema ---


def test_a_table_is_read_as_it_was_written(file: Path) -> None:
    read = tuning.load(str(file))
    assert read.rows == ROWS and read.name == "table.json" and len(read.digest) == 64
    assert replace(read, name="", digest="") == table()


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another version": (lambda raw: raw.update(version=2), "version is 2; this hxcomm reads version 1"),
    "no version": (lambda raw: raw.pop("version"), "version is None; this hxcomm reads version 1"),
    "a missing field": (lambda raw: raw.pop("hosts"), "'hosts' is missing in the table; its fields are: version"),
    "an unknown field": (lambda raw: raw.update(speed=1), "'speed' is not a field of the table"),
    "hosts of other ranks": (lambda raw: raw.update(hosts=[0, 0, 0]), "hosts: the hosts of 2 ranks are"),
    "hosts that are no numbers": (lambda raw: raw.update(hosts=["a", "b"]), "hosts is ['a', 'b']; it must hold the"),
    "a world size that is no number": (lambda raw: raw.update(world_size="2"), "world_size is '2'; it must be a whole"),
    "rows that are no list": (lambda raw: raw.update(rows={}), "rows is {}; it must be a list"),
    "an unknown op": (lambda raw: raw["rows"][1].update(op="all_sum"), "rows[1].op is 'all_sum'; it must be one of: "),
    "an unknown device": (lambda raw: raw["rows"][0].update(device="cuda"), "rows[0].device is 'cuda'"),
    "an unknown algorithm": (
        lambda raw: raw["rows"][3].update(algorithm="one_shot"),
        "rows[3].algorithm is 'one_shot'; it must be one of: direct, hierarchical, line, ring",
    ),
    "an unknown runner-up": (
        lambda raw: raw["rows"][0]["runner_up"].update(algorithm="fast"),
        "rows[0].runner_up.algorithm is 'fast'",
    ),
    "a field missing in a row": (lambda raw: raw["rows"][2].pop("us"), "'us' is missing in rows[2]"),
    "a time that is none": (lambda raw: raw["rows"][0].update(us=float("nan")), "rows[0].us is nan"),
    "a truth for a number": (lambda raw: raw["rows"][0].update(up_to_bytes=True), "rows[0].up_to_bytes is True"),
    "an empty segment": (lambda raw: raw["rows"][1].update(segment_bytes=0), "rows[1].segment_bytes is 0"),
    "rows out of order": (
        lambda raw: raw["rows"][1].update(up_to_bytes=128),
        "rows[1].up_to_bytes is 128, not more than 128 of the row of all_reduce on cpu before it",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_refused_naming_file_and_field(file: Path, what: str) -> None:
    change, message = WRONG[what]
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError) as raised:
        planner()
    assert str(raised.value).startswith(f"HXCOMM_TUNING={file}: {message}"), raised.value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "the table is []; it must be an object"),
        (b"\xff\xfe\xff", "codec can't decode"),
        (b'{"version": 1, "version": 1}', "an object has a key twice: version, version"),
        (b"[" * 100_000, "recursion"),
        (b" " * (1 << 20) + b"{}", "has more than 1048576 bytes"),
    ],
)
def test_what_is_no_table_at_all_is_refused_naming_the_file(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        planner()
    assert str(raised.value).startswith(f"HXCOMM_TUNING={file}: ") and message in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HXCOMM_TUNING", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json: cannot be read: No such file"):
        planner()


# --- what it decides ---


@pytest.mark.usefixtures("file")
def test_a_row_holds_up_to_its_bytes_and_beyond_what_was_measured_the_built_in_choice_does() -> None:
    chosen = {n: planner().choose("all_reduce", n, "float32") for n in (0, 31, 32, 128, 129, 1 << 20, (1 << 20) + 1)}
    assert [choice.algorithm for choice in chosen.values()] == [
        *("one_shot", "one_shot", "two_shot", "two_shot", "ring", "ring", "two_shot"),
    ]
    assert chosen[128].why == "measured (table.json): 9.5 us for 64 bytes, one_shot 12 us"
    assert "not by table.json: it has no row for all_reduce of 1048577 bytes on cpu" in chosen[(1 << 20) + 1].why
    assert planner().choose("broadcast", 64, "float32").algorithm == "direct"


@pytest.mark.usefixtures("file")
def test_tensors_that_peers_reach_go_by_the_rows_of_hx() -> None:
    assert planner().choose("all_reduce", 65536, "float32", mapped=True).algorithm == "one_shot"
    assert planner().choose("all_gather", 65536, "float32", mapped=True).algorithm == "direct"


@pytest.mark.usefixtures("file", "no_selectors")
def test_who_asks_wins_over_selectors_and_these_over_the_table() -> None:
    def chosen(asked: dict[str, str]) -> str:
        return planner(asked).choose("all_gather", 65536, "float32").algorithm

    assert chosen({}) == "ring"
    select.register_selector(lambda op, nbytes, dtype, layout, chip: "hierarchical" if op == "all_gather" else None)
    assert chosen({}) == "hierarchical"
    assert chosen({"all_gather": "direct"}) == "direct"


@pytest.mark.usefixtures("file", "no_selectors")
def test_a_measured_window_belongs_to_the_measured_choice_and_gives_way_to_the_users() -> None:
    def window(of: Planner, nbytes: int = 65536) -> int:
        return of("all_reduce", "float32", "sum", -1, nbytes)[1]

    assert window(planner()) == 1 << 19
    assert window(planner(), 64) == SEGMENT_BYTES
    assert window(planner(segment_bytes=4096)) == 4096
    assert window(planner({"all_reduce": "ring"})) == SEGMENT_BYTES
    select.register_selector(lambda op, nbytes, dtype, layout, chip: "ring")
    assert window(planner()) == SEGMENT_BYTES


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("layout", [Layout(3), Layout(2, (0, 1))], ids=["more ranks", "two hosts"])
def test_a_group_that_lies_otherwise_goes_by_the_built_in_choice_and_says_why(layout: Layout) -> None:
    built_in = select.default_algorithm("all_gather", 65536, layout)
    choice = Planner(0, layout, "g", {}).choose("all_gather", 65536, "float32")
    assert (choice.algorithm, choice.segment_bytes) == (built_in[0], None)
    assert choice.why.startswith(built_in[1])
    assert "(not by table.json: it is for 2 ranks on hosts 0,0, this group has " in choice.why


@pytest.mark.usefixtures("file")
def test_the_layout_counts_as_it_is_when_a_call_comes_not_when_the_planner_was_made() -> None:
    of_one_host = planner()
    of_one_host.layout = Layout(2, (0, 1))
    assert of_one_host.choose("all_gather", 65536, "float32").algorithm == "direct"


@pytest.mark.usefixtures("file")
def test_determinism_by_layout_passes_over_rows_out_of_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HXCOMM_DETERMINISM", "layout")
    three = Table(3, (0, 0, 0), "0.1.0", {}, ROWS)  # two ranks' ring is in rank order
    in_order = planner(world_size=3)
    in_order.table = three
    choice = in_order.choose("all_reduce", 65536, "float32")
    assert choice.algorithm == "two_shot" and "HXCOMM_DETERMINISM=layout, and ring is not in rank order" in choice.why
    assert in_order.choose("all_reduce", 64, "float32").why.startswith("measured")
    assert in_order.choose("all_gather", 65536, "float32").algorithm == "ring"
    monkeypatch.delenv("HXCOMM_DETERMINISM")
    in_any_order = planner(world_size=3)
    in_any_order.table = three
    assert in_any_order.choose("all_reduce", 65536, "float32").algorithm == "ring"


def test_the_debug_line_says_that_the_table_chose(file: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HXCOMM_DEBUG", "algo")
    planner()("all_gather", "float32", "sum", -1, 65536)
    assert capfd.readouterr().err == (
        "hxcomm: rank 0 of 'g': all_gather of 65536 bytes float32 runs ring: measured (table.json): 30 us for 65536 "
        "bytes, direct 40 us\n"
    )


# --- what ranks agree on ---


def test_settings_go_by_content_and_not_by_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = planner().settings()
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / file.name
    other.write_text(file.read_text())
    monkeypatch.setenv("HXCOMM_TUNING", str(other))
    assert planner().settings() == here
    other.write_text(file.read_text() + "\n")
    assert planner().settings() != here
    monkeypatch.delenv("HXCOMM_TUNING")
    assert planner().settings().endswith("; no tuning")


def differing_tables(rank: int, world_size: int, files: list[str]) -> str:
    import torch.distributed as dist

    os.environ["HXCOMM_TUNING"] = files[rank]
    try:
        dist.init_process_group("hxcomm", timeout=timedelta(seconds=30))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    dist.destroy_process_group()
    return "nothing was raised"


@pytest.mark.parametrize("other", ["with another row", "none"])
def test_tables_that_differ_raise_on_every_rank_naming_the_files(file: Path, rank_pool: Pool, other: str) -> None:
    second = ""
    if other == "with another row":
        second = str(file.with_name("second.json"))
        Path(second).write_text(table(ROWS[:1]).text())
    texts = rank_pool(2).run(differing_tables, [str(file), second], backend=None)
    named = "tuning second.json (sha256 " if second else "no tuning"
    for text in texts:
        assert text.startswith("InitError: rank ") and "settings differ" in text, text
        assert "tuning table.json (sha256 " in text and named in text, text


def test_a_table_that_one_rank_cannot_read_ends_the_setup_of_all(file: Path, rank_pool: Pool) -> None:
    texts = rank_pool(2).run(differing_tables, [str(file), str(file.with_name("gone.json"))], backend=None)
    assert texts[0].startswith("InitError") and "rank 1 did not take part: HXCOMM_TUNING=" in texts[0], texts[0]
    assert texts[1].startswith("ValueError") and "gone.json: cannot be read" in texts[1], texts[1]


# --- what is measured, and which rows follow ---


def test_candidates_are_what_the_built_in_choice_could_make_unasked() -> None:
    one_host, pairs, apart = Layout(4), Layout(4, (0, 0, 1, 1)), Layout(4, (0, 1, 2, 3))

    def found(layout: Layout, rank_order: bool = False) -> dict[str, list[str]]:
        return {op: deciding.candidates(op, layout, rank_order) for op in arguments.OPS}

    assert found(one_host) == {
        "all_reduce": ["one_shot", "two_shot"],
        "all_gather": ["direct", "line", "ring", "ring_bidirectional"],
        "reduce_scatter": ["direct"],
        "broadcast": ["binomial_tree", "direct", "ring"],
        "reduce": ["direct"],
    }
    assert found(apart) == found(one_host)
    assert found(pairs)["all_reduce"] == ["hierarchical", "one_shot", "two_shot"]
    assert found(pairs)["reduce"] == ["direct", "hierarchical"]
    assert found(pairs, rank_order=True)["all_reduce"] == ["one_shot", "two_shot"]
    assert found(pairs, rank_order=True)["broadcast"] == ["binomial_tree", "direct", "hierarchical", "ring"]


def test_every_op_that_leaves_a_choice_can_be_measured() -> None:
    assert set(arguments.OPS) == {op for op in algorithms.OPS if len(algorithms.names(op)) > 1}


def test_windows_are_measured_for_large_blocks_of_cpu_only() -> None:
    def segments(op: str, nbytes: int, device: str) -> set[int | None]:
        return {each.segment_bytes for each in deciding.variants(op, nbytes, device, Layout(4), False)}

    assert segments("all_reduce", 1 << 18, "cpu") == {None}
    assert segments("all_reduce", 1 << 20, "cpu") == {256 << 10, 1 << 20, 2 << 20}
    assert segments("all_reduce", 1 << 20, "hx") == {None}
    assert segments("reduce", 1 << 18, "cpu") == set()  # one algorithm, one window: nothing to choose
    assert segments("reduce", 1 << 20, "cpu") == {256 << 10, 1 << 20, 2 << 20}


def test_rows_name_the_fastest_up_to_the_middle_between_two_sizes() -> None:
    one_shot, two_shot = Variant("one_shot", None), Variant("two_shot", None)
    times = [(1024, {one_shot: 10.0, two_shot: 5.0}), (4096, {one_shot: 10.0, two_shot: 9.0})]
    assert deciding.decide("all_reduce", "cpu", times, Layout(4), False) == [
        Row("all_reduce", "cpu", 2048, 1024, "two_shot", None, 5.0, Measured("one_shot", None, 10.0)),
        Row("all_reduce", "cpu", 8192, 4096, "two_shot", None, 9.0, Measured("one_shot", None, 10.0)),
    ]


def test_the_built_in_choice_stays_where_nothing_is_clearly_faster() -> None:
    built_in, other = Variant("direct", 256 << 10), Variant("ring", 1 << 20)
    (row,) = deciding.decide("all_gather", "cpu", [(1 << 20, {built_in: 100.0, other: 96.0})], Layout(4), False)
    assert (row.algorithm, row.segment_bytes, row.us) == ("direct", 256 << 10, 100.0)
    (row,) = deciding.decide("all_gather", "cpu", [(1 << 20, {built_in: 100.0, other: 94.0})], Layout(4), False)
    assert (row.algorithm, row.segment_bytes, row.us) == ("ring", 1 << 20, 94.0)


def test_rows_of_real_times_make_a_table_that_can_be_read(file: Path) -> None:
    times = [(n, {Variant("one_shot", None): 12.3456, Variant("two_shot", None): 2e-5}) for n in (1, 2, 3, 64)]
    written = table(tuple(deciding.decide("all_reduce", "hx", times, Layout(2), False)))
    file.write_text(written.text())
    assert tuning.load(str(file)).rows == written.rows


# --- a real run ---


def names_of_algorithms(rank: int, world_size: int) -> set[tuple[str, str, str]]:
    """What one call of each measured op and a device ran."""
    import torch
    import torch.distributed as dist

    import hxcomm

    whole, part = torch.ones(64), torch.ones(64 // world_size)
    dist.all_reduce(whole)
    dist.all_gather_single(whole, part)
    dist.all_reduce(torch.ones(64, device="hx"))
    return {(row["op"], row["memory"], row["algorithm"]) for row in hxcomm.statistics()}


def test_a_run_writes_a_table_that_the_next_program_follows(
    tmp_path: Path, rank_pool: Pool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HXCOMM_DEBUG", "algo")
    out = tmp_path / "table.json"
    words = ["tune", "--ranks", "2", "--out", str(out), "--device", "cpu,hx", "--ops", "all_reduce,all_gather"]
    assert main([*words, "--sizes", "256,1MiB,2MiB", "--iters", "5", "--budget-s", "600"]) == 0
    said = capfd.readouterr().err
    for op, nbytes, names in (("all_reduce", 256, ("one_shot", "two_shot")), ("all_gather", 128, ("direct", "ring"))):
        assert all(said.count(f"{op} of {nbytes} bytes float32 runs {name}: asked for") == 4 for name in names), said
    written = tuning.load(str(out))
    assert (written.world_size, written.hosts) == (2, (0, 0))
    assert {(row.op, row.device, row.measured_bytes) for row in written.rows} == {
        *(("all_reduce", device, nbytes) for device in ("cpu", "hx") for nbytes in (256, 1 << 20, 2 << 20)),
        *(("all_gather", device, nbytes) for device in ("cpu", "hx") for nbytes in (128, 1 << 19, 1 << 20)),
    }
    assert all(row.runner_up is not None for row in written.rows)
    assert {row.segment_bytes is None for row in written.rows if row.measured_bytes < 1 << 20} == {True}

    # What was measured, turned round: the built-in choice cannot be mistaken for it.
    turned = tuple(
        replace(row, algorithm=row.runner_up.algorithm, runner_up=replace(row.runner_up, algorithm=row.algorithm))
        for row in written.rows
        if row.runner_up is not None
    )
    for followed in (written, replace(written, rows=turned)):
        out.write_text(followed.text())
        chosen = [followed.row(op, nbytes, device) for op, nbytes, device in CALLS]
        expected = {
            (op, "mapped" if device == "hx" else "staged", row.algorithm)
            for (op, _, device), row in zip(CALLS, chosen, strict=True)
            if row is not None
        }
        assert len(expected) == len(CALLS)
        for ran in rank_pool(2).run(names_of_algorithms, env={"HXCOMM_TUNING": str(out)}):
            assert ran == expected


CALLS = (("all_reduce", 256, "cpu"), ("all_gather", 128, "cpu"), ("all_reduce", 256, "hx"))  # of names_of_algorithms


def test_what_the_budget_does_not_reach_is_left_out_and_said(tmp_path: Path, run_ranks: Any) -> None:
    out = tmp_path / "table.json"
    printed = run_ranks(tune, 2, "--out", str(out), "--sizes", "64,256", "--budget-s", "0.000001", backend=None)
    assert printed[0][0] == 0 and tuning.load(str(out)).rows == ()
    assert "left out: all_reduce of 256 bytes on cpu, which does not fit in --budget-s 1e-06" in printed[0][1]


def tune(rank: int, world_size: int, *words: str) -> tuple[int, str, str]:
    """Measures as `python -m hxcomm.tune` would: (exit status, stdout, stderr)."""
    from hxcomm.tune import session

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = session.main(words)
    return status, out.getvalue(), err.getvalue()


def test_ranks_on_two_hosts_measure_hierarchical_algorithms_too(tmp_path: Path, run_ranks: Any) -> None:
    out = tmp_path / "table.json"
    run_ranks(tune_on_two_hosts, 3, str(out), backend=None)
    rows = tuning.load(str(out)).rows
    assert tuning.load(str(out)).hosts == (0, 0, 1)
    compared = {row.op: {row.algorithm, row.runner_up and row.runner_up.algorithm} for row in rows}
    assert compared["reduce"] == {"direct", "hierarchical"} and compared.keys() == {"all_reduce", "reduce"}


def tune_on_two_hosts(rank: int, world_size: int, out: str) -> None:
    os.environ["HXCOMM_HOST_ID"] = "left" if rank < 2 else "right"
    status, _, said = tune(
        rank, world_size, "--out", out, "--sizes", "64", "--ops", "all_reduce,reduce", "--iters", "5"
    )
    assert status == 0, said


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--ops", "barrier"], "there is no op 'barrier' here; known are all_reduce, all_gather"),
        (["--device", "cuda"], "there is no device 'cuda' here; known are cpu, hx"),
        (["--budget-s", "nan"], "'nan' is not a positive number of seconds"),
        (["--sizes", "2"], "a size of 2 bytes is less than one float32"),
        (["--out", "nowhere/table.json"], "nowhere/table.json: there is no folder nowhere"),
    ],
)
def test_a_wrong_command_is_refused_with_what_is_allowed(words: list[str], advice: str) -> None:
    with pytest.raises(UsageError) as raised:
        arguments.parse(["--out", "table.json", *words])
    assert advice in str(raised.value)


def test_the_command_for_the_ranks_asks_for_the_same_settings() -> None:
    asked = arguments.parse(["--out", "table.json", "--ops", "reduce,all_gather", "--sizes", "4KiB,64", "--iters", "9"])
    again = arguments.parse(asked.words())
    assert again == replace(asked, out=asked.out.absolute())
    assert again.ops == ("all_gather", "reduce") and again.sizes == (64, 4096)


def test_one_rank_is_told_that_there_is_nothing_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--ranks", "1", "--out", "table.json"]) == 2
    assert "nothing to choose for one rank" in capsys.readouterr().err
