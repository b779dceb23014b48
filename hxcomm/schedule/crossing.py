"""Crossing hosts: the pass after which ranks of different hosts share nothing but messages.

Every written round becomes up to three: sends, in which the owner of what a rank of another host reads sends it there;
the transfers themselves, which read those messages, and store to other hosts by sending; receives, in which a rank
stores what was sent to it. Any flat algorithm is thus right on any hosts; hierarchical ones are only better Schedules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hxcomm.schedule.errors import ScheduleError
from hxcomm.schedule.schedule import Location, Round, Schedule, Transfer, copy


def several(hosts: Sequence[int] | None, world_size: int) -> tuple[int, ...] | None:
    """The hosts of the ranks where they are more than one, else None.

    Raises ScheduleError where they are not numbered 0, 1 ... in the order of their first ranks: ranks that number them
    differently would make different plans.
    """
    if hosts is None:
        return None
    first_ranks = list(dict.fromkeys(hosts))
    if len(hosts) != world_size or first_ranks != list(range(len(first_ranks))):
        raise ScheduleError(
            f"the hosts of {world_size} ranks are {list(hosts)}: one number a rank, 0, 1 ... in the order of the "
            "hosts' first ranks"
        )
    return tuple(hosts) if len(first_ranks) > 1 else None


def ranks_by_host(hosts: Sequence[int]) -> list[list[int]]:
    """The ranks of each host, ascending; the first of each is its leader."""
    return [[rank for rank, each in enumerate(hosts) if each == host] for host in range(max(hosts) + 1)]


def across_hosts(schedule: Schedule, hosts: Sequence[int] | None) -> Schedule:
    """The written schedule with everything that crosses hosts made a message; as it is where all are on one host."""
    apart = several(hosts, schedule.world_size)
    if apart is None:
        return schedule
    received: Counter[int] = Counter()
    for _ in _rounds(schedule, apart, received):
        pass

    def rounds() -> Iterator[Round]:
        yield from _rounds(schedule, apart, Counter())

    return replace(schedule, rounds=rounds, hosts=apart, messages=max(received.values(), default=0))


def _rounds(schedule: Schedule, hosts: tuple[int, ...], received: Counter[int]) -> Iterator[list[Transfer]]:
    """Counts in `received` the messages that each rank gets."""

    def message_to(rank: int) -> Location:
        received[rank] += 1
        return Location(rank, "message", received[rank] - 1)

    for number, transfers in schedule.numbered_rounds():
        sent: dict[Location, dict[int, Location]] = {}  # what is read, by whom: the message
        for transfer in transfers:
            schedule.check(transfer, number)
            for at in transfer.sources:
                if hosts[at.rank] != hosts[transfer.rank]:
                    messages = sent.setdefault(schedule.canonical(at), {})
                    if transfer.rank not in messages:
                        messages[transfer.rank] = message_to(transfer.rank)
        local: list[Transfer] = []
        receives: list[Transfer] = []
        for transfer in transfers:
            rank = transfer.rank
            sources = [
                at if hosts[at.rank] == hosts[rank] else sent[schedule.canonical(at)][rank] for at in transfer.sources
            ]
            destinations = []
            for at in transfer.destinations:
                if hosts[at.rank] != hosts[rank]:
                    message = message_to(at.rank)
                    receives.append(copy(at.rank, message, at))
                    at = message
                destinations.append(at)
            local.append(Transfer(rank, tuple(sources), tuple(destinations), transfer.reduce))
        sends = [copy(at.rank, at, *messages.values()) for at, messages in sent.items()]
        yield from [each for each in (sends, local, receives) if each]
