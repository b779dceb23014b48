"""Pictures of a simulated run: the links of a ring in a terminal, and with matplotlib links, timelines and curves.

Times are integer picoseconds, and what is shown has its unit. Knows nothing of how the times came about. matplotlib is
imported when a picture is made: only that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxcomm.sim.trace import CLOCKS, Event

if TYPE_CHECKING:
    from hxcomm.sim.engine import LinkUse

RING_CHIPS = 16  # the largest ring that a terminal shows as one
SHOWN_LINKS = 16  # of other networks: the busiest
BAR = 20  # characters of a link that is always busy
_BUSY_COLORS = "viridis_r"
_KIND_COLORS = {"ops": "#4c78a8", "collectives": "#f58518", "links": "#54a24b"}
_MARKERS = "osD^vP*Xph"


class PictureError(ValueError):
    """The picture cannot be made. The text says why, and what to do."""


def require_matplotlib() -> None:
    """Raises PictureError where it is missing: to be called before a long run."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise PictureError("a picture needs matplotlib: pip install 'hxcomm[bench]'") from None


def size_text(nbytes: float) -> str:
    """Three digits and a unit: 384 MiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{_digits(nbytes / unit)} {name}"
    return f"{nbytes:g} B"


def time_text(ps: float) -> str:
    """Three digits and a unit: 12.3 us."""
    unit_ps, name = _time_unit(ps)
    return f"{_digits(ps / unit_ps)} {name}"


def _digits(value: float) -> str:
    if value >= 100 or value == round(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time_unit(ps: float) -> tuple[int, str]:
    """The unit in which `ps` is at least 1."""
    units = ((10**12, "s"), (10**9, "ms"), (10**6, "us"), (10**3, "ns"))
    return next(((unit, name) for unit, name in units if ps >= unit), (1, "ps"))


def _busy(link: LinkUse, total_ps: int) -> float:
    return link.busy_ps / total_ps if total_ps else 0.0


def _ring_size(links: Sequence[LinkUse]) -> int | None:
    """How many chips are in the ring that the links make (an open one, too); None where they make no ring."""
    n = 1 + max((max(link.source, link.target) for link in links), default=0)
    return n if n > 1 and all((link.target - link.source) % n in (1, n - 1) for link in links) else None


# --- in a terminal ---


def ring_text(links: Sequence[LinkUse], total_ps: int) -> str:
    """Each link with the bytes it carried and how long it was busy, of `total_ps`.

    A ring of up to 16 chips is drawn as one, first chip at the upper left and on anticlockwise; of other networks the
    busiest links are listed.
    """
    n = _ring_size(links)
    if n is None or n > RING_CHIPS:
        return _link_list(links, total_ps)
    texts: dict[int, list[str]] = {edge: [] for edge in range(n)}  # edge: from chip `edge` to the next one
    for link in sorted(links, key=lambda link: (link.target - link.source) % n != 1):
        forwards = (link.target - link.source) % n == 1
        texts[link.source if forwards else link.target].append(_link_text(link, total_ps))
    return "\n".join([*_ring_lines(n, texts), _heading(total_ps)])


def _ring_lines(n: int, texts: Mapping[int, list[str]]) -> list[str]:
    """Chips 0, 1 ... down the left side and on up the right side, so that as many as 16 fit in 100 columns."""
    left = (n + 1) // 2
    width = max((len(text) for each in texts.values() for text in each), default=0)
    lines = []

    def line(chip: str, rule: str, text: str, other: str, beside: str = "") -> None:
        lines.append(f"{chip:<8}{rule:<4}{text:<{width}}{rule:>4}  {other:<8}{beside}".rstrip())

    for i in range(left):
        across = (texts[n - 1] if i == 0 else []) + (texts[left - 1] if i == left - 1 else [])
        other = f"chip {n - 1 - i}" if i < n - left else "   ╯"
        line(f"chip {i}", "──" if across else "", across[0] if across else "", other)
        last = i == left - 1
        for text in across[1:]:
            line("" if last else "   │", "", text, "" if last else "   │")
        if not last:
            beside = texts[n - 2 - i] if i < n - left - 1 else []
            for here, there in zip_longest(texts[i] or [""], beside, fillvalue=""):
                line("   │", "", here, "   │", there)
    return lines


def _link_list(links: Sequence[LinkUse], total_ps: int) -> str:
    busiest = sorted(links, key=lambda link: (-link.busy_ps, link.source, link.target))
    lines = [_link_text(link, total_ps).rstrip() for link in busiest[:SHOWN_LINKS]]
    if more := busiest[SHOWN_LINKS:]:
        each = sorted(_busy(link, total_ps) for link in more)
        lines.append(f"and {len(more)} more links, {each[0]:.0%} to {each[-1]:.0%} busy")
    return "\n".join([*lines, _heading(total_ps)])


def _link_text(link: LinkUse, total_ps: int) -> str:
    busy = _busy(link, total_ps)
    ends = f"{link.source}→{link.target}"
    return f"{ends:<7} {size_text(link.nbytes):>8} {busy:>5.0%} {'█' * round(BAR * busy):<{BAR}}"


def _heading(total_ps: int) -> str:
    return f"bytes that each link carried, and the part of {time_text(total_ps)} that it was busy"


# --- with matplotlib ---


def ring_picture(path: Path | str, links: Sequence[LinkUse], total_ps: int, title: str = "") -> None:
    """The links of a ring as arrows between its chips; of another network as a matrix, from chip to chip."""
    n = _ring_size(links)
    figure = _figure((8.6, 7.6))
    axes = figure.add_subplot()
    if n is None or n > 2 * RING_CHIPS:
        drawn = _draw_matrix(axes, links, total_ps)
    else:
        drawn = _draw_ring(axes, n, links, total_ps)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, label=f"busy, of {time_text(total_ps)}")
    bar.ax.yaxis.set_major_formatter(_percent)
    axes.set_title(title or "Links: bytes carried and time busy")
    figure.savefig(path, dpi=130)


def _figure(inches: tuple[float, float]) -> Any:
    """One that belongs to no window: pictures are made on machines without a display."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout="constrained")


def _percent(value: float, _: object = None) -> str:
    return f"{value:.0%}"


def _shades() -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, 1), colormaps[_BUSY_COLORS])


def _draw_ring(axes: Any, n: int, links: Sequence[LinkUse], total_ps: int) -> Any:
    """Arrows to the next chip bend outwards, those back inwards; chip 0 is at the top, and on clockwise."""
    from matplotlib.patches import FancyArrowPatch

    shades = _shades()
    step = 2 * math.pi / n
    small = min(1.0, 10 / n)  # of 16 chips everything is smaller

    def at(position: float, radius: float = 1.0) -> tuple[float, float]:
        return radius * math.sin(position * step), radius * math.cos(position * step)

    for link in links:
        forwards = (link.target - link.source) % n == 1 and (n > 2 or link.source == 0)
        busy = _busy(link, total_ps)
        arrow = FancyArrowPatch(
            at(link.source),
            at(link.target),
            connectionstyle=f"arc3,rad={-0.18 if n > 2 else -0.3}",
            arrowstyle="-|>",
            mutation_scale=14 * small + 4,
            shrinkA=24 * small,
            shrinkB=24 * small,
            linewidth=1 + 3 * busy,
            color=shades.to_rgba(busy),
        )
        axes.add_patch(arrow)
        middle = link.source + 0.5 if forwards else link.target + 0.5
        beside = math.cos(step / 2) + (0.28 if forwards else -0.28)  # of the straight line between the chips
        x, y = at(middle, beside) if n > 2 else (0.5 if forwards else -0.5, 0.0)
        text = f"{size_text(link.nbytes)}\n{busy:.0%}"
        axes.text(x, y, text, ha="center", va="center", fontsize=6 + 4 * small)
    for chip in range(n):
        box = {"boxstyle": "circle,pad=0.35", "facecolor": "white", "edgecolor": "0.25", "linewidth": 1.4}
        axes.text(*at(chip), str(chip), ha="center", va="center", fontsize=7 + 6 * small, bbox=box)
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    axes.axis("off")
    return shades


def _draw_matrix(axes: Any, links: Sequence[LinkUse], total_ps: int) -> Any:
    n = 1 + max((max(link.source, link.target) for link in links), default=0)
    rows = [[math.nan] * n for _ in range(n)]
    for link in links:
        rows[link.source][link.target] = _busy(link, total_ps)
    image = axes.imshow(rows, cmap=_BUSY_COLORS, vmin=0, vmax=1)
    axes.set_xlabel("to chip (or switch)")
    axes.set_ylabel("from chip (or switch)")
    if n <= RING_CHIPS:
        axes.set_xticks(range(n))
        axes.set_yticks(range(n))
        for link in links:
            text = f"{size_text(link.nbytes)}\n{_busy(link, total_ps):.0%}"
            color = "white" if _busy(link, total_ps) > 0.5 else "black"
            axes.text(link.target, link.source, text, ha="center", va="center", fontsize=6, color=color)
    return image


def timeline_picture(path: Path | str, events: Iterable[Event], title: str = "") -> None:
    """A lane for each chip's ops and collectives and for each link, virtual time above, real time below if there is."""
    lanes: dict[tuple[str, int, str], list[Event]] = {}
    for event in sorted(events, key=lambda each: each.start_ps):
        lanes.setdefault((event.clock, event.rank, event.lane), []).append(event)
    clocks = [clock for clock in CLOCKS if any(key[0] == clock for key in lanes)]
    if not clocks:
        raise PictureError("a timeline of no events: there is nothing to draw")
    counts = [sum(key[0] == clock for key in lanes) for clock in clocks]
    figure = _figure((11, min(60.0, 1.6 + 0.24 * sum(counts) + 0.6 * len(clocks))))
    all_axes = figure.subplots(len(clocks), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, clock in zip(all_axes, clocks, strict=True):
        of_clock = {key[1:]: lane for key, lane in lanes.items() if key[0] == clock}
        _draw_lanes(axes, of_clock)
        axes.set_title(f"{clock} time" if not title or len(clocks) > 1 else title, loc="left", fontsize=10)
    if title and len(clocks) > 1:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw_lanes(axes: Any, lanes: Mapping[tuple[int, str], list[Event]]) -> None:
    from matplotlib.patches import Patch

    ordered = sorted(lanes, key=lambda lane: (lane[0], list(_KIND_COLORS).index(_kind(lane[1])), lane[1]))
    first = min(event.start_ps for lane in lanes.values() for event in lane)
    last = max(event.end_ps for lane in lanes.values() for event in lane)
    unit_ps, unit = _time_unit(max(1, last - first))
    for row, key in enumerate(ordered):
        spans = [((each.start_ps - first) / unit_ps, each.duration_ps / unit_ps) for each in lanes[key]]
        kind = _kind(key[1])
        color = _KIND_COLORS[kind]
        edge = color if kind == "links" else "white"  # a message is often narrower than a pixel: white would cover it
        axes.broken_barh(spans, (row - 0.38, 0.76), facecolor=color, edgecolor=edge, linewidth=0.4)
        # Calls that travel at once are drawn over each other: a name has the part before the next one.
        following_ps = [*(each.start_ps for each in lanes[key][1:]), last]
        for event, next_ps in zip(lanes[key], following_ps, strict=True):
            end_ps = min(event.end_ps, next_ps)
            room = 110 * (end_ps - event.start_ps) / max(1, last - first)  # characters of this size that fit
            if len(event.name) <= room:
                middle = ((event.start_ps + end_ps) / 2 - first) / unit_ps
                text = axes.text(middle, row, event.name, fontsize=6, color="white", clip_on=True)
                text.set(ha="center", va="center")
    for row in range(1, len(ordered)):
        if ordered[row][0] != ordered[row - 1][0]:
            axes.axhline(row - 0.5, color="0.75", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [_lane_name(rank, lane) for rank, lane in ordered], fontsize=8)
    axes.set(ylim=(len(ordered) - 0.4, -0.6), xlim=(0, (last - first) / unit_ps or 1), xlabel=f"time ({unit})")
    axes.grid(True, axis="x", alpha=0.35)
    axes.set_axisbelow(True)
    kinds = dict.fromkeys(_kind(lane) for _, lane in ordered)
    handles = [Patch(color=_KIND_COLORS[kind], label=kind) for kind in kinds]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8)


def _kind(lane: str) -> str:
    return "links" if lane.startswith("link ") else lane if lane in _KIND_COLORS else "ops"


def _lane_name(rank: int, lane: str) -> str:
    return lane.replace("->", " → ") if lane.startswith("link ") else f"chip {rank} {lane}"


def latency_picture(path: Path | str, times: Mapping[str, Mapping[int, int]], title: str = "") -> None:
    """Time against size, both logarithmic: a curve for each algorithm, as picoseconds by bytes. Equal ones are one."""
    figure = _figure((8, 5.4))
    axes = figure.add_subplot()
    named: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, curve in times.items():
        named.setdefault(tuple(sorted(curve.items())), []).append(name)
    for number, (points, names) in enumerate(named.items()):
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4.5, label=" = ".join(names))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda ps, _: time_text(ps))
    _size_ticks(axes, sorted({nbytes for curve in times.values() for nbytes in curve}))
    axes.set(xlabel="size", ylabel="time", title=title or "Time of one call")
    axes.grid(True, which="major", alpha=0.4)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _size_ticks(axes: Any, sizes: Sequence[int]) -> None:
    shown = sizes[:: max(1, -(-len(sizes) // 12))]
    axes.set_xticks(shown, [size_text(nbytes) for nbytes in shown], rotation=45)
    axes.minorticks_off()


def scaling_picture(path: Path | str, ms_per_token: Mapping[str, Mapping[int, float]], title: str = "") -> None:
    """Milliseconds per token and how many times as fast as one chip, against the number of chips.

    A curve for each name ("with overlap", "without overlap"), as milliseconds by chips; "how many times" is of the
    smallest number of chips of its own curve.
    """
    figure = _figure((10.5, 4.8))
    times, gains = figure.subplots(1, 2)
    chips = sorted({n for curve in ms_per_token.values() for n in curve})
    for number, (name, curve) in enumerate(ms_per_token.items()):
        marker, below = _MARKERS[number % len(_MARKERS)], number > 0
        counts = sorted(curve)
        times.plot(counts, [curve[n] for n in counts], marker=marker, label=name)
        gained = [curve[counts[0]] / curve[n] for n in counts]
        gains.plot(counts, gained, marker=marker, label=name)
        for n, gain in zip(counts[1:], gained[1:], strict=True):
            where = {"xytext": (5, -12) if below else (-5, 6), "textcoords": "offset points"}
            gains.annotate(f"{gain:.2f}x", (n, gain), **where, fontsize=8, ha="left" if below else "right")
    if chips:
        gains.plot(chips, [n / chips[0] for n in chips], color="0.6", linestyle=":", label="as many times as chips")
    for axes in (times, gains):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(chips, [str(n) for n in chips])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set_xlabel("chips")
        axes.margins(x=0.1)
        axes.grid(True, alpha=0.4)
        axes.legend(frameon=False)
    times.set_ylabel("time of a token (ms)")
    gains.set_ylabel(f"times as fast as {chips[0] if chips else 1} chip{'s' if chips and chips[0] > 1 else ''}")
    figure.suptitle(title or "Scaling")
    figure.savefig(path, dpi=130)
