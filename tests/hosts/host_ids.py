"""Hosts on one machine without root: HXCOMM_HOST_ID denies ranks the memory that they could share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def group_on(hosts: Sequence[int]) -> Iterator[None]:
    """The default group, with this process's rank on host `hosts[rank]`, over loopback. Ranks are run without one."""
    os.environ["HXCOMM_HOST_ID"] = f"host {hosts[int(os.environ['RANK'])]}"
    dist.init_process_group("hxcomm", timeout=timedelta(seconds=30), device_id=torch.device("hx", 0))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
