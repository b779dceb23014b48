"""`hxcomm top`: who is in which collective, since when, and who is missing. Prints what inspection.py reads."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hxcomm.inspection import NotReadableError, Operation, RankView, processes, ranks_of

REFRESH_S = 1.0
_CLEAR = "\x1b[H\x1b[2J"
_MAX_NAMED = 8  # ranks in one line


@dataclass(frozen=True)
class GroupView:
    """A group, put together from the segments of all its processes that could be read."""

    name: str
    nonce: int
    world_size: int
    ranks: tuple[RankView, ...]

    def sequence(self) -> int | None:
        """The furthest collective that a rank is in now; None where none is in one."""
        return max((rank.sequence for rank in self.ranks if rank.open_collective() is not None), default=None)

    def missing(self) -> list[int]:
        """The ranks that have not arrived at it, those that were not found among them."""
        sequence = self.sequence()
        if sequence is None:
            return []
        arrived = {rank.rank for rank in self.ranks if rank.sequence >= sequence}
        return [rank for rank in range(self.world_size) if rank not in arrived]


def look(pid: int | None) -> tuple[list[GroupView], list[str]]:
    """The groups of one process (None: of all of this user's), and what could not be read.

    The ranks of such a group that are other processes are found, too.
    """
    views: list[RankView] = []
    problems = []
    pids = processes()
    for each in pids if pid is None or pid in pids else [pid, *pids]:
        try:
            views += ranks_of(each)
        except NotReadableError as error:
            if pid in (None, each):
                problems.append(str(error))
    by_group: dict[tuple[int, int], list[RankView]] = {}
    for view in views:
        by_group.setdefault((view.nonce, view.world_size), []).append(view)
    groups = [
        GroupView(ranks[0].group, nonce, world_size, tuple(sorted(ranks, key=lambda each: each.rank)))
        for (nonce, world_size), ranks in by_group.items()
        if pid is None or pid in [each.pid for each in ranks]
    ]
    return groups, problems


def run(pid: int | None, as_json: bool, once: bool) -> int:
    """Prints every second until Ctrl-C, or once. Returns 1 where there is nothing to see, with the reason on stderr."""
    try:
        while True:
            groups, problems = look(pid)
            if not groups:
                where = "no process of this user is in a group of hxcomm" if pid is None else _nothing_in(pid)
                print(f"hxcomm top: {'; '.join(problems) or where}", file=sys.stderr)
                return 1
            if as_json:
                print(json.dumps([_as_json(group) for group in groups]), flush=True)
            else:
                now_ns = time.monotonic_ns()
                clear = _CLEAR if sys.stdout.isatty() and not once else ""
                print(clear + "\n\n".join([*(text(group, now_ns) for group in groups), *problems]), flush=True)
            if once:
                return 0
            time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        return 0


def _nothing_in(pid: int) -> str:
    return f"process {pid} is in no group of hxcomm (it has made none yet, or has destroyed it)"


def _as_json(group: GroupView) -> dict[str, object]:
    return {
        "group": group.name,
        "nonce": group.nonce,
        "world_size": group.world_size,
        "sequence": group.sequence(),
        "missing": group.missing(),
        "ranks": [asdict(rank) for rank in group.ranks],
        "now_ns": time.monotonic_ns(),
    }


def text(group: GroupView, now_ns: int) -> str:
    """The table of one group, and below it who is missing."""
    rows: list[tuple[str, ...]] = [("rank", "pid", "process", "in", "#", "bytes", "since", "called at", "")]
    for rank in group.ranks:
        rows.append(_row(rank, now_ns))
    found = {rank.rank for rank in group.ranks}
    absent = [rank for rank in range(group.world_size) if rank not in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"group {group.name!r}, {group.world_size} ranks"]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if absent:
        lines.append(f"  not found: {_ranks(absent)} (dead, has left the group, or of another user or host)")
    sequence, missing = group.sequence(), group.missing()
    if sequence is not None:
        waiting = next(rank for rank in group.ranks if rank.sequence == sequence and rank.open_collective())
        op = waiting.open_collective()
        assert op is not None
        what = f"{op.op} #{sequence}"
        lines.append(
            f"  {what}: {_named(missing, group)} missing" if missing else f"  {what}: all ranks have called it"
        )
    return "\n".join(lines)


def _ranks(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers[:_MAX_NAMED]]
    if len(numbers) > _MAX_NAMED:
        shown.append(f"... ({len(numbers)} in all)")
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(shown)}"


def _named(missing: Sequence[int], group: GroupView) -> str:
    if len(missing) > _MAX_NAMED:
        return _ranks(missing)
    views = {view.rank: view for view in group.ranks}
    return ", ".join(
        f"rank {rank} (pid {views[rank].pid}, {views[rank].process})" if rank in views else f"rank {rank} (not found)"
        for rank in missing
    )


def _row(rank: RankView, now_ns: int) -> tuple[str, ...]:
    collective, messages = rank.open_collective(), rank.open_messages()
    opened = [collective] if collective is not None else []
    opened += messages
    notes = [f"closed: {rank.ended_by}"] if rank.ended_by else []
    if len(opened) > 1 or rank.queued > 1:
        notes.append(f"{max(rank.queued, int(collective is not None)) + len(messages)} calls pending")
    head = (str(rank.rank), str(rank.pid), rank.process)
    if opened:
        op = opened[0]
        size = _size(op.nbytes) if op.op != "barrier" else ""
        return (
            *head,
            _name(op),
            str(op.sequence or ""),
            size,
            _since(op.posted_ns, now_ns),
            op.call_site,
            "; ".join(notes),
        )
    if not rank.operations:
        return (*head, "no call yet", "", "", "", "", "; ".join(notes))
    last = rank.operations[-1]
    ended = _since(last.ended_ns or last.posted_ns, now_ns)
    notes.insert(0, f"last: {_name(last)}{f' #{last.sequence}' if last.sequence else ''}, {last.state}")
    return (*head, "no call", "", "", ended, last.call_site, "; ".join(notes))


def _name(op: Operation) -> str:
    if not op.is_message:
        return op.op
    peer = "any rank" if op.root is None else f"rank {op.root}"
    return f"{op.op} {'from' if op.op in ('recv', 'wait_signal') else 'to'} {peer}"


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _since(then_ns: int, now_ns: int) -> str:
    return f"{max(0, now_ns - then_ns) * 1e-9:.1f} s"
