"""hxcomm keeps its memory in memfds, so it does not matter how large /dev/shm is, or whether there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks  # it starts ranks: not beside another test's

PROGRAM = """
import pathlib
import torch
import torch.distributed as dist

shm = pathlib.Path("/dev/shm")
before = sorted(shm.iterdir()) if shm.is_dir() else []
dist.init_process_group("hxcomm")
tensor = torch.full((8 << 20,), float(dist.get_rank() + 1))
dist.all_reduce(tensor)
assert (tensor == sum(range(1, dist.get_world_size() + 1))).all()
assert (sorted(shm.iterdir()) if shm.is_dir() else []) == before
print("right")
dist.destroy_process_group()
"""
PLACES = {
    "64 MiB": "mount -t tmpfs -o size=64m tmpfs /dev/shm",
    "1 MiB": "mount -t tmpfs -o size=1m tmpfs /dev/shm",
    "read-only": "mount -t tmpfs -o ro tmpfs /dev/shm",
    "not mounted": "umount -l /dev/shm",
}


def in_a_mount_namespace(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command that may mount; nothing of it is seen outside. Most can be done without root, too."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    words = ["unshare", "--mount", *as_root, "sh", "-ec", command, "sh", *arguments]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of the package util-linux")
@pytest.mark.parametrize("place", PLACES)
def test_32_mib_are_reduced_by_3_ranks_whatever_the_size_of_dev_shm(place: str, tmp_path: Path) -> None:
    if (probe := in_a_mount_namespace(PLACES[place])).returncode:
        pytest.skip(f"this user may not do it, also in a mount namespace of its own: {probe.stdout.strip()}")
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = in_a_mount_namespace(f'{PLACES[place]}; exec "$@"', *torchrun, str(tmp_path / "program.py"))
    assert done.returncode == 0 and done.stdout.count("right") == 3, done.stdout
