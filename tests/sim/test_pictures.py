"""Pictures of a simulated run: the ring in a terminal word for word, and files that matplotlib wrote."""

from __future__ import annotations

import builtins
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hxcomm.sim import pictures
from hxcomm.sim.trace import Event

PNG = b"\x89PNG\r\n\x1a\n"
US = 10**6


class Use(NamedTuple):
    """As hxcomm.sim.engine.LinkUse."""

    source: int
    target: int
    nbytes: int
    busy_ps: int
    messages: int


def ring(n: int, directions: int = 2) -> list[Use]:
    forwards = [Use(i, (i + 1) % n, 3 << 20, 5 * US, 4) for i in range(n)]
    return forwards + [Use(each.target, each.source, 512, US, 4) for each in forwards if directions == 2 and n > 2]


def grid(side: int) -> list[Use]:
    right = [Use(i, i // side * side + (i + 1) % side, 1 << 20, i * US // 8, 2) for i in range(side * side)]
    return right + [Use(i, (i + side) % side**2, 1 << 20, US, 2) for i in range(side * side)]


def events(n: int) -> list[Event]:
    found = []
    for clock in ("virtual", "real"):
        for rank in range(n):
            found.append(Event(clock, rank, "ops", "aten::mm", rank * US, 4 * US, {}))  # type: ignore[arg-type]
            found.append(Event(clock, rank, "collectives", "all_reduce", (rank + 4) * US, US, {}))  # type: ignore[arg-type]
    return [*found, *[Event("virtual", i, f"link {i}->{(i + 1) % n}", "round 1", 4 * US, US, {}) for i in range(n)]]


def test_a_ring_of_four_is_drawn_with_each_links_bytes_and_busy_part() -> None:
    assert pictures.ring_text(ring(4), 10 * US).splitlines() == [
        "chip 0  ──  3→0        3 MiB   50% ██████████            ──  chip 3",
        "   │        0→3        512 B   10% ██                           │",
        "   │        0→1        3 MiB   50% ██████████                   │    2→3        3 MiB   50% ██████████",
        "   │        1→0        512 B   10% ██                           │    3→2        512 B   10% ██",
        "chip 1  ──  1→2        3 MiB   50% ██████████            ──  chip 2",
        "            2→1        512 B   10% ██",
        "bytes that each link carried, and the part of 10 us that it was busy",
    ]


def test_a_ring_of_an_odd_number_of_chips_closes_at_its_corner() -> None:
    assert pictures.ring_text(ring(3, directions=1), 10 * US).splitlines()[:3] == [
        "chip 0  ──  2→0        3 MiB   50% ██████████            ──  chip 2",
        "   │        0→1        3 MiB   50% ██████████                   │",
        "chip 1  ──  1→2        3 MiB   50% ██████████            ──     ╯",
    ]


@pytest.mark.parametrize("n", range(2, 17))
def test_a_ring_of_2_to_16_chips_fits_a_terminal_and_names_every_chip_and_link_once(n: int) -> None:
    text = pictures.ring_text(ring(n), 10 * US)
    assert max(map(len, text.splitlines())) <= 112
    words = text.split()
    assert sorted(word for word in words if "→" in word) == sorted(f"{u.source}→{u.target}" for u in ring(n))
    assert sorted(int(after) for word, after in pairwise(words) if word == "chip") == list(range(n))


def test_of_a_network_that_is_no_ring_the_busiest_links_are_listed() -> None:
    lines = pictures.ring_text(grid(4), 10 * US).splitlines()
    assert lines[0] == "15→12      1 MiB   19% ████"
    assert len(lines) == pictures.SHOWN_LINKS + 2
    assert lines[-2] == "and 16 more links, 0% to 10% busy"


def test_a_run_without_links_or_time_is_shown_all_the_same() -> None:
    assert pictures.ring_text([], 0) == "bytes that each link carried, and the part of 0 ps that it was busy"


@pytest.mark.parametrize(
    ("ps", "text"), [(0, "0 ps"), (999, "999 ps"), (1500, "1.50 ns"), (12_345_678, "12.3 us"), (2 * 10**12, "2 s")]
)
def test_a_time_has_three_digits_and_its_unit(ps: int, text: str) -> None:
    assert pictures.time_text(ps) == text


@pytest.mark.parametrize("n", [2, 3, 4, 16, 64])
def test_a_ring_becomes_a_picture(tmp_path: Path, n: int) -> None:
    pictures.ring_picture(tmp_path / "ring.png", ring(n), 10 * US)
    assert (tmp_path / "ring.png").read_bytes().startswith(PNG)


def test_the_picture_of_a_ring_has_every_links_bytes_and_part(tmp_path: Path) -> None:
    pictures.ring_picture(tmp_path / "ring.svg", ring(4), 10 * US, "four chips")
    drawn = (tmp_path / "ring.svg").read_text()
    assert [drawn.count(f"<!-- {text} -->") for text in ("four chips", "3 MiB", "50%", "512 B", "10%")] == [
        1,
        4,
        4,
        4,
        4,
    ]


@pytest.mark.parametrize("side", [4, 8])
def test_another_network_becomes_a_matrix(tmp_path: Path, side: int) -> None:
    pictures.ring_picture(tmp_path / "grid.png", grid(side), 10 * US)
    assert (tmp_path / "grid.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_timeline_has_a_lane_for_each_chip_and_link_under_both_clocks(tmp_path: Path, n: int) -> None:
    pictures.timeline_picture(tmp_path / "time.svg", events(n))
    drawn = (tmp_path / "time.svg").read_text()
    texts = ("virtual time", "real time", "chip 0 ops", "chip 0 collectives", f"link {n - 1} → 0")
    assert [drawn.count(f"<!-- {text} -->") for text in texts] == [1, 1, 2, 2, 1]


def test_a_timeline_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pictures.PictureError, match="there is nothing to draw"):
        pictures.timeline_picture(tmp_path / "time.png", [])


def test_curves_name_each_algorithm_and_gains_stand_beside_the_points(tmp_path: Path) -> None:
    times = {
        name: {1 << k: factor * (US + (1 << k)) for k in range(10, 31)}
        for name, factor in (("ring", 1), ("x", 3), ("as x", 3))
    }
    pictures.latency_picture(tmp_path / "latency.svg", times, "all_reduce")
    drawn = (tmp_path / "latency.svg").read_text()
    assert [drawn.count(f"<!-- {text} -->") for text in ("ring", "x = as x", "all_reduce", "1 KiB", "1 GiB")] == [1] * 5
    pictures.scaling_picture(tmp_path / "scaling.svg", {"on": {1: 8.0, 2: 4.0, 8: 2.0}, "off": {1: 8.0, 2: 5.0}})
    drawn = (tmp_path / "scaling.svg").read_text()
    assert [drawn.count(f"<!-- {text} -->") for text in ("2.00x", "4.00x", "1.60x", "on")] == [1, 1, 1, 2]


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    really_import = builtins.__import__

    def without_matplotlib(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return really_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(pictures.PictureError, match=r"pip install 'hxcomm\[bench\]'"):
        pictures.ring_picture(tmp_path / "ring.png", ring(4), US)
