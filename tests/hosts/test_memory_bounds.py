"""What a peer on another host can make a rank hold: messages wait at their sender until they are wanted."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hosts.host_ids import group_on
from ranks import run_ranks

NBYTES = 96 << 20
# 8 messages (csrc/communicator/crossing.h: kCredits) of a window of 512 KiB, those of one window, and room for what
# libzmq and the kernel hold.
MOST_BYTES = 24 << 20


def resident_bytes(field: str) -> int:
    """VmRSS now, or VmHWM, the most since forget_peak()."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def growth_while_a_rank_pauses(rank: int, world_size: int) -> int:
    """Of this rank, in a broadcast from another host in which a rank beside it stops for a second."""
    if rank == 2:
        os.environ["HXCOMM_FAILPOINT"] = "judged@60=pause:1000"
    with group_on((0, 1, 1)):
        tensor = torch.full((NBYTES // 4,), float(rank))
        dist.broadcast(tensor[: 4 << 20], 0)  # whatever the first call needs
        forget_peak()
        before = resident_bytes("VmRSS")
        dist.broadcast(tensor, 0)
        grown = resident_bytes("VmHWM") - before
        assert bool((tensor == 0).all())
        return grown


@pytest.mark.ranks
def test_what_a_peer_sends_ahead_waits_at_the_sender() -> None:
    grown = run_ranks(growth_while_a_rank_pauses, 3, backend=None, timeout_s=60)[1]
    assert grown < MOST_BYTES, f"{grown >> 20} of {NBYTES >> 20} MiB"
