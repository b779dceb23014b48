"""The flight ring: `hxcomm top` reads it in stuck and stopped processes, and an error dumps it."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
import torch
import torch.distributed as dist
from thread_ranks import ThreadRanks, call

from hxcomm import _core, inspection, top
from hxcomm.schedule.ops import OPS

Run = Callable[..., list[Any]]
Pool = Callable[[int], Any]
ROUNDS = 3  # of the ring of 64: it has wrapped


def own_view(group: _core.Group) -> inspection.RankView:
    """Of a rank of this process that is a thread."""
    views = [view for view in inspection.ranks_of(os.getpid()) if view.rank == group.rank and view.group == "threads"]
    return views[-1]


def issue(group: _core.Group, op: str, dtype: str, reduce_op: str) -> None:
    n, root = group.world_size, 1
    given = exact.inputs(op, dtype, reduce_op, group.rank, n, root, 33)
    blocks = {"none": 0, "one": 1, "each": n}[OPS[op].output]
    if OPS[op].output_at_root_only and group.rank != root:
        blocks = 0
    taken = given if OPS[op].in_place else [np.zeros(33, exact.STORED[dtype]) for _ in range(blocks)]
    count = 0 if OPS[op].input == "none" else 33
    group.run(call(op, dtype, given, taken, reduce_op=reduce_op, root=root, count=count))


def test_the_reader_and_the_core_agree_on_every_code() -> None:
    """Each op, dtype and reduce op, as the ring shows it: the offsets and the names of inspection.py are the core's."""
    calls = [(op, "float32", "sum") for op in OPS if op not in ("send", "recv")]
    calls += [("all_reduce", dtype, "sum") for dtype in exact.DTYPES]
    calls += [
        ("all_reduce", dtype, reduce_op)
        for reduce_op in exact.REDUCE_OPS
        for dtype in ("float32", "int64")
        if exact.supported(dtype, reduce_op)
    ]
    with ThreadRanks(2) as ranks:
        for op, dtype, reduce_op in calls:
            ranks.each(lambda rank, group, what=(op, dtype, reduce_op): issue(group, *what))
            view = own_view(ranks.groups[1])
            last = view.operations[-1]
            assert (last.op, last.dtype) == (op, dtype) and last.state == "finished"
            assert last.reduce_op == (reduce_op if OPS[op].reduces else None)
            assert last.root == (1 if OPS[op].rooted else None)
            assert last.nbytes == last.count * exact.STORED[dtype]().itemsize
            assert last.sequence == view.sequence == ranks.groups[1].next_sequence - 1
            assert last.ended_ns is not None and last.posted_ns <= last.ended_ns
            assert view.pid == os.getpid() and view.world_size == 2 and not view.ended_by
    assert inspection.PROTOCOL_VERSION == _core.PROTOCOL_VERSION


def test_the_ring_holds_the_last_64_and_a_call_in_progress() -> None:
    with ThreadRanks(2) as ranks:
        for _ in range(64 * ROUNDS // 2 + 1):
            ranks.each(lambda rank, group: issue(group, "all_reduce", "int32", "sum"))
        array = np.ones(8, np.int32)
        waiting = ranks.groups[0].post(call("all_reduce", "int32", [array], [array]))
        view, other = own_view(ranks.groups[0]), own_view(ranks.groups[1])
        assert len(view.operations) == 64
        numbers = [operation.sequence for operation in view.operations]
        assert numbers == list(range(numbers[-1] - 63, numbers[-1] + 1))
        last = view.open_collective()
        assert last is not None and last.state == "arrived" and last.ended_ns is None and view.queued == 1
        assert other.open_collective() is None and other.sequence == view.sequence - 1
        ranks.groups[1].run(call("all_reduce", "int32", [array.copy()], [array]))
        ranks.groups[0].wait(waiting)
        assert own_view(ranks.groups[0]).queued == 0
    assert not [each for each in inspection.ranks_of(os.getpid()) if each.nonce == view.nonce], "groups that were left"


def test_hostile_bytes_in_a_segment_never_raise_anything_but_the_readers_own_error() -> None:
    """Random words over the page of headers and a control page; the seed is 7."""
    rng = random.Random(7)
    with ThreadRanks(1) as ranks:
        for fd in Path("/proc/self/fd").iterdir():
            if fd.is_symlink() and str(fd.readlink()).startswith("/memfd:hxcomm"):
                memory = mmap.mmap(int(fd.name), 0)
                if ranks.runtimes[0].nonce in memory[:64]:
                    break
        offset = ranks.groups[0].control_offset
        before = {place: memory[place : place + 4096] for place in (0, offset)}
        for _ in range(400):
            place = rng.choice((*range(0, 4096, 8), *range(offset, offset + 4096, 8)))
            word = rng.choice((0, 1, (1 << 64) - 1, offset, offset + 8, rng.getrandbits(64), rng.getrandbits(12) << 12))
            if not 64 <= place < 256 and place != offset + 40:  # what the process itself lives by
                memory[place : place + 8] = word.to_bytes(8, "little")
            try:
                for view in inspection.ranks_of(os.getpid()):
                    top.text(top.GroupView(view.group, view.nonce, min(view.world_size, 9), (view,)), now_ns=0)
            except inspection.NotReadableError:
                pass
        for place, page in before.items():
            memory[place : place + 4096] = page
        memory.close()


# --- processes ---


def stuck(rank: int, world_size: int, folder: str) -> None:
    """Ranks 0 and 1 are in an all_reduce, 2 has stopped itself, 3 waits for a message; 0 looks, then wakes 2."""
    dist.all_reduce(torch.ones(100))
    store = dist.distributed_c10d._get_default_store()
    if rank == 2:
        store.wait(["0", "1", "3"])
        (Path(folder) / "stopped").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        dist.send(torch.ones(10), 3)
        dist.all_reduce(torch.ones(100))
        return
    work = dist.irecv(torch.ones(10), 2) if rank == 3 else dist.all_reduce(torch.ones(100), async_op=True)
    store.set(str(rank), "")
    if rank == 0:
        look_from_outside(folder)
    work.wait()
    if rank == 3:
        dist.all_reduce(torch.ones(100))


def look_from_outside(folder: str) -> None:
    """Until the stopped rank is seen, then wakes it."""
    for _ in range(600):
        command = [sys.executable, "-m", "hxcomm.cli", "top", "--pid", str(os.getpid()), "--once"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30)
        seen = json.loads(subprocess.run([*command, "--json"], capture_output=True, timeout=30).stdout)
        stopped = [rank for rank in seen[0]["ranks"] if rank["process"] == "stopped"]
        if stopped:
            (Path(folder) / "text").write_text(shown.stdout)
            (Path(folder) / "json").write_text(json.dumps(seen))
            os.kill(stopped[0]["pid"], signal.SIGCONT)
            return
    raise AssertionError(f"nobody is shown as stopped:\n{shown.stdout}")


def test_top_names_who_is_missing_in_a_stuck_collective(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(stuck, 4, str(tmp_path), env={"HXCOMM_TRACE": "callsite"})
    (group,) = json.loads((tmp_path / "json").read_text())
    assert group["missing"] == [2, 3] and group["sequence"] == 2 and group["world_size"] == 4
    assert [rank["process"] == "stopped" for rank in group["ranks"]] == [False, False, True, False]
    calls = [rank["operations"][-1] for rank in group["ranks"]]
    assert [each["op"] for each in calls] == ["all_reduce", "all_reduce", "all_reduce", "recv"]
    assert [each["state"] for each in calls] == ["arrived", "arrived", "finished", "posted"]
    assert calls[0]["nbytes"] == 400 and calls[3]["root"] == 2
    assert all(each["call_site"].startswith("test_flight.py:") for each in calls), calls
    text = (tmp_path / "text").read_text()
    assert "all_reduce #2: rank 2 (pid" in text and "missing" in text, text
    assert "recv from rank 2" in text, text


@pytest.mark.parametrize(
    ("arguments", "status", "advice"),
    [
        (("--pid", str(1 << 30)), 1, "there is no process"),
        (("--pid", "0"), 2, "'0' is not the number of a process"),
        (("--pid", "1", "--all"), 2, "not allowed with"),
    ],
)
def test_top_says_what_it_cannot_show(arguments: tuple[str, ...], status: int, advice: str) -> None:
    command = [sys.executable, "-m", "hxcomm.cli", "top", "--once", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == status and advice in done.stderr, done.stderr


def test_top_says_when_a_process_is_in_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert top.run(child.pid, as_json=False, once=True) == 1
        assert f"process {child.pid} is in no group of hxcomm" in capsys.readouterr().err
    finally:
        child.communicate(b"\n", timeout=30)


def die_and_tell(rank: int, world_size: int) -> str:
    dist.all_reduce(torch.ones(100))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(100):
            dist.all_reduce(torch.ones(100))
    except dist.DistBackendError as error:
        return str(error)
    return "nothing was raised"


def test_an_error_leaves_the_ring_in_the_folder_and_says_where(run_ranks: Run, tmp_path: Path) -> None:
    env = {"HXCOMM_DUMP": str(tmp_path), "HXCOMM_TRACE": "callsite"}
    messages = run_ranks(die_and_tell, 3, env=env, expect={1: signal.SIGKILL})
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for rank, file in zip((0, 2), files, strict=True):
        assert f"What this rank did last is in {file}." in messages[rank]
        dump = json.loads(file.read_text())
        assert dump["rank"] == rank and dump["world_size"] == 3 and "SIGKILL" in dump["error"]
        # A survivor that heard of it from the other one may not have noticed itself yet.
        assert dump["ranks"][1]["state"] in ("dead", "member") and "rank 1 (host" in dump["ranks"][1]["label"]
        first, last = dump["operations"][0], dump["operations"][-1]
        assert (first["sequence"], first["op"], first["count"], first["state"]) == (1, "all_reduce", 100, "finished")
        assert last["sequence"] == 2 and last["state"] in ("posted", "arrived") and last["ended_ns"] is None
        assert last["call_site"].startswith("test_flight.py:")


def test_a_dump_folder_that_is_none_is_refused_at_the_start(run_ranks: Run) -> None:
    (raised,) = run_ranks(die_and_tell, 1, env={"HXCOMM_DUMP": "/nonesuch"}, expect={0: "ValueError"})
    assert "HXCOMM_DUMP='/nonesuch': not a folder" in raised.message
