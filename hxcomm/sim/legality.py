"""What a chip's links can execute, and the first transfer of a Schedule that they cannot.

Every-to-every access is right for shared memory, not for a ring of neighbours that store to each other. The rules are
those of [legal] in the chip's file. A Schedule is judged as it would run: pushed, where links only push.
"""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Rotation, Schedule, Transfer
from hxcomm.schedule.extents import QUANTUM
from hxcomm.schedule.symbolic import title
from hxcomm.sim.chips import Chip, Legal
from hxcomm.sim.engine import DeadlockError, time_schedule
from hxcomm.sim.interconnect import Interconnect, InterconnectError
from hxcomm.sim.program import pushed, reads_peers

SHOWN = 160  # letters of a transfer: one that reduces 256 chunks would fill the screen


class IllegalSchedule(ValueError):  # noqa: N818  (what it is, as in ScheduleError's family of names)
    """The links cannot execute it. The text names the first transfer and the rule that it breaks."""


def legal(
    schedule: Schedule, chip: Chip, network: Interconnect, nbytes: int | None = None, itemsize: int = 2
) -> str | None:
    """None, or the first transfer that the links cannot execute and the rule that it breaks.

    nbytes: of a block, for the times by which it is decided who waits for a credit; left out, the least that gives
    every piece something to do.
    """
    rules = chip.legal
    runs = pushed(schedule) if rules.push_only and reads_peers(schedule) else schedule
    for number, transfer in _transfers(runs, network):
        broken = _broken(transfer, rules, network)
        if broken:
            return f"{title(schedule)}, round {number}: {_short(transfer)}: {broken}"
    if rules.credits_per_link is None:
        return None
    if nbytes is None:
        nbytes = schedule.pieces * max(QUANTUM * itemsize, rules.alignment_bytes)
    try:
        time_schedule(schedule, chip, nbytes, itemsize=itemsize, network=network)
    except DeadlockError as error:
        return f"{title(schedule)}: credits_per_link: {error}"
    return None


def _transfers(schedule: Schedule, network: Interconnect) -> Iterator[tuple[int, Transfer]]:
    """Those that have to be looked at: of Rotations one for each way that its ends lie to each other, for all ranks, or
    for rank 0 where the network is the same from all of them. A ring of 1,024 has two million transfers."""
    n = schedule.world_size
    seen: set[tuple[int, ...]] = set()
    for number, round_ in enumerate(schedule.rounds(), 1 if schedule.form == "written" else 0):
        if not isinstance(round_, Rotation):
            yield from ((number, transfer) for transfer in round_)
            continue
        for transfer in round_.transfers:
            ends = tuple([(at.rank - transfer.rank) % n for at in (*transfer.sources, *transfer.destinations)])
            if (len(transfer.sources), *ends) not in seen:
                seen.add((len(transfer.sources), *ends))
                alone = Rotation([transfer], round_.rotated, round_.step)
                yield from ((number, each) for each in ([transfer] if network.rotates else alone.expanded(n)))


def _short(transfer: Transfer) -> str:
    text = str(transfer)
    return text if len(text) <= SHOWN else text[:SHOWN].rsplit(" ", 1)[0] + " ..."


def _broken(transfer: Transfer, rules: Legal, network: Interconnect) -> str:
    """The rule that it breaks, or nothing."""
    rank = transfer.rank
    sources = [at for at in transfer.sources if at.rank != rank]
    destinations = [at for at in transfer.destinations if at.rank != rank]
    if rules.push_only and sources:
        return f"push_only: links store to other chips, and this loads {sources[0]}"
    if rules.max_sources is not None and len(transfer.sources) > rules.max_sources:
        return f"max_sources: {len(transfer.sources)} sources, a chip reduces at most {rules.max_sources} at a time"
    if not rules.multicast and len({at.rank for at in destinations}) > 1:
        return f"multicast: one transfer stores to one other chip, this to {len({at.rank for at in destinations})}"
    if rules.neighbours_only:
        for source, target in [*((at.rank, rank) for at in sources), *((rank, at.rank) for at in destinations)]:
            passed = _passed(source, target, network)
            if passed:
                return f"neighbours_only: from rank {source} to rank {target} it is {passed}"
    return ""


def _passed(source: int, target: int, network: Interconnect) -> str:
    """Where a message goes through another chip (a switch is none): by how many hops."""
    try:
        route = network.route(source, target)
    except InterconnectError as error:
        return str(error)
    between = [network.links[link].target for link in route[:-1]]
    return f"{len(route)} hops" if any(node < network.world_size for node in between) else ""
