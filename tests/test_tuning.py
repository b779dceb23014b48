"""The table of measured choices: its schema, what it decides, what ranks agree on, and a real run that writes one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hxcomm import select, tuning
from hxcomm.select import SEGMENT_BYTES, Layout, Planner
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
        "rows[3].algorithm is 'one_shot'; it must be one of: direct, hierarchical, ring",
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
def test_a_row_holds_up_to_its_bytes_and_beyond_the_last_the_built_in_choice_does() -> None:
    chosen = {n: planner().choose("all_reduce", n, "float32") for n in (0, 1, 128, 129, 1 << 20, (1 << 20) + 1)}
    assert [choice.algorithm for choice in chosen.values()] == [
        *("one_shot", "two_shot", "two_shot", "ring", "ring", "two_shot"),
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
        return planner(asked).choose("all_gather", 4096, "float32").algorithm

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
    built_in = select.default_algorithm("all_gather", 4096, layout)
    choice = Planner(0, layout, "g", {}).choose("all_gather", 4096, "float32")
    assert (choice.algorithm, choice.segment_bytes) == (built_in[0], None)
    assert choice.why.startswith(built_in[1])
    assert "(not by table.json: it is for 2 ranks on hosts 0,0, this group has " in choice.why


@pytest.mark.usefixtures("file")
def test_the_layout_counts_as_it_is_when_a_call_comes_not_when_the_planner_was_made() -> None:
    of_one_host = planner()
    of_one_host.layout = Layout(2, (0, 1))
    assert of_one_host.choose("all_gather", 4096, "float32").algorithm == "direct"


@pytest.mark.usefixtures("file")
def test_determinism_by_layout_passes_over_rows_out_of_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HXCOMM_DETERMINISM", "layout")
    three = Table(3, (0, 0, 0), "0.1.0", {}, ROWS)  # two ranks' ring is in rank order
    in_order = planner(world_size=3)
    in_order.table = three
    choice = in_order.choose("all_reduce", 65536, "float32")
    assert choice.algorithm == "two_shot" and "HXCOMM_DETERMINISM=layout, and ring is not in rank order" in choice.why
    assert in_order.choose("all_reduce", 64, "float32").why.startswith("measured")
    assert in_order.choose("all_gather", 4096, "float32").algorithm == "ring"
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
