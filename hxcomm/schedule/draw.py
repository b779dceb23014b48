"""Schedules and plans as text, for people: what `hxcomm show` prints."""

from __future__ import annotations

from collections.abc import Sequence

from hxcomm.schedule.crossing import across_hosts
from hxcomm.schedule.lowering import lower
from hxcomm.schedule.plan import CROSSES, Agree, Enter, Operand, Plan, Publish, Receive, TransferInstruction, Wait
from hxcomm.schedule.schedule import Location, Schedule, Transfer
from hxcomm.schedule.symbolic import Mark

# Columns of ranks are broken into several tables at this width, which a terminal on half a screen still shows.
WIDTH = 120

LEGEND = """\
i, o, s: a chunk of the input, the output, the scratch; 2:i0: of rank 2, without a rank: the own one
i0 > o0: copy          i0 + 1:i0 > o0, 1:o0: reduce in this order and store to both          0..3:i0: of ranks 0 to 3"""
LEGEND_OF_HOSTS = "i0 > 2:m1: send to rank 2, on another host, as its message 1          m1 > o0: store what was sent"


def text(schedule: Schedule, private: bool = False, hosts: Sequence[int] | None = None) -> str:
    """A table of rounds and ranks. private: as it runs on private memory, with its staging in round 0.

    hosts: the number of each rank's host, where they are not all on one.
    """
    schedule = lower(schedule, private=True, hosts=hosts) if private else across_hosts(schedule, hosts)
    ranks = range(schedule.world_size)
    rows = []
    for number, transfers in schedule.numbered_rounds():
        cells: list[list[str]] = [[] for _ in ranks]
        for transfer in transfers:
            cells[transfer.rank].append(_transfer(transfer))
        rows.append((str(number), cells))
    widths = [max([len(f"rank {r}"), *(len(line) for _, cells in rows for line in cells[r])]) for r in ranks]
    lines = [_title(schedule), LEGEND, *([LEGEND_OF_HOSTS] if schedule.hosts is not None else []), ""]
    if not rows or not any(any(cells) for _, cells in rows):
        return "\n".join([*lines, "no transfers: every op begins by waiting for all ranks, and this one is that alone"])
    for columns in _columns(widths):
        lines.append(_line("round", [f"rank {r}" for r in columns], [widths[r] for r in columns]))
        lines.append("-" * len(_line("", ["" for _ in columns], [widths[r] for r in columns])))
        for name, cells in rows:
            height = max(1, *(len(cells[r]) for r in columns))
            for i in range(height):
                texts = [cells[r][i] if i < len(cells[r]) else "" for r in columns]
                lines.append(_line(name if i == 0 else "", texts, [widths[r] for r in columns]).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def _title(schedule: Schedule) -> str:
    def buffer(layout: tuple[int, int]) -> str:
        return f"{layout[0]} block{'s' if layout[0] != 1 else ''} of {layout[1]}"

    parts = [f"{schedule.op} {schedule.algorithm}, {schedule.world_size} ranks"]
    parts += [] if schedule.root is None else [f"root {schedule.root}"]
    parts.append(
        f"chunks: input {buffer(schedule.input)}, output {buffer(schedule.output)}, scratch {schedule.scratch}"
    )
    parts += [] if schedule.hosts is None else [f"on hosts {','.join(map(str, schedule.hosts))}"]
    parts += ["input and output are the same memory"] if schedule.in_place else []
    return "; ".join(parts)


def _columns(widths: Sequence[int]) -> list[list[int]]:
    tables: list[list[int]] = [[]]
    used = 0
    for rank, width in enumerate(widths):
        if tables[-1] and used + width + 3 > WIDTH - 8:
            tables.append([])
            used = 0
        tables[-1].append(rank)
        used += width + 3
    return tables


def _line(name: str, texts: Sequence[str], widths: Sequence[int]) -> str:
    return " | ".join([f"{name:>5}", *(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True))])


def _transfer(transfer: Transfer) -> str:
    sources = " + ".join(_runs(transfer.sources, transfer.rank))
    return f"{sources} > {', '.join(_runs(transfer.destinations, transfer.rank))}"


def _runs(locations: Sequence[Location], own: int) -> list[str]:
    """Names of locations; three or more of the same chunk on consecutive ranks become one."""
    names: list[str] = []
    at = 0
    while at < len(locations):
        first = locations[at]
        end = at + 1
        while end < len(locations) and locations[end] == first._replace(rank=first.rank + end - at):
            end += 1
        if end - at < 3:
            end = at + 1
        last = first.rank + end - at - 1
        prefix = f"{first.rank}..{last}:" if end - at > 1 else "" if first.rank == own else f"{first.rank}:"
        names.append(f"{prefix}{first.buffer[0]}{first.chunk}")
        at = end
    return names


def plan_text(plan: Plan) -> str:
    """One instruction a line: what an executor does, waits included."""
    header = plan.header()
    crosses = header.flags & CROSSES != 0
    lines = [
        f"plan of rank {header.rank} of {header.world_size}, hash {plan.plan_hash:016x}, {header.words} words, "
        f"{header.rounds} rounds, {header.scratch} scratch chunks"
        + (f", {header.messages} messages" if crosses else "")
    ]
    for instruction in plan.instructions():
        if isinstance(instruction, TransferInstruction):
            verb = "reduce" if instruction.reduce else "copy"
            sources = ", ".join(_operand(each, header.rank) for each in instruction.sources)
            destinations = ", ".join(_operand(each, header.rank) for each in instruction.destinations)
            lines.append(f"  {verb:<8} {sources} > {destinations}")
        elif isinstance(instruction, Wait):
            lines.append(f"  wait     until rank {instruction.peer} has finished round {instruction.round}")
        elif isinstance(instruction, Publish):
            lines.append(f"  publish  round {instruction.round}")
        elif isinstance(instruction, Receive):
            lines.append(f"  receive  message {instruction.number} from rank {instruction.peer}")
        elif isinstance(instruction, Agree):
            lines.append("  agree    wait until all hosts have agreed on the call")
        elif isinstance(instruction, Enter):
            lines.append(f"  enter    publish arrival, wait for all{' of this host' if crosses else ''}")
        else:
            lines.append("  end")
    return "\n".join(lines)


def _operand(operand: Operand, own: int) -> str:
    rank = "" if operand.rank == own else f"rank {operand.rank} "
    mark = "" if operand.mark == Mark.FRESH else f" ({operand.mark.name.lower()})"
    return f"{rank}{operand.buffer}[{operand.chunk}]{mark}"
