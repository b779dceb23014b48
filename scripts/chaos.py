"""Kills, stops and breaks ranks in the middle of collectives, and checks what the others notice and say.

    python scripts/chaos.py --minutes 5                    # op x world size x fault x point, pairwise sampled
    python scripts/chaos.py --minutes 5 --device hx        # the same on tensors that peers reach themselves
    python scripts/chaos.py --minutes 5 --backend gloo     # the faults that need no point inside hxcomm
    python scripts/chaos.py --kills 1000                   # milliseconds from SIGKILL to exception, 8 ranks on 2 cores
    python scripts/chaos.py --cycles 200                   # a TorchComm is aborted, loses a rank and gains one, ...
    python scripts/chaos.py --aborts 200                   # milliseconds from abort() to the exceptions, likewise
    python scripts/chaos.py --endings 5                    # how long programs take to end, however they do it
    python scripts/chaos.py --soak --minutes 60            # false alarms: nobody fails, but ranks are held up

A case runs in fresh processes (forked from this one, which has imported torch and nothing else); a case that hangs is
ended after WATCHDOG_S. Expected of the survivors: after kill, exit and exception all raise within BOUND_S, naming the
rank and its signal; after stop the op's timeout ends it and names the stopped rank; stop300 (SIGSTOP for 300 ms) and
gil (Python's lock held for 5 s) go unnoticed. Never a wrong result. A failing case prints a line that repeats it.
A soak keeps 8 ranks on 2 cores in checked collectives and does the last two to them at random: no error may come of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import chaos_rank
from chaos_endings import run_endings
from chaos_measure import run_aborts, run_kills, run_soak
from chaos_processes import WATCHDOG_S, Process, end, events, start, wait
from chaos_rank import OPS, Case
from chaos_recovery import run_cycles

WORLD_SIZES = (2, 3, 4, 8)
FAULTS = ("kill", "exit", "exception", "stop", "stop300", "gil")
POINTS = ("before", "post", "staged", "arrived", "judged", "transfer", "published", "ended", "abort", "leave")
THROWING = ("before", "post", "staged", "arrived", "judged", "transfer", "published")
BOUND_S = 2.0
STOP_TIMEOUT_S = 3.0
LONG_TIMEOUT_S = 12.0  # longer than BOUND_S and than the GIL is held: what comes sooner is no timeout


@dataclass
class Outcome:
    """How a case went. `problems` is empty where it is as expected; `reached` False: the victim never came there."""

    case: Case
    reached: bool = True
    survivors: int = 0
    raised: int = 0
    named: int = 0
    signal_named: int = 0
    slowest_ms: float = 0.0
    problems: list[str] = field(default_factory=list)


def run_case(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        processes = [
            start(rank, folder, lambda rank=rank: chaos_rank.run(case, rank, folder)) for rank in range(case.world_size)
        ]
        survivors = [process for process in processes if process.rank != case.victim]
        victim = processes[case.victim]
        try:
            # With the victim among them: the moment of its end is noted when it comes.
            in_time = wait(processes, WATCHDOG_S, until=lambda: all(each.status is not None for each in survivors))
            if in_time:  # a stopped victim never ends
                wait([victim], WATCHDOG_S, until=lambda: is_stopped(victim.pid))
            outcome = judge(case, folder, processes)
            if not in_time:
                hung = [process.rank for process in survivors if process.status is None]
                outcome.problems.append(f"ranks {hung} did not end within {WATCHDOG_S:g} s")
            return outcome
        finally:
            end(processes)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] == "T"


def expectation(case: Case) -> str:
    """Of the survivors: `raise`, `succeed`, or `either` where they may have all they need before the victim fails."""
    if case.fault == "gil" or (case.fault == "stop300" and case.point != "abort"):
        return "succeed"
    return "either" if case.point == "leave" else "raise"


def judge(case: Case, folder: Path, processes: Sequence[Process]) -> Outcome:
    """Compares what the ranks reported with what the case expects of them."""
    outcome = Outcome(case, survivors=case.world_size - 1)
    victim = processes[case.victim]
    reports = [events(folder, process.rank) for process in processes]
    of_victim = {event["event"]: event for event in reports[case.victim]}
    expected = expectation(case)
    if expected != "succeed" and case.point != "before" and "done" in of_victim and victim.status == 0:
        outcome.reached, expected = False, "succeed"
    failed_at = of_victim["raised"]["at"] if "raised" in of_victim else victim.ended_at
    for process, report in zip(processes, reports, strict=True):
        last = {event["event"]: event for event in report}
        who = f"rank {process.rank}"
        if "wrong" in last:
            outcome.problems.append(f"{who} got a WRONG RESULT: {last['wrong']['message']}")
        elif process is victim and expected != "succeed":
            continue
        elif "raised" in last:
            outcome.raised += 1
            check_error(outcome, who, last, None if expected == "succeed" else failed_at)
        elif expected == "raise":
            outcome.problems.append(f"{who} raised nothing")
        elif "done" not in last and process.status is not None:
            output = (folder / f"{process.rank}.output").read_text(errors="replace")[-500:]
            outcome.problems.append(f"{who} ended with status {process.status}: {output}")
    return outcome


def check_error(outcome: Outcome, who: str, last: dict[str, dict[str, Any]], failed_at: float | None) -> None:
    """One survivor's exception. `failed_at` None: it should not have raised."""
    case, error = outcome.case, last["raised"]
    shown = f"{error['kind']}: {error['message'][:400]}"
    if failed_at is None:
        outcome.problems.append(f"{who} raised a false alarm: {shown}")
        return
    if f"rank {case.victim} (" in error["message"]:
        outcome.named += 1
    else:
        outcome.problems.append(f"{who} does not name rank {case.victim}: {shown}")
    if "SIGKILL" in error["message"]:
        outcome.signal_named += 1
    elif case.fault == "kill":
        outcome.problems.append(f"{who} does not name SIGKILL: {shown}")
    if case.fault == "stop":
        allowed_s, took_s = case.timeout_s + BOUND_S, error["at"] - last["call"]["at"]
    else:
        allowed_s, took_s = BOUND_S, error["at"] - failed_at
    outcome.slowest_ms = max(outcome.slowest_ms, 1e3 * took_s)
    if took_s > allowed_s:
        outcome.problems.append(f"{who} took {took_s:.2f} s to raise, more than {allowed_s:g} s: {shown}")


def is_valid(fault: str, point: str, op: str, backend: str) -> bool:
    if backend != "hxcomm" and point != "before":
        return False
    if fault == "gil":
        return point == "before"
    if fault == "exception" and point not in THROWING:
        return False
    return not (op == "barrier" and point == "transfer")  # a barrier moves nothing


def sampled(seed: int, backend: str, world_sizes: Sequence[int], device: str = "cpu") -> Iterator[Case]:
    """Cases such that every possible pair of (op, world size, fault, point) occurs in one: greedy, at random."""
    rng = random.Random(seed)
    every = [
        each
        for each in itertools.product(OPS, world_sizes, FAULTS, POINTS)
        if is_valid(each[2], each[3], each[0], backend)
    ]

    def pairs(each: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(each), 2))

    uncovered = set().union(*map(pairs, every))
    while uncovered:
        needed = rng.choice(sorted(uncovered))
        fitting = [each for each in every if needed in pairs(each)]
        best = max(rng.sample(fitting, min(40, len(fitting))), key=lambda each: len(pairs(each) & uncovered))
        uncovered -= pairs(best)
        op, world_size, fault, point = best
        yield make_case(op, world_size, fault, point, backend, rng.randrange(1 << 30), device)


def make_case(op: str, world_size: int, fault: str, point: str, backend: str, seed: int, device: str) -> Case:
    rng = random.Random(seed)
    nth = rng.randint(1, 3)
    timeout_s = STOP_TIMEOUT_S if fault == "stop" else LONG_TIMEOUT_S
    return Case(op, world_size, fault, point, nth, rng.randrange(world_size), backend, timeout_s, seed, device)


def repeat_line(case: Case) -> str:
    what = f"{case.op},{case.world_size},{case.fault},{case.point},{case.seed}"
    return f"python scripts/chaos.py --backend {case.backend} --device {case.device} --case {what}"


def run_cases(cases: Iterator[Case], until: float, limit: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for case in itertools.islice(cases, limit):
        if time.monotonic() > until:
            break
        outcome = run_case(case)
        outcomes.append(outcome)
        if outcome.problems:
            print(f"FAILED: {repeat_line(case)}", *outcome.problems, sep="\n    ", flush=True)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row a fault, with the cases in which the victim came to its point."""
    backend = outcomes[0].case.backend
    heads = (
        f"{backend} on {outcomes[0].case.device}: fault",
        "cases",
        "as expected",
        "not reached",
        "survivors raised",
        "naming the rank",
    )
    lines = ["| " + " | ".join((*heads, "its signal", "slowest")) + " |", "|---" * 8 + "|"]
    for fault in FAULTS:
        rows = [each for each in outcomes if each.case.fault == fault]
        if not rows:
            continue
        good = sum(not each.problems for each in rows)
        missed = sum(not each.reached for each in rows)
        raised = sum(each.raised for each in rows)
        survivors = sum(each.survivors for each in rows if each.reached)
        slowest = f"{max(each.slowest_ms for each in rows):.0f} ms" if raised else "-"
        named = f"{sum(each.named for each in rows)} of {raised}" if raised else "-"
        signalled = f"{sum(each.signal_named for each in rows)} of {raised}" if fault == "kill" and raised else "-"
        row = (fault, len(rows), good, missed, f"{raised} of {survivors}", named, signalled, slowest)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="hxcomm", help="hxcomm (default) or gloo")
    parser.add_argument("--device", default="cpu", choices=("cpu", "hx"), help="of the tensors (default cpu)")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no case after this long (default 10)")
    parser.add_argument("--cases", type=int, default=1_000_000, help="at most so many")
    parser.add_argument("--ranks", default="2,3,4,8", help="world sizes (default 2,3,4,8)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--kills", type=int, default=0, help="measure so many kills at 8 ranks instead")
    parser.add_argument("--aborts", type=int, default=0, help="measure so many aborts at 8 ranks instead")
    parser.add_argument("--cycles", type=int, default=0, help="measure so many recoveries of a TorchComm at 8 ranks")
    parser.add_argument("--endings", type=int, default=0, help="measure all endings of a program so many times")
    parser.add_argument("--soak", action="store_true", help="look for false alarms for --minutes, at 8 ranks")
    parser.add_argument("--case", help="op,ranks,fault,point,seed: repeat one")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    args = parser.parse_args()
    try:
        args.world_sizes = [int(word) for word in args.ranks.split(",")]
    except ValueError:
        parser.error(f"--ranks {args.ranks}: write world sizes, 2,3,4")
    if args.device == "hx" and (args.kills or args.cycles or args.aborts or args.endings or args.soak):
        parser.error("--device hx is for cases")
    if 0 < args.cycles < 4 or (args.cycles and max(args.world_sizes) < 3):
        parser.error("--cycles: 4 or more, with 3 ranks or more")
    if min(args.world_sizes) < 2:
        parser.error("--ranks: a case needs a victim and a survivor, so 2 ranks or more")
    if args.case:
        words = args.case.split(",")
        if len(words) != 5 or words[0] not in OPS or words[2] not in FAULTS or words[3] not in POINTS:
            parser.error(f"--case {args.case}: write op,ranks,fault,point,seed as a failing case prints it")
        given = (words[0], int(words[1]), words[2], words[3], args.backend, int(words[4]), args.device)
        args.cases_given = [make_case(*given)]
    else:
        args.cases_given = None
    return args


def main() -> int:
    args = parse()
    until = time.monotonic() + 60 * args.minutes
    print(f"seed {args.seed}", flush=True)
    if args.kills:
        shown, rows = run_kills(args.kills, max(args.world_sizes), args.seed, until)
        print(shown)
        if args.json:
            args.json.write_text(json.dumps(rows))
        return 0 if all(row["rank"] and row["signal"] for row in rows) else 1
    if args.cycles or args.aborts or args.endings or args.soak:
        if args.endings:
            shown, wrong = run_endings(args.endings)
        elif args.cycles:
            shown, wrong = run_cycles(args.cycles, max(args.world_sizes), args.seed)
        elif args.aborts:
            shown, wrong = run_aborts(args.aborts, max(args.world_sizes), args.seed)
        else:
            shown, wrong = run_soak(max(args.world_sizes), args.seed, 60 * args.minutes)
        print(shown)
        return 1 if wrong else 0
    cases = args.cases_given or itertools.chain.from_iterable(
        sampled(seed, args.backend, args.world_sizes, args.device) for seed in itertools.count(args.seed)
    )
    outcomes = run_cases(iter(cases), until, args.cases)
    print(table(outcomes))
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes)} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
