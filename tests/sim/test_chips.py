"""Chip files: what may stand in them, and what each wrong line says."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from sim.chip_files import TEXT, chip

from hxcomm.sim import chips
from hxcomm.sim.chips import ChipError


def wrong(old: str, new: str) -> str:
    """What reading the round chip says once a line of it is another."""
    assert old in TEXT
    with pytest.raises(ChipError) as raised:
        chips.read(TEXT.replace(old, new), "mine.toml")
    return str(raised.value)


@pytest.mark.parametrize("name", chips.names())
def test_every_bundled_chip_loads_and_writes_itself(name: str) -> None:
    loaded = chips.load(name)
    assert loaded.name == name
    for key in loaded.sources:
        assert chips.replace(loaded, key, _value(chips.as_table(loaded), key)) == loaded


def _value(table: object, key: str) -> object:
    for word in key.split("."):
        table = table[int(word)] if isinstance(table, list) else table[word]  # type: ignore[index]
    return table


def test_an_unknown_name_lists_those_that_there_are() -> None:
    with pytest.raises(ChipError, match=r"there is no chip 'gpu'; known are: .*lpu.*\./mine\.toml"):
        chips.load("gpu")


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    assert chips.load(path) == chips.load(str(path)) == chip()
    with pytest.raises(ChipError, match=r"none\.toml: cannot be read: .*No such file"):
        chips.load(tmp_path / "none.toml")
    path.write_text(TEXT.replace("[memory]", "[memory"))
    with pytest.raises(ChipError, match=r"mine\.toml: is not TOML: .*line 4"):
        chips.load(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "round"\n', "", "mine.toml: name: is missing"),
        ('name = "round"', "name = 3", "mine.toml:1: name: is 3; it must be a text"),
        ("overlap_chunks = 1", "overlap_chunks = 0", "mine.toml:2: overlap_chunks: is 0; it must be a whole number, 1"),
        ("overlap_chunks", "overlap", "mine.toml:2: overlap: there is no such key; known are: name, description, over"),
        ("capacity_bytes = 16e9\n", "", "mine.toml:4: memory.capacity_bytes: is missing"),
        (
            "capacity_bytes = 16e9",
            "capacity_bytes = 0",
            "mine.toml:6: memory.capacity_bytes: is 0; it must be a number",
        ),
        (
            "capacity_bytes",
            "capacity_mb",
            "mine.toml:6: memory.capacity_mb: there is no such key; known are: bandwidth",
        ),
        (
            "16e9",
            "16e9\nachieved = 1.2",
            "mine.toml:7: memory.achieved: is 1.2; it must be a number, more than 0, at m",
        ),
        ("16e9", "-1", "mine.toml:6: memory.capacity_bytes: is -1; it must be a number, more than 0"),
        ("16e9", "true", "mine.toml:6: memory.capacity_bytes: is True; it must be a number"),
        ("16e9", "inf", "mine.toml:6: memory.capacity_bytes: is inf; it must be a number"),
        (
            "float16 = 100e12",
            "float16 = 0.0",
            "mine.toml:9: compute.flops_per_s.float16: is 0.0; it must be a number, m",
        ),
        (
            "float16",
            "fp16",
            "mine.toml:9: compute.flops_per_s.fp16: there is no such key; known are: float32, bfloat16",
        ),
        ("float16 = 100e12\n", "", "mine.toml:8: compute.flops_per_s: is empty; it must give at least one of"),
        (
            '"ring"',
            '"star"',
            "mine.toml:12: links.0.topology: is 'star'; it must be one of: ring, line, torus, mesh, s",
        ),
        (
            "latency_ns = 500",
            "latency_ns = -1",
            "mine.toml:14: links.0.latency_ns: is -1; it must be a number, 0 or mor",
        ),
        ('forwarding = "store_and_forward"\n', "", "mine.toml:11: links.0.forwarding: is missing"),
        (
            '"store_and_forward"',
            '"wormhole"',
            "mine.toml:15: links.0.forwarding: is 'wormhole'; it must be one of: cut",
        ),
        (
            "latency_ns = 500",
            "latency_ns = 5\nshape = 8",
            "mine.toml:15: links.0.shape: is 8; it must be a list of who",
        ),
        (
            "latency_ns = 500",
            "latency_ns = 5\nshape = [0]",
            "mine.toml:15: links.0.shape: is [0]; it must be a list of",
        ),
        (
            "latency_ns = 500",
            "latency_ns = 5\nshape = [2, 4]",
            "mine.toml:15: links.0.shape: is [2, 4]; a ring has 1 n",
        ),
        (
            "latency_ns = 500",
            "latency_ns = 5\ndirections = 3",
            "mine.toml:15: links.0.directions: is 3; it must be a n",
        ),
        (
            "latency_ns = 500",
            "latency_ns = 5\ntick_ps = 0.5",
            "mine.toml:15: links.0.tick_ps: is 0.5; it must be a who",
        ),
        ("[sources]", "[[links]]\n[sources]", "mine.toml:17: links.1.topology: is missing"),
        ("[sources]", "[legal]\npush_only = 1\n[sources]", "mine.toml:18: legal.push_only: is 1; it must be true or f"),
        ("[sources]", "[power]\n[sources]", "mine.toml:17: power.watts: is missing"),
        (
            '"links.0.latency_ns" =',
            '"links.1.latency_ns" =',
            "mine.toml:18: sources.links.1.latency_ns: cites a key th",
        ),
        ('"assumed: a test"', '""', "mine.toml:18: sources.links.0.latency_ns: is ''; it must be a text: a citation"),
        ("[memory]", "[memories]", "mine.toml:4: memories: there is no such key; known are: name"),
        ("[[links]]", "[links]", "mine.toml:11: links: must be one [[links]] or several, inner first"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_allowed(old: str, new: str, said: str) -> None:
    assert wrong(old, new).startswith(said)


def test_only_a_ring_has_one_direction_and_only_the_last_level_is_as_large_as_it_gets() -> None:
    assert "only a ring can have one direction" in wrong('"ring"', '"switch"\ndirections = 1')
    level = '[[links]]\ntopology = "switch"\nbandwidth_bytes_per_s = 1\nlatency_ns = 0\nforwarding = "cut_through"\n'
    assert "links.0: needs a shape, as another level of links follows it" in wrong("[sources]", level + "[sources]")


def test_one_value_is_replaced_and_everything_checked_again() -> None:
    assert chips.replace(chip(), "links.0.latency_ns", "100").links[0].latency_ns == 100
    assert chips.replace(chip(), "links.0.forwarding", "cut_through").links[0].forwarding == "cut_through"
    assert chips.replace(chip(), "power.watts", 86).power == chips.Power(86)
    assert "links.0.latency_ns" not in chips.replace(chip(), "links.0.latency_ns", 1).sources
    for key, said in {
        "links.latency_ns": r"which links\? links.0 to links.0, as in links.0.latency_ns",
        "links.1.latency_ns": r"the chip has links.0 to links.0, not '1'",
        "memory.achieved.x": r"achieved has no values of its own|memory.achieved",
        "legal.max_sources": r"is 0; it must be a number",
        "speed": r"there is no such key",
    }.items():
        with pytest.raises(ChipError, match=said):
            chips.replace(chip(memory__achieved=0.5), key, 0)


def test_chips_are_equal_where_results_are() -> None:
    assert chip() == chip(links__0__latency_ns=500.0) != chip(links__0__latency_ns=501)
    assert len({chip(), chip(links__0__latency_ns=500.0), chip(links__0__latency_ns=501)}) == 2
    assert chips.read(TEXT.replace("assumed: a test", "a book"), "x") == chip()


def test_rates_are_exact_and_a_missing_dtype_runs_as_the_next_wider() -> None:
    used = chip(memory__bandwidth_bytes_per_s=0.1, memory__achieved=0.3)
    assert used.memory.achieved_bytes_per_s == used.reduce_bytes_per_s == Fraction(3, 100)
    assert chip(collective__reduce_bytes_per_s=7).reduce_bytes_per_s == 7
    assert used.compute.peak_flops_per_s("int4") == used.compute.peak_flops_per_s("float16") == 100e12
    with pytest.raises(ChipError, match=r"no compute\.flops_per_s of float32 or of a wider type; it gives: float16"):
        used.compute.peak_flops_per_s("float32")
