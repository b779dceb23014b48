"""Messages that fail, and how their errors read; and messages beside the collectives of another thread.

That messages arrive is checked by hxcomm/verify and test_properties.py.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

Pool = Callable[[int], Any]
Run = Callable[..., list[Any]]

SMALL, LARGE = 5, 300_000  # elements: one packet; many times what a ring holds


def beside_collectives(rank: int, world_size: int) -> bool:
    """A thread passes messages around a ring while the main thread runs collectives of the same group."""
    good = []

    def exchange() -> None:
        for number, count in enumerate([SMALL, 20_000] * 20):
            received = torch.zeros(count)
            arriving = dist.irecv(received, (rank - 1) % world_size)
            dist.send(torch.full((count,), float(rank + number)), (rank + 1) % world_size)
            assert arriving is not None
            arriving.wait()
            good.append(bool((received == (rank - 1) % world_size + number).all()))

    thread = threading.Thread(target=exchange)
    thread.start()
    for number in range(100):
        tensor = torch.full((1000,), float(rank + number))
        dist.all_reduce(tensor)
        good.append(bool((tensor == sum(r + number for r in range(world_size))).all()))
    thread.join()
    return len(good) == 140 and all(good)


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_beside_collectives_of_another_thread(rank_pool: Pool, world_size: int) -> None:
    assert all(rank_pool(world_size).run(beside_collectives))


def mismatch(rank: int, world_size: int, count: int) -> str:
    """A count that differs; then a message that fits, and a collective."""
    text = ""
    try:
        if rank == 0:
            dist.send(torch.ones(count), 1)
        else:
            dist.recv(torch.ones(count + 1), 0)
    except dist.DistBackendError as error:
        text = f"{type(error).__name__}: {error}"
    dist.barrier()
    if rank == 0 and not text:  # a small send has ended before it meets the receive: the next one tells
        try:
            dist.send(torch.ones(1), 1)
        except dist.DistBackendError as error:
            text = f"{type(error).__name__}: {error}"
    if rank == 0:
        dist.send(torch.ones(1), 1)
    else:
        assert dist.recv(torch.zeros(1), 0) == 0
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == world_size
    return text


@pytest.mark.parametrize("count", [SMALL, LARGE])
def test_a_mismatch_is_raised_on_both_sides_and_the_group_goes_on(rank_pool: Pool, count: int) -> None:
    for text in rank_pool(2).run(mismatch, count):
        assert text.startswith("MismatchError"), text
        assert f"sent {count} elements of float32" in text and f"receives {count + 1} elements" in text, text


def wrong_calls(rank: int, world_size: int) -> list[str]:
    texts = []
    for call in (
        lambda: dist.send(torch.ones(3), 5),
        lambda: dist.send(torch.ones(3, dtype=torch.float8_e4m3fn), 1 - rank),
    ):
        try:
            call()
        except (ValueError, RuntimeError, TypeError) as error:
            texts.append(str(error))
    return texts


def test_wrong_arguments_are_refused_here_and_now(rank_pool: Pool) -> None:
    for texts in rank_pool(2).run(wrong_calls):
        assert len(texts) == 2 and "ranks 0 to 1" in texts[0] and "Float8" in texts[1], texts


def receive_from_the_dead(rank: int, world_size: int, count: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if rank == 0:
            dist.recv(torch.ones(count), 1)
        else:
            dist.send(torch.ones(LARGE), 1)
    except dist.DistBackendError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_a_killed_peer_ends_send_and_recv(run_ranks: Run) -> None:
    results = run_ranks(receive_from_the_dead, 3, LARGE, op_timeout_s=600, expect={1: -9})
    for rank in (0, 2):
        assert results[rank].startswith("PeerFailedError") and "was killed by SIGKILL" in results[rank], results[rank]


def nobody_sends(rank: int, world_size: int) -> str:
    if rank == 1:
        dist.destroy_process_group()
        return ""
    try:
        dist.recv(torch.ones(3), 1)
    except dist.DistBackendError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_a_peer_that_has_left_ends_a_recv(rank_pool: Pool) -> None:
    text = rank_pool(2).run(nobody_sends, op_timeout_s=600)[0]
    assert text.startswith("PeerFailedError") and "has left the group" in text, text


def too_late(rank: int, world_size: int) -> str:
    if rank == 0:
        try:
            dist.recv(torch.ones(3), 1, tag=4)
        except dist.DistBackendError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"
    try:
        dist.send(torch.ones(LARGE), 0, tag=5)
    except dist.DistBackendError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_a_message_that_never_comes_ends_in_a_timeout_that_names_it(rank_pool: Pool) -> None:
    texts = rank_pool(2).run(too_late, op_timeout_s=1)
    assert all(text.startswith("CommTimeoutError") for text in texts), texts
    assert all("tag 4" in text or "tag 5" in text for text in texts), texts  # of the rank whose time ran out first
