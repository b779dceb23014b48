"""Large messages of device hx: the receiver copies them out of the sender's tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from exact import Array
from thread_ranks import TIMEOUT_S, HxMemory, Page, ThreadRanks

from hxcomm import _core
from hxcomm.errors import AbortedError, MismatchError

COUNT = 100_000  # int32 elements: many packets
# Words of a control page in a group of two: rank 0's and rank 1's PairLine {ring offset, produced, consumed}.
PAIRS = (4864 + 2 * 512) // 8
RING, PRODUCED = 0, 1
PACKET_COUNT, PACKET_OFFSET = 3, 4  # words of a Packet


def message(op: str, peer: int, array: Array, device: str = "hx") -> _core.Call:
    block = [(array.ctypes.data, array.size)]
    return _core.Call(
        op=op,
        dtype="int32",
        reduce_op="sum",
        root=peer,
        input=block if op == "send" else [],
        output=block if op == "recv" else [],
        count=array.size,
        device=device,
        timeout_s=TIMEOUT_S,
    )


def numbers(ranks: ThreadRanks, rank: int, first: int, count: int = COUNT) -> Array:
    return HxMemory(ranks.runtimes[rank]).place(np.arange(first, first + count, dtype=np.int32))


def test_a_large_message_of_device_hx_takes_one_packet_each_way() -> None:
    with ThreadRanks(2) as ranks:
        given, taken = numbers(ranks, 0, 5), numbers(ranks, 1, 0)

        def exchange(rank: int, group: _core.Group) -> None:
            group.wait(group.post(message("send", 1, given) if rank == 0 else message("recv", 0, taken)))

        ranks.each(exchange)
        np.testing.assert_array_equal(taken, np.arange(5, COUNT + 5, dtype=np.int32))
        for rank in range(2):
            page = Page(ranks.runtimes[rank], ranks.groups[rank].control_offset)
            assert page.get(PAIRS + 8 * (1 - rank) + PRODUCED) == 1
        assert ranks.all_reduce_works()


@pytest.mark.parametrize("count", [3, COUNT])
def test_a_message_between_devices_is_a_mismatch_and_the_group_goes_on(count: int) -> None:
    with ThreadRanks(2) as ranks:
        given, taken = numbers(ranks, 0, 5, count), np.zeros(count, np.int32)

        def exchange(rank: int, group: _core.Group) -> Any:
            call = message("send", 1, given) if rank == 0 else message("recv", 0, taken, device="cpu")
            group.wait(group.post(call))

        errors = ranks.outcomes(exchange)
        assert isinstance(errors[1], MismatchError) and f"{count} elements of int32 on device hx" in str(errors[1])
        if count == COUNT:  # a small send had ended before it met its receive
            assert isinstance(errors[0], MismatchError) and str(errors[0]) == str(errors[1])
        assert (taken == 0).all()
        assert ranks.all_reduce_works()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (PACKET_OFFSET, (1 << 64) - 4096),
        (PACKET_OFFSET, 1 << 40),
        (PACKET_OFFSET, (64 << 20) - 8),
        (PACKET_COUNT, 1 << 62),
    ],
)
def test_a_message_that_lies_outside_its_senders_segment_raises_instead_of_crashing(word: int, value: int) -> None:
    with ThreadRanks(2) as ranks:
        ranks.groups[1].post(message("send", 0, numbers(ranks, 1, 5)))
        hostile = Page(ranks.runtimes[1], ranks.groups[1].control_offset)
        ring = (hostile.get(PAIRS + RING) - ranks.groups[1].control_offset) // 8
        hostile.put(ring + word, value)
        with pytest.raises(AbortedError, match="rank 1 sent a tensor that lies outside its segment"):
            ranks.groups[0].wait(ranks.groups[0].post(message("recv", 1, numbers(ranks, 0, 0))))


def test_a_tensor_that_is_not_in_the_segment_is_refused() -> None:
    with ThreadRanks(2) as ranks:
        elsewhere = np.zeros(COUNT, np.int32)
        with pytest.raises(Exception, match="does not lie in this process's segment"):
            ranks.groups[0].post(message("send", 1, elsewhere))
        assert ranks.all_reduce_works()
