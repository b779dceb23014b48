"""`hxcomm stats FOLDER`: the files of HXCOMM_STATS as a table with a bar for each rank and op. Needs no torch."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hxcomm.stats import recording

BAR = 24  # characters of the longest bar
WAITING, MOVING = "░", "█"
_NUMBERS = ("calls", "nbytes", "waiting_ns", "moving_ns")
_TEXTS = ("group", "op", "algorithm", "dtype", "memory")


class ReportError(Exception):
    """There is nothing to show. The text says why, and what to do."""


@dataclass(frozen=True)
class Process:
    """What one file says."""

    job: str
    rank: int
    world_size: int
    host: str
    pid: int
    program: str
    since: float
    until: float
    rows: tuple[Mapping[str, Any], ...]


@dataclass
class Sum:
    """Of one op on one rank, over all its groups and dtypes."""

    calls: int = 0
    nbytes: int = 0
    waiting_ns: int = 0
    moving_ns: int = 0
    algorithms: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        for number in _NUMBERS:
            setattr(self, number, getattr(self, number) + row[number])
        self.algorithms[row["algorithm"]] += row["calls"]


def run(folder: Path) -> str:
    """The whole text: one table for each job that wrote there, the one that wrote last at the end."""
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder")
    jobs: dict[str, list[Process]] = {}
    for file in sorted(folder.glob("hxcomm-stats-*.json")):
        process = read(file)
        jobs.setdefault(process.job, []).append(process)
    if not jobs:
        raise ReportError(
            f"{folder} holds no file of HXCOMM_STATS: set HXCOMM_STATS={folder} for the program, and see that it uses "
            "the backend hxcomm (nothing is written before its first group)"
        )
    ordered = sorted(jobs.values(), key=lambda processes: max(each.until for each in processes))
    return "\n\n".join(table(processes) for processes in ordered)


def read(file: Path) -> Process:
    """Raises ReportError where the file is none of recording.py's."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != recording.FORMAT:
            raise ReportError(f"{file} has format {record['format']}, this hxcomm reads {recording.FORMAT}")
        for row in record["rows"]:
            kinds = {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(_NUMBERS, int)}
            if wrong := [name for name, kind in kinds.items() if type(row[name]) is not kind]:
                raise TypeError(f"in {', '.join(wrong)} of a row")
        texts = {name: str(record[name]) for name in ("job", "host", "program")}
        numbers = {name: int(record[name]) for name in ("rank", "world_size", "pid")}
        times = {name: float(record[name]) for name in ("since", "until")}
        return Process(**texts, **numbers, **times, rows=tuple(record["rows"]))  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{file} is not a file that HXCOMM_STATS wrote ({type(error).__name__}: {error})") from None


def table(processes: Iterable[Process]) -> str:
    """Of one job: ops by the time spent in them, each with a line for each rank."""
    ranks = sorted(processes, key=lambda each: each.rank)
    sums: dict[str, dict[int, Sum]] = {}
    for process in ranks:
        for row in process.rows:
            sums.setdefault(row["op"], {}).setdefault(process.rank, Sum()).add(row)
    longest_ns = max((each.waiting_ns + each.moving_ns for of in sums.values() for each in of.values()), default=0)
    lines = [heading(ranks)]
    head = (
        f"{'op':<15}{'rank':>4}{'calls':>10}{'payload':>11}{'waiting':>11}{'moving':>11}  {'':<{BAR}}  algorithm: calls"
    )
    lines.append(head)
    for op, of in sorted(sums.items(), key=lambda item: -max(s.waiting_ns + s.moving_ns for s in item[1].values())):
        for index, (rank, each) in enumerate(sorted(of.items())):
            lines.append(f"{op if index == 0 else '':<15}{rank:>4}{line(each, longest_ns)}".rstrip())
    if not sums:
        lines.append("no collective has ended yet")
    lines.append(f"{WAITING} waiting for other ranks   {MOVING} moving and reducing data")
    return "\n".join(lines)


def heading(ranks: list[Process]) -> str:
    first = ranks[0]
    missing = sorted(set(range(first.world_size)) - {each.rank for each in ranks})
    lasted = max(each.until for each in ranks) - min(each.since for each in ranks)
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(each.until for each in ranks)))
    absent = f", none of rank {', '.join(map(str, missing))}" if missing else ""
    program = f"{first.program}: " if first.program else ""
    return f"{program}{first.world_size} ranks{absent}, {lasted:.1f} s up to {until} (job {first.job[-8:]})"


def line(each: Sum, longest_ns: int) -> str:
    total_ns = each.waiting_ns + each.moving_ns
    length = round(BAR * total_ns / longest_ns) if longest_ns else 0
    moving = round(length * each.moving_ns / total_ns) if total_ns else 0
    bar = MOVING * moving + WAITING * (length - moving)
    algorithms = ", ".join(f"{name}: {calls}" for name, calls in each.algorithms.most_common() if name)
    times = [_duration(ns) if total_ns else "-" for ns in (each.waiting_ns, each.moving_ns)]  # none of messages
    return f"{each.calls:>10}{_binary(each.nbytes):>11}{times[0]:>11}{times[1]:>11}  {bar:<{BAR}}  {algorithms}"


def _binary(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _duration(ns: int) -> str:
    return f"{ns / 1e6:.2f} ms" if ns < 1e9 else f"{ns / 1e9:.2f} s"
