"""Kills and partitions where ranks are on several hosts: how long until every survivor raises, and what it names.

    sudo -E python scripts/chaos_hosts.py --kills 100 --layout 2,2
    sudo -E python scripts/chaos_hosts.py --partitions 10

The hosts are network namespaces of this machine (tests/hosts/networks.py), so it needs root. Ranks are forked, as in
scripts/chaos.py. A partition takes out the wire of the last host: neither side is told, nothing arrives any more.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import chaos_rank
from chaos_measure import CORES, forked_ranks, percentiles
from chaos_processes import WATCHDOG_S, Process, events, wait
from hosts.networks import Network, placed, sweep, why_not
from hosts.wires import in_namespace

from hxcomm import bootstrap

NOBODY = -1


def one_run(
    net: Network, layout: list[int], victim: int, waiting: bool, delay_s: float, fail: Callable[[list[Process]], None]
) -> list[dict[str, Any]]:
    """`all_reduce` again and again on all ranks until `fail(processes)`; what each that remains raised, and when."""
    host_of = [host for host, _ in placed(layout)]

    def run(rank: int, folder: Path) -> None:
        os.environ.update({"MASTER_ADDR": net.hosts[0].address, "HXCOMM_INSECURE": "1"})
        in_namespace(
            net.hosts[host_of[rank]].namespace,
            lambda: chaos_rank.run_until_killed(rank, len(host_of), waiting, victim, folder),
        )
        bootstrap.runtime().close_wire()  # as a program does at its exit, which a forked rank skips

    with forked_ranks(len(host_of), run) as (folder, processes):
        wait(processes, WATCHDOG_S, until=lambda: all(events(folder, rank) for rank in range(len(host_of))))
        time.sleep(delay_s)
        failed_at = time.monotonic()
        fail(processes)
        wait(processes, WATCHDOG_S)
        rows = []
        for rank in set(range(len(host_of))) - {victim}:
            error = next((event for event in events(folder, rank) if event["event"] == "raised"), None)
            row = {"rank": rank, "host": host_of[rank], "message": error["message"] if error else ""}
            rows.append({**row, "ms": 1e3 * (error["at"] - failed_at) if error else None})
        return rows


def show(rows: list[dict[str, Any]], what: str) -> None:
    times = [row["ms"] for row in rows if row["ms"] is not None]
    print(f"{what}: {len(times)} of {len(rows)} raised; {percentiles(times)}", flush=True)


def run_kills(net: Network, layout: list[int], kills: int, rng: random.Random) -> int:
    host_of = [host for host, _ in placed(layout)]
    rows: list[dict[str, Any]] = []
    for number in range(kills):
        victim = rng.randrange(len(host_of))

        def kill(processes: list[Process], victim: int = victim) -> None:
            os.kill(processes[victim].pid, signal.SIGKILL)

        for row in one_run(net, layout, victim, number % 2 == 1, rng.uniform(0.005, 0.05), kill):
            named = f"rank {victim} (" in row["message"]
            there = row["host"] == host_of[victim]
            rows.append({**row, "named": named, "signal": "SIGKILL" in row["message"], "there": there})
    print(f"{kills} kills at {'+'.join(map(str, layout))} ranks on {CORES} cores")
    show([row for row in rows if not row["there"]], "survivors on other hosts")
    show([row for row in rows if row["there"]], "survivors beside it")
    named, told = sum(row["named"] for row in rows), sum(row["signal"] for row in rows)
    print(f"{named} of {len(rows)} named the rank, {told} the signal")
    for row in rows:
        if not row["named"]:
            print(f"    rank {row['rank']}: {row['message'] or 'raised nothing'}")
    return sum(not row["named"] for row in rows)


def run_partitions(net: Network, layout: list[int], partitions: int, rng: random.Random) -> int:
    rows: list[dict[str, Any]] = []
    host_of = [host for host, _ in placed(layout)]
    for _ in range(partitions):
        rows += one_run(net, layout, NOBODY, False, rng.uniform(0.005, 0.05), lambda _: net.hosts[-1].disconnect())
        net.hosts[-1].connect()
    named = [any(f"rank {r} (" in row["message"] for r, h in enumerate(host_of) if h != row["host"]) for row in rows]
    print(f"{partitions} partitions at {'+'.join(map(str, layout))} ranks on {CORES} cores")
    show(rows, "ranks")
    print(f"{sum(named)} of {len(rows)} named a rank of the other side")
    return sum(not each for each in named)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="so many, each of a rank at random")
    parser.add_argument("--partitions", type=int, default=0, help="so many")
    parser.add_argument("--layout", default="2,2", help="ranks on each host (2,2)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    sweep()
    layout, rng = [int(count) for count in args.layout.split(",")], random.Random(args.seed)
    net = Network(len(layout))
    try:
        wrong = run_kills(net, layout, args.kills, rng) if args.kills else 0
        return int(wrong + (run_partitions(net, layout, args.partitions, rng) if args.partitions else 0) > 0)
    finally:
        net.close()


if __name__ == "__main__":
    sys.exit(main())
