"""Messages between ranks under random interleavings of single loads and stores, beside collectives of the same ranks.

Every message arrives once, with its own elements, in order, or raises on the sides that can know; whatever happens at
whatever point, every send and recv of every surviving rank ends. Every rule that this rests on is left out once. For a
longer campaign see test_interleavings.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from schedule.conversations import MessageWorld, message_world
from schedule.conversations_across_hosts import message_world_on
from schedule.simulated_hosts import random_hosts
from schedule.simulated_processes import interleave, random_failures
from schedule.streams import WrongError, random_step

SEEDS = 60  # a portion of a world size


def trial(seed: str, n: int, kinds: Sequence[str] = (), broken: str = "", across_hosts: bool = False) -> None:
    rng = random.Random(seed)
    kinds_of_call = ("alike", "mismatch", "refused")
    collectives = [[(0, random_step(rng, n, rng.choice(kinds_of_call)))] for _ in range(rng.choice((0, 2)))]
    if across_hosts:
        world: MessageWorld = message_world_on(random_hosts(rng, n), collectives, broken, rng)
    else:
        world = message_world(n, collectives, broken, rng)
    failures = random_failures(world, kinds) if kinds else []
    try:
        interleave(world, failures)
    except WrongError as error:
        raise WrongError(f"seed {seed!r}, {n} ranks, {failures}: {error}") from error


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_message_arrives_once_and_in_order_through_rings_of_one_or_two_packets(n: int, portion: int) -> None:
    for number in range(portion * SEEDS, (portion + 1) * SEEDS):
        trial(f"messages {n} {number}", n)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kinds", [["abort"], ["death"], ["leave"], ["abort", "death", "leave"]], ids="+".join)
def test_every_send_and_recv_ends_when_a_rank_aborts_or_dies_or_leaves_at_any_point(
    kinds: list[str], n: int, portion: int
) -> None:
    for number in range(portion * SEEDS, (portion + 1) * SEEDS):
        trial(f"messages {kinds} {n} {number}", n, kinds)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kinds", [[], ["abort"], ["death"], ["leave"], ["abort", "death", "leave"]], ids="+".join)
def test_messages_between_hosts_arrive_once_and_in_order_or_end(kinds: list[str], n: int, portion: int) -> None:
    for number in range(portion * SEEDS, (portion + 1) * SEEDS):
        trial(f"messages between hosts {kinds} {n} {number}", n, kinds, across_hosts=True)


# What each rule needs to be missed: what happens.
RULES: dict[str, list[str]] = {
    "published before written": [],
    "consumed before copied": [],
    "one packet too many": [],
    "no look for room": [],
    "requests what is not posted": [],
    "the last message first": [],
    "the last receive first": [],
    "matched late": [],
    "ends early": [],
    "no refusal": [],
    "no rotation": [],
    "no ring": [],
    "room is not rung for": [],
    "looks before it announces": [],
    "passed by": [],
    "taken after the end": ["leave"],
    "pending after the end": ["abort"],
    "no goodbye": ["leave"],
    "the ring before membership": [],
    "the source is forgotten": ["leave"],
    "not lent": [],
    "peers are not told": ["abort"],
    "nobody hears that it was taken": ["leave"],
}


# The same, for what is another way between hosts.
RULES_BETWEEN_HOSTS: dict[str, list[str]] = {
    "frames do not ring": [],
    "leaving does not ring": ["leave"],
    "no room is told of": [],
    "no look for room": [],
    "gone with packets to take": ["leave"],
    "no goodbye": ["leave"],
    "leaves with replies to give": [],
}


@pytest.mark.parametrize(
    ("rule", "across_hosts"), [(rule, False) for rule in RULES] + [(rule, True) for rule in RULES_BETWEEN_HOSTS]
)
def test_each_rule_of_messages_is_missed(rule: str, across_hosts: bool) -> None:
    kinds = (RULES_BETWEEN_HOSTS if across_hosts else RULES)[rule]
    for number in range(3000):
        try:
            trial(f"rule {rule} {number}", 2 + number % 2, kinds, rule, across_hosts)
        except WrongError as error:
            print(f"caught after {number} seeds: {error}")
            return
    pytest.fail(f"3000 runs went right with {rule}: the check does not see it, or the rule is not needed")
