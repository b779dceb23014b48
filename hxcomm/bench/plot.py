"""The picture of one run: all_reduce's time against size. Needs matplotlib, which nothing else of hxcomm does."""

from __future__ import annotations

from pathlib import Path

from hxcomm.bench.arguments import UsageError
from hxcomm.bench.results import Report


def require() -> None:
    """Raises UsageError where matplotlib is missing: before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("--plot needs matplotlib: pip install 'hxcomm[bench]'") from None


def draw(report: Report, path: Path) -> None:
    """Writes `path` (PNG, SVG or PDF by its ending): medians of all_reduce (or the first op) and the floors."""
    import matplotlib as mpl

    mpl.use("Agg")  # no window: ranks have no display
    from matplotlib import pyplot as plt

    ops = [row.op for row in report.rows if row.nbytes > 0]
    op = "all_reduce" if "all_reduce" in ops else ops[0] if ops else None
    if op is None:
        raise UsageError("--plot: none of the measured ops has a size")
    styles = {report.backend: ("C0", "o-"), report.compare: ("C1", "s-"), "nothing": ("0.6", ":")}
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, (color, style) in styles.items():
        points = [
            (row.nbytes, row.p50_us) for row in report.rows if (row.backend, row.op) == (name, op) and row.p50_us > 0
        ]
        label = "c10d alone (a backend that does nothing)" if name == "nothing" else name
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
    if op == "all_reduce" and report.floors:
        sizes = [floor.nbytes for floor in report.floors]
        axes.plot(sizes, [f.transfers_us for f in report.floors], "C2--", label="floor: the plan's transfers alone")
        copies = [f.nbytes / f.copy_gbps / 1e3 for f in report.floors]
        axes.plot(sizes, copies, "C3-.", label="memcpy of as many bytes", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row.nbytes for row in report.rows if row.op == op})
    axes.set_xticks(ticks, [_size(nbytes) for nbytes in ticks], rotation=45)
    axes.set_xlabel("size")
    axes.set_ylabel("median time of a call (µs)")
    axes.set_title(f"{op}, {report.world_size} ranks on {report.cores} cores")
    axes.grid(True, which="major", alpha=0.4)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _size(nbytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"
