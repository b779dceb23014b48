"""The long measurements of scripts/chaos.py: kills, aborts, and ranks that are only held up."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import chaos_rank
from chaos_processes import WATCHDOG_S, Process, end, events, start, wait

CORES = 2  # that all ranks share: more of them than cores is the hard case


@contextlib.contextmanager
def forked_ranks(rank_count: int, run: Callable[[int, Path], None]) -> Iterator[tuple[Path, list[Process]]]:
    """`run(rank, folder)` in a process each, on CORES cores; whatever still runs at the end is killed."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        processes = [start(rank, folder, lambda rank=rank: run(rank, folder)) for rank in range(rank_count)]
        try:
            yield folder, processes
        finally:
            end(processes)


def percentiles(times_ms: Sequence[float]) -> str:
    if len(times_ms) < 2:
        return f"ms: {', '.join(f'{each:.1f}' for each in times_ms) or 'none'}"
    p99 = statistics.quantiles(times_ms, n=100, method="inclusive")[98]
    return f"ms: p50 {statistics.median(times_ms):.1f}, p99 {p99:.1f}, max {max(times_ms):.1f}"


# --- kills ---


def left_behind() -> set[str]:
    """What dead processes could leave: files in /dev/shm, and sockets of hxcomm's name that no process has open."""
    shm = Path("/dev/shm")
    files = {str(path) for path in shm.iterdir()} if shm.is_dir() else set()
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if "hxcomm" in line]
    open_sockets = set()
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            open_sockets.add(str(path.readlink()))
    return files | {words[-1] for words in sockets if f"socket:[{words[6]}]" not in open_sockets}


def one_kill(rank_count: int, number: int, rng: random.Random) -> list[dict[str, Any]]:
    """One SIGKILL among `rank_count` ranks: per survivor {"ms", "rank", "signal"}; ms None where it raised nothing."""
    victim, waiting, delay_s = rng.randrange(rank_count), number % 2 == 1, rng.uniform(0.005, 0.05)

    def run(rank: int, folder: Path) -> None:
        chaos_rank.run_until_killed(rank, rank_count, waiting, victim, folder)

    with forked_ranks(rank_count, run) as (folder, processes):
        wait(processes, WATCHDOG_S, until=lambda: all(events(folder, rank) for rank in range(rank_count)))
        time.sleep(delay_s)
        killed_at = time.monotonic()
        os.kill(processes[victim].pid, signal.SIGKILL)
        wait(processes, WATCHDOG_S)
        rows = []
        for rank in set(range(rank_count)) - {victim}:
            error = next((event for event in events(folder, rank) if event["event"] == "raised"), None)
            message = error["message"] if error else ""
            rows.append(
                {
                    "ms": 1e3 * (error["at"] - killed_at) if error else None,
                    "rank": f"rank {victim} (" in message,
                    "signal": "SIGKILL" in message,
                    "waiting": waiting,
                }
            )
        return rows


def run_kills(kills: int, rank_count: int, seed: int, until: float) -> tuple[str, list[dict[str, Any]]]:
    rng, before = random.Random(seed), left_behind()
    rows: list[dict[str, Any]] = []
    done = 0
    while done < kills and time.monotonic() < until:
        rows += one_kill(rank_count, done, rng)
        done += 1
    times = [row["ms"] for row in rows if row["ms"] is not None]
    left = left_behind() - before
    return (
        f"{done} kills at {rank_count} ranks on {CORES} cores: {len(times)} of {len(rows)} survivors raised; "
        f"{sum(row['rank'] for row in rows)} named the rank, {sum(row['signal'] for row in rows)} the signal\n"
        f"from SIGKILL, {percentiles(times)}\n"
        f"left behind: {', '.join(sorted(left)) or 'nothing'}"
    ), rows


# --- aborts ---


def run_aborts(aborts: int, rank_count: int, seed: int) -> tuple[str, int]:
    """From abort() in a second thread of rank 0 to the exception of every blocked rank, and how many did not raise."""

    def run(rank: int, folder: Path) -> None:
        chaos_rank.run_aborts(rank, rank_count, aborts, seed, folder)

    with forked_ranks(rank_count, run) as (folder, processes):
        wait(processes, WATCHDOG_S + aborts)
        reports = [events(folder, rank) for rank in range(rank_count)]
    aborted_at = {event["number"]: event["at"] for event in reports[0] if event["event"] == "aborts"}
    times: list[list[float]] = [[], []]  # of the process that aborts, and of its peers
    for rank, report in enumerate(reports):
        for event in report:
            if event["event"] == "raised":
                times[rank > 0].append(1e3 * (event["at"] - aborted_at[event["number"]]))
    missing = aborts * (rank_count - 1) - len(times[0]) - len(times[1])  # one rank of each does not block
    return (
        f"{aborts} aborts at {rank_count} ranks on {CORES} cores; blocked calls that did not raise: {missing}\n"
        f"in the same process, {percentiles(times[0])}\nin the others, {percentiles(times[1])}"
    ), missing


# --- ranks that are held up ---


def run_soak(rank_count: int, seed: int, seconds: float) -> tuple[str, int]:
    """What a soak of `rank_count` ranks went through, and how many of them raised or did not end."""
    rng = random.Random(seed)
    stops, next_stop = 0, 0.0

    def run(rank: int, folder: Path) -> None:
        chaos_rank.run_soak(rank, rank_count, seconds, seed, folder)

    with forked_ranks(rank_count, run) as (folder, processes):

        def disturb() -> bool:
            nonlocal stops, next_stop
            if time.monotonic() > next_stop and all(events(folder, rank) for rank in range(rank_count)):
                victim = rng.choice(processes)
                if victim.status is None:
                    os.kill(victim.pid, signal.SIGSTOP)
                    time.sleep(0.3)
                    os.kill(victim.pid, signal.SIGCONT)
                    stops += 1
                next_stop = time.monotonic() + rng.uniform(0, 4)
            return False

        wait(processes, seconds + 2 * chaos_rank.SOAK_TIMEOUT_S, until=disturb)
        reports = [{event["event"]: event for event in events(folder, rank)} for rank in range(rank_count)]
    done = [report["done"] for report in reports if "done" in report]
    calls, held = sum(each["calls"] for each in done), sum(each["held"] for each in done)
    lines = [
        f"{rank_count} ranks on {CORES} cores for {seconds / 60:g} minutes: {calls} calls, {stops} stops of 300 ms, "
        f"the GIL held for {chaos_rank.GIL_HELD_S} s {held} times, {rank_count - len(done)} false alarms"
    ]
    for rank, report in enumerate(reports):
        if "done" not in report:
            last = report.get("wrong") or report.get("raised") or {"message": "did not end"}
            lines.append(f"    rank {rank}: {last['message'][:600]}")
    return "\n".join(lines), rank_count - len(done)
