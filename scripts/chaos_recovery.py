"""scripts/chaos.py --cycles: one communicator that is aborted, loses a rank and gains one, over and over.

A cycle: a thread of one rank aborts the group that all but one are blocked in, and the same eight reconfigure; one of
them is killed with SIGKILL, in a collective or, every other time, while the others wait for it, and the seven
reconfigure; a fresh process joins, and they are eight. What the two witnesses, who are never killed, hold of the
system's resources must not grow. Processes agree on who is killed and where a newcomer stands without asking.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chaos_rank
import torch
import torch.distributed as dist
from chaos_measure import CORES, percentiles
from chaos_processes import WATCHDOG_S, Process, end, start

import hxcomm.torchcomms as torchcomms

WITNESSES = (0, 1)
RESOURCES = ("descriptors", "threads", "maps", "segments")
COUNT = 64


def victim_of(members: Sequence[int], cycle: int, seed: int) -> int:
    return random.Random(f"{seed}/{cycle}").choice([number for number in members if number not in WITNESSES])


def grown(members: Sequence[int], cycle: int, newcomer: int) -> list[int]:
    """Newcomers come to stand anywhere, so that every rank's number dies and stays."""
    at = 5 * cycle % (len(members) + 1)
    return [*members[:at], newcomer, *members[at:]]


def resources() -> dict[str, int]:
    """Of this process."""
    names = {"descriptors": "fd", "threads": "task"}
    counts = {what: len(list(Path(f"/proc/self/{folder}").iterdir())) for what, folder in names.items()}
    maps = Path("/proc/self/maps").read_text().splitlines()
    segments = sum("memfd:hxcomm" in line for line in maps)
    return counts | {"maps": len(maps), "segments": segments}


# --- a rank -----------------------------------------------------------------------------------------------------------


class Member:
    """One process of the communicator; `number` is its name for good, not its rank."""

    def __init__(self, number: int, members: Sequence[int], seed: int, folder: Path) -> None:
        self.number, self.members, self.seed = number, list(members), seed
        self.say = chaos_rank.reporter(folder, number)
        self.store = dist.FileStore(str(folder / "store"))
        self.op = torchcomms.ReduceOp.SUM
        self.comm = torchcomms.new_comm(
            "hxcomm",
            "cpu",
            "chaos",
            store=self.store,
            enable_reconfigure=True,
            abort_process_on_timeout_or_error=False,
            timeout=datetime.timedelta(seconds=WATCHDOG_S),
        )
        self.handles: dict[int, str] = {}
        self.store.set(f"handle/{number}", self.comm.get_init_handle())

    def reconfigure(self, uuid: int, what: str, cycle: int) -> None:
        """Reports when it was called and when the new group had carried out its first all_reduce."""
        for number in self.members:
            if number not in self.handles:
                self.handles[number] = self.store.get(f"handle/{number}").decode()
        handles = [self.handles[number] for number in self.members]
        called_at = time.monotonic()
        self.comm.reconfigure(uuid, handles)
        returned_at = time.monotonic()
        tensor = torch.full((COUNT,), float(self.number))
        self.comm.all_reduce(tensor, self.op, False)
        if tensor.tolist() != [float(sum(self.members))] * COUNT:
            raise chaos_rank.WrongResultError(f"after {what}: {tensor[0]} and not {sum(self.members)}")
        self.say(what, cycle=cycle, called_at=called_at, returned_at=returned_at, **resources())

    def abort(self, cycle: int) -> None:
        """All but one are blocked when a thread of another one aborts."""
        place, ranks = self.members.index(self.number), len(self.members)
        tensor = torch.zeros(COUNT)
        if place == (cycle + 1) % ranks:
            self.store.wait([f"aborted/{cycle}"], datetime.timedelta(seconds=WATCHDOG_S))
        elif place == cycle % ranks:

            def end_it() -> None:
                time.sleep(random.Random(f"{self.seed}/{cycle}/abort").uniform(0.005, 0.05))
                self.say("aborts", cycle=cycle)
                self.comm.abort()

            threading.Thread(target=end_it).start()
        try:
            self.comm.all_reduce(tensor, self.op, False)
        except dist.DistBackendError as error:
            self.say("aborted", cycle=cycle, blocked=place != (cycle + 1) % ranks, kind=type(error).__name__)
        if place == cycle % ranks:
            self.store.set(f"aborted/{cycle}", "")

    def lose_one(self, cycle: int) -> None:
        victim = victim_of(self.members, cycle, self.seed)
        tensor = torch.zeros(COUNT)
        try:
            while self.number != victim or cycle % 2 == 0:
                self.comm.all_reduce(tensor, self.op, False)
            signal.pause()
        except dist.DistBackendError as error:
            named = getattr(error, "rank", None) == self.members.index(victim)
            self.say("raised", cycle=cycle, kind=type(error).__name__, named=named, signal="SIGKILL" in str(error))
        self.members.remove(victim)

    def live(self, first: int, cycles: int, ranks: int) -> None:
        """From its first group to the end of the last cycle."""
        for cycle in range(first, cycles):
            self.abort(cycle)
            self.reconfigure(3 * cycle + 1, "again", cycle)
            self.lose_one(cycle)
            self.reconfigure(3 * cycle + 2, "shrunk", cycle)
            newcomer = ranks + cycle
            self.members = grown(self.members, cycle, newcomer)
            self.store.set(f"members/{newcomer}", json.dumps(self.members))
            self.reconfigure(3 * cycle + 3, "grown", cycle)
        self.comm.finalize()
        self.say("done")


def run_member(number: int, ranks: int, cycles: int, seed: int, folder: Path) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives a killed runner
    torch.set_num_threads(1)
    try:
        member = Member(number, range(ranks), seed, folder)
        if number < ranks:
            member.reconfigure(0, "grown", -1)
            member.live(0, cycles, ranks)
        else:
            member.members = json.loads(member.store.get(f"members/{number}"))
            cycle = number - ranks
            member.reconfigure(3 * cycle + 3, "grown", cycle)
            member.live(cycle + 1, cycles, ranks)
    except Exception as error:
        chaos_rank.reporter(folder, number)("failed", kind=type(error).__name__, message=str(error))


# --- all of them ------------------------------------------------------------------------------------------------------


class Reports:
    """What the processes of a run have said so far, read as it comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[int, list[dict[str, Any]]] = {}
        self._read: dict[int, int] = {}
        self._of: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}

    def look(self, number: int) -> list[dict[str, Any]]:
        path = self.folder / str(number)
        if path.exists():
            with path.open() as file:
                file.seek(self._read.get(number, 0))
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    event = json.loads(line)
                    self.said.setdefault(number, []).append(event)
                    self._of.setdefault((event["event"], event.get("cycle", -1)), {})[number] = event
                    self._read[number] = self._read.get(number, 0) + len(line)
        return self.said.get(number, [])

    def of(self, event: str, cycle: int) -> dict[int, dict[str, Any]]:
        return self._of.get((event, cycle), {})


def run_cycles(cycles: int, ranks: int, seed: int) -> tuple[str, int]:
    """What was measured, as text, and how much of it went wrong."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        reports = Reports(folder)
        processes: dict[int, Process] = {}
        killed_at: list[float] = []

        def launch(number: int) -> None:
            processes[number] = start(number, folder, lambda: run_member(number, ranks, cycles, seed, folder))

        def all_said(event: str, cycle: int, numbers: Sequence[int]) -> None:
            wait_until(lambda: all(said(reports.look(number), event, cycle) for number in numbers), reports, event)

        members = list(range(ranks))
        try:
            for number in members:
                launch(number)
            for cycle in range(cycles):
                all_said("again", cycle, members)
                victim = victim_of(members, cycle, seed)
                time.sleep(random.Random(f"{seed}/{cycle}/kill").uniform(0.005, 0.05))
                killed_at.append(time.monotonic())
                os.kill(processes[victim].pid, signal.SIGKILL)
                members.remove(victim)
                end([processes.pop(victim)])
                all_said("shrunk", cycle, members)
                launch(ranks + cycle)
                members = grown(members, cycle, ranks + cycle)
            all_said("done", -1, members)
        except RuntimeError as error:
            return f"{error}\n{len(killed_at)} of {cycles} cycles", 1
        finally:
            end(list(processes.values()))
        return summary(reports, killed_at, ranks)


def said(events: Sequence[dict[str, Any]], event: str, cycle: int) -> bool:
    return any(each["event"] == event and each.get("cycle", -1) == cycle for each in events[-8:])


def wait_until(holds: Callable[[], bool], reports: Reports, what: str) -> None:
    deadline = time.monotonic() + WATCHDOG_S
    while not holds():
        failed = [each for events in reports.said.values() for each in events[-1:] if each["event"] == "failed"]
        if failed or time.monotonic() > deadline:
            raise RuntimeError(f"waiting for {what}: {failed or 'nothing came in time'}")
        time.sleep(0.002)


def summary(reports: Reports, killed_at: Sequence[float], ranks: int) -> tuple[str, int]:
    cycles = len(killed_at)
    named = signalled = n_raised = n_aborted = 0
    spans: dict[str, list[float]] = {"again": [], "shrunk": [], "grown": []}
    deaths: list[float] = []
    aborts: list[float] = []
    whole: list[float] = []
    for cycle in range(cycles):
        for what, times in spans.items():
            events = reports.of(what, cycle).values()
            times.append(1e3 * (max(e["returned_at"] for e in events) - min(e["called_at"] for e in events)))
        whole.append(1e3 * (max(e["at"] for e in reports.of("shrunk", cycle).values()) - killed_at[cycle]))
        raised = [e for e in reports.of("raised", cycle).values() if e["kind"] == "PeerFailedError"]
        n_raised += len(raised)
        named, signalled = named + sum(e["named"] for e in raised), signalled + sum(e["signal"] for e in raised)
        deaths += [1e3 * (e["at"] - killed_at[cycle]) for e in raised]
        (began,) = reports.of("aborts", cycle).values()
        ended = [e for e in reports.of("aborted", cycle).values() if e["kind"] == "AbortedError"]
        n_aborted += len(ended)
        aborts += [1e3 * (e["at"] - began["at"]) for e in ended if e["blocked"]]
    survivors = cycles * (ranks - 1)
    lines = [
        f"{cycles} cycles of one communicator at {ranks} ranks on {CORES} cores",
        f"R9: {n_aborted} of {cycles * ranks} ranks raised AbortedError; blocked ones, from abort(), "
        f"{percentiles(aborts)}",
        f"R1: {n_raised} of {survivors} survivors raised; from SIGKILL, {percentiles(deaths)}",
        f"R4: {named} named the rank, {signalled} the signal",
        f"R10: {ranks} -> {ranks - 1}, from the first call of reconfigure to the last return, "
        f"{percentiles(spans['shrunk'])}",
        f"     from SIGKILL to the last one's first result in the new group, {percentiles(whole)}",
        f"     the same {ranks} after abort(), {percentiles(spans['again'])}",
        f"     {ranks - 1} -> {ranks} with a fresh process, {percentiles(spans['grown'])}",
    ]
    wrong = cycles * ranks - n_aborted + 3 * survivors - n_raised - named - signalled
    for witness in WITNESSES:
        held = [each for each in reports.said[witness] if each["event"] == "grown"]
        quarter = len(held) // 4  # the first one is for allocators and pools of threads to get what they keep
        before = {key: max(each[key] for each in held[quarter : 2 * quarter]) for key in RESOURCES}
        after = {key: statistics.median_low([each[key] for each in held[-quarter:]]) for key in RESOURCES}
        wrong += sum(after[key] > before[key] for key in RESOURCES)
        lines.append(f"process {witness}: in the second quarter {before}, in the last {after}")
    return "\n".join(lines), wrong
