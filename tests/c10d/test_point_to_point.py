"""send and recv as torch.distributed documents them: tags, any source, batches, both directions at once, errors."""

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


def message(source: int, number: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(count) % 97 + 100 * source + number).to(dtype)


def ring(rank: int, world_size: int, count: int) -> bool:
    """Everybody sends to the right and receives from the left, also where that is the rank itself."""
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    received = torch.zeros(count)
    works = [dist.isend(message(rank, 0, count), right), dist.irecv(received, left)]
    for work in works:
        assert work is not None
        work.wait()
    return bool(torch.equal(received, message(left, 0, count)))


@pytest.mark.parametrize("count", [0, 1, SMALL, 4096, 4097, LARGE])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_ring_of_messages_of_any_size(rank_pool: Pool, world_size: int, count: int) -> None:
    assert all(rank_pool(world_size).run(ring, count))


def out_of_order(rank: int, world_size: int, count: int) -> list[bool]:
    """Forty messages, more than a ring holds, received last tag first; equal tags keep their order."""
    if rank == 0:
        works = [dist.isend(message(0, i, count), 1, tag=i // 2) for i in range(40)]
        for work in works:
            assert work is not None
            work.wait()
        return []
    right = []
    for tag in reversed(range(20)):
        for second in range(2):
            received = torch.zeros(count)
            assert dist.recv(received, 0, tag=tag) == 0
            right.append(torch.equal(received, message(0, 2 * tag + second, count)))
    return right


@pytest.mark.parametrize("count", [SMALL, 20_000])
def test_tags_match_out_of_order_and_equal_tags_in_order(rank_pool: Pool, count: int) -> None:
    assert rank_pool(2).run(out_of_order, count)[1] == [True] * 40


def any_source(rank: int, world_size: int) -> list[int]:
    if rank != 0:
        for number in range(3):
            dist.send(message(rank, number, SMALL), 0, tag=7)
        return []
    seen = dict.fromkeys(range(1, world_size), 0)
    for _ in range(3 * (world_size - 1)):
        received = torch.zeros(SMALL)
        source = dist.recv(received, tag=7)
        assert torch.equal(received, message(source, seen[source], SMALL)), (source, seen)
        seen[source] += 1
    return list(seen.values())


def test_recv_from_any_source_says_whose_it_was(rank_pool: Pool) -> None:
    assert rank_pool(4).run(any_source)[0] == [3, 3, 3]


def batch(rank: int, world_size: int) -> bool:
    """Everybody exchanges with everybody in one batch, receives first, in an order that differs by rank."""
    received = [torch.zeros(LARGE if peer % 2 else SMALL) for peer in range(world_size)]
    count = LARGE if rank % 2 else SMALL
    operations = [dist.P2POp(dist.irecv, received[peer], peer) for peer in range(world_size)]
    peers = [(rank + i) % world_size for i in range(world_size)]
    operations += [dist.P2POp(dist.isend, message(rank, 1, count), peer) for peer in peers]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return all(torch.equal(tensor, message(peer, 1, tensor.numel())) for peer, tensor in enumerate(received))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_batch_in_any_order_ends(rank_pool: Pool, world_size: int) -> None:
    assert all(rank_pool(world_size).run(batch))


def beside_collectives(rank: int, world_size: int) -> bool:
    """A thread exchanges messages while the main thread runs collectives."""
    good = []

    def exchange() -> None:
        good.extend(ring(rank, world_size, count) for count in [SMALL, 20_000] * 20)

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


def strides_and_dtypes(rank: int, world_size: int) -> bool:
    good = True
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64):
        whole = torch.zeros(6, 8, dtype=dtype)
        sent = message(0, 3, 24, dtype).reshape(6, 4)
        if rank == 0:
            dist.send(sent.t().contiguous().t(), 1)
        elif rank == 1:
            dist.recv(whole[:, ::2], 0)
            good = good and torch.equal(whole[:, ::2], sent) and not whole[:, 1::2].any()
    return good


def test_strided_tensors_and_dtypes(rank_pool: Pool) -> None:
    assert all(rank_pool(2).run(strides_and_dtypes))


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
