"""How programs of several ranks end: PROGRAM with each of ENDINGS, and how long their processes take to be gone."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from chaos_processes import WATCHDOG_S, Process, end, wait

PROGRAM = """
import os, signal, sys
import torch
import torch.distributed as dist

dist.init_process_group("hxcomm")
pair = dist.new_group([0, 1])
rank = dist.get_rank()
for group in (None, pair):
    dist.all_reduce(torch.ones(1000), group=group)
    work = dist.all_reduce(torch.ones(300_000), group=group, async_op=True)
    work.wait()
dist.barrier()
ENDING
"""
# What each rank does then, and the status that it ends with.
ENDINGS = {
    "destroyed": ("dist.destroy_process_group()", 0),
    "subgroup first": ("dist.destroy_process_group(pair); dist.destroy_process_group()", 0),
    "one rank only": ("if rank == 0: dist.destroy_process_group()", 0),
    "not destroyed": ("", 0),
    "work outstanding": ("dist.all_reduce(torch.ones(10), async_op=True)", 0),
    "sys.exit": ("sys.exit(7)", 7),
    "exception": ("raise ValueError('mine')", 1),
    "_exit": ("os._exit(5)", 5),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def one_ending(ending: str) -> tuple[list[float], list[str], list[int | None]]:
    """Milliseconds from its last statement to the end of each of 2 processes, what they printed, and their statuses."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        stamp = f"import time; open({str(folder)!r} + f'/{{rank}}.at', 'w').write(str(time.monotonic()))"
        (folder / "program.py").write_text(PROGRAM.replace("ENDING", f"{stamp}\n{ending}"))
        children = [
            subprocess.Popen(
                [sys.executable, str(folder / "program.py")],
                stdout=(folder / f"{rank}.output").open("wb"),
                stderr=subprocess.STDOUT,
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", **address},
            )
            for rank in range(2)
        ]
        processes = [Process(rank, child.pid, os.pidfd_open(child.pid)) for rank, child in enumerate(children)]
        try:
            wait(processes, WATCHDOG_S)
            times = [
                1e3 * (process.ended_at - float((folder / f"{process.rank}.at").read_text())) for process in processes
            ]
            texts = [(folder / f"{rank}.output").read_text() for rank in range(2)]
            return times, texts, [process.status for process in processes]
        finally:
            end(processes)


def run_endings(repeats: int) -> tuple[str, int]:
    """A markdown table, and how many processes did not end as they should."""
    lines = ["| ending | processes | status right | silent | ms: median | max |", "|---|---|---|---|---|---|"]
    wrong = 0
    for name, (ending, status) in ENDINGS.items():
        rounds = [one_ending(ending) for _ in range(repeats)]
        times = [each for times, _, _ in rounds for each in times]
        right = sum(each == status for _, _, statuses in rounds for each in statuses)
        silent = sum(not text for _, texts, _ in rounds for text in texts)
        wrong += len(times) - right + (0 if name == "exception" else len(times) - silent)
        lines.append(
            f"| {name} | {len(times)} | {right} | {silent} | {statistics.median(times):.0f} | {max(times):.0f} |"
        )
    return "\n".join(lines), wrong
