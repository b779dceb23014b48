"""`hxcomm chips`: which chips there are, and of one where each value is from and what its links can execute."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hxcomm import algorithms
from hxcomm.sim import chips
from hxcomm.sim.chips import Chip
from hxcomm.sim.interconnect import interconnect
from hxcomm.sim.legality import legal

ROOT = 0  # of the rooted ops, as `hxcomm show` draws them


def run(options: argparse.Namespace) -> str:
    """What the command prints. Raises ChipError or InterconnectError, both ValueError."""
    if options.chip is None:
        table = {name: chips.load(name) for name in chips.names()}
        return (
            json.dumps({name: chips.as_table(chip) for name, chip in table.items()}) if options.json else _list(table)
        )
    chip = chips.load(options.chip)
    executes = list(_executes(chip, options.ranks))
    if options.json:
        words = [{"op": op, "algorithm": name, "refused": why} for op, name, why in executes]
        return json.dumps({**chips.as_table(chip), "ranks": options.ranks, "algorithms": words})
    return explanation(chip, options.ranks, executes)


def _list(table: Mapping[str, Chip]) -> str:
    rows = [("chip", "memory", "link", "peak", "")]
    for name, chip in table.items():
        links = "/".join(f"{each.topology} {each.bandwidth_bytes_per_s / 1e9:g}" for each in chip.links)
        memory = f"{chip.memory.bandwidth_bytes_per_s / 1e9:g} GB/s"
        best = max(chip.compute.flops_per_s, key=lambda dtype: chip.compute.flops_per_s[dtype])
        peak = f"{chip.compute.flops_per_s[best] / 1e12:g} T {best}"
        rows.append((name, memory, f"{links} GB/s", peak, chip.description))
    return "\n".join(_columns(rows))


def explanation(chip: Chip, ranks: int, executes: list[tuple[str, str, str | None]]) -> str:
    """Every value with its unit in its name and its source beside it, then the algorithms."""
    rows = []
    for key, value in _values({k: v for k, v in chips.as_table(chip).items() if k not in ("name", "description")}):
        if not key.startswith("sources."):
            rows.append((key, _shown(value), chip.sources.get(key, "default, or no source given")))
    if chip.collective.reduce_bytes_per_s is None:
        rate = f"{float(chip.reduce_bytes_per_s):g}"
        rows.append(("collective.reduce_bytes_per_s", rate, "derived: memory.bandwidth_bytes_per_s x memory.achieved"))
    network = interconnect(chip, ranks)
    lines = [f"{chip.name}: {chip.description}", "", *_columns(rows), "", f"{ranks} of them: {network.text()}"]
    lines.append("algorithms that the links can execute, and of the others the first transfer that they cannot")
    lines += _columns([(op, name, _reason(why)) for op, name, why in executes])
    return "\n".join(lines)


def _executes(chip: Chip, ranks: int) -> Iterator[tuple[str, str, str | None]]:
    network = interconnect(chip, ranks)
    for op in algorithms.OPS:
        for name in algorithms.names(op):
            root = ROOT if op in algorithms.ROOTED else None
            yield op, name, legal(algorithms.build(op, name, ranks, root, network.hosts), chip, network)


def _reason(refused: str | None) -> str:
    """Without the words that the row says already."""
    return "yes" if refused is None else refused[refused.find("round ") :]


def _values(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    inside = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in inside:
        name = f"{prefix}{key}"
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from _values(value, f"{name}.")
        else:
            yield name, value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
