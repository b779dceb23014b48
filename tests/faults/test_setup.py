"""Groups that cannot be made: missing ranks, settings that differ, and strangers at the handshake."""

from __future__ import annotations

import array
import os
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hxcomm import _core, bootstrap
from hxcomm.errors import InitError

Pool = Callable[[int], Any]
MAGIC = 0x31454D4F434C4548  # csrc/transport/handshake.cpp
REQUEST = struct.Struct("<QII16s")  # magic, version, reserved, nonce
REPLY = struct.Struct("<QIiQ")  # magic, version, status, segment bytes


# --- bootstrap ---


def no_plan(*_: object) -> Any:
    raise AssertionError("no collective runs here")


def make_group(store: dist.Store, rank: int, world_size: int, timeout_s: float, settings: str = "") -> _core.Group:
    return bootstrap.create_group(
        bootstrap.StoreMeeting(store, rank, "g", timeout_s),
        world_size=world_size,
        global_ranks=range(world_size),
        settings=settings,
        planner=no_plan,
    )


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_missing_rank_is_named(rank: int, missing: int) -> None:
    with pytest.raises(
        InitError, match=f"rank {rank} cannot set up group 'g': rank {missing} did not come within 0.3 s"
    ):
        make_group(dist.HashStore(), rank, 2, 0.3)


@pytest.mark.parametrize(
    "hello", ["", "zz", "c0", "81a176", b"\x93\x01\x02\x03".hex(), "df" + "ff" * 4, "00" * 5000, "9f" * 2000]
)
def test_hostile_hellos_are_refused(hello: str) -> None:
    store = dist.HashStore()
    prefix = "hxcomm/1"
    store.set(f"{prefix}/nonce", "5")
    store.set(f"{prefix}/0", hello)
    with pytest.raises(InitError, match="rank 0's hello"):
        make_group(store, 1, 2, 5.0)


def differing_settings(rank: int, world_size: int, name: str) -> str:
    values = {"HXCOMM_ALGO": ["all_reduce:ring", "all_reduce:two_shot"], "HXCOMM_SEGMENT": ["64KiB", "128KiB"]}[name]
    os.environ[name] = values[rank % 2]
    try:
        dist.init_process_group("hxcomm", timeout=timedelta(seconds=30))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize("name", ["HXCOMM_ALGO", "HXCOMM_SEGMENT"])
def test_settings_that_differ_raise_on_every_rank(rank_pool: Pool, name: str) -> None:
    for text in rank_pool(3).run(differing_settings, name, backend=None):
        assert text.startswith("InitError: rank ") and "settings differ" in text, text


def failing_rank(rank: int, world_size: int) -> str:
    """Rank 1 asks for an algorithm that does not exist, before it meets the others."""
    os.environ["HXCOMM_ALGO"] = "all_reduce:nonesuch" if rank == 1 else ""
    try:
        dist.init_process_group("hxcomm", timeout=timedelta(seconds=2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_a_rank_that_fails_before_it_joins_is_named_by_the_others(rank_pool: Pool) -> None:
    texts = rank_pool(2).run(failing_rank, backend=None)
    assert texts[0].startswith("InitError") and "rank 1 did not take part" in texts[0], texts[0]
    assert texts[1].startswith("ValueError") and "nonesuch" in texts[1], texts[1]


# --- handshake, the listening side ---


@pytest.fixture
def runtime() -> _core.Runtime:
    return _core.Runtime(1 << 20)


def visit(runtime: _core.Runtime, message: bytes) -> tuple[bytes, list[str]]:
    """What a visitor is told, and what the file descriptors are that it is handed (closed here)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
        visitor.settimeout(10)
        visitor.connect("\0" + runtime.address)
        visitor.send(message)
        text, ancillary, _, _ = visitor.recvmsg(100, socket.CMSG_SPACE(8))
    fds: list[int] = []
    for _, kind, data in ancillary:
        assert kind == socket.SCM_RIGHTS
        fds += array.array("i", data)
    files = [Path(f"/proc/self/fd/{fd}").readlink().name.removesuffix(" (deleted)") for fd in fds]
    for fd in fds:
        os.close(fd)
    return text, files


def test_a_member_gets_the_segment_and_the_bell(runtime: _core.Runtime) -> None:
    text, files = visit(runtime, REQUEST.pack(MAGIC, _core.PROTOCOL_VERSION, 0, runtime.nonce))
    assert REPLY.unpack(text) == (MAGIC, _core.PROTOCOL_VERSION, 0, 1 << 20)
    assert files == ["memfd:hxcomm", "anon_inode:[eventfd]"]


def test_a_stale_nonce_gets_a_refusal_and_no_segment(runtime: _core.Runtime) -> None:
    text, fds = visit(runtime, REQUEST.pack(MAGIC, _core.PROTOCOL_VERSION, 0, secrets.token_bytes(16)))
    assert REPLY.unpack(text)[2] == 1 and not fds


def test_another_protocol_version_gets_a_refusal_and_no_segment(runtime: _core.Runtime) -> None:
    text, fds = visit(runtime, REQUEST.pack(MAGIC, _core.PROTOCOL_VERSION + 1, 0, runtime.nonce))
    assert REPLY.unpack(text)[2] == 2 and not fds


@pytest.mark.parametrize("message", [b"x", b"GET / HTTP/1.1\r\n\r\n", bytes(32), bytes(5000)])
def test_noise_gets_no_answer_and_harms_nobody(runtime: _core.Runtime, message: bytes) -> None:
    assert visit(runtime, message) == (b"", [])
    test_a_member_gets_the_segment_and_the_bell(runtime)


def test_silent_visitors_keep_nobody_out(runtime: _core.Runtime) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(100)]
    try:
        for visitor in silent:
            visitor.connect("\0" + runtime.address)
        test_a_member_gets_the_segment_and_the_bell(runtime)
    finally:
        for visitor in silent:
            visitor.close()


# --- handshake, the calling side ---


def connect_to(address: str, nonce: bytes, timeout_ms: int = 5000) -> bool:
    group = _core.Group(_core.Runtime(1 << 20), name="g", rank=0, world_size=2, label="rank 0", nonce=1)
    try:
        return group.connect(
            rank=1, address=address, nonce=nonce, control_offset=4096, label="rank 1", timeout_ms=timeout_ms
        )
    finally:
        group.leave()


def sealed_memfd(nbytes: int, seals: int) -> int:
    import fcntl

    fd = os.memfd_create("stranger", os.MFD_ALLOW_SEALING)
    os.truncate(fd, nbytes)
    fcntl.fcntl(fd, 1033, seals)  # F_ADD_SEALS
    return fd


SHRINK_AND_GROW = 2 | 4

STRANGERS: dict[str, tuple[bytes, int | None, str]] = {
    # what it answers, the seals of the file it hands over (None: no file), what the error says
    "other version": (REPLY.pack(MAGIC, 99, 2, 0), None, "speaks protocol version 99"),
    "refused nonce": (REPLY.pack(MAGIC, _core.PROTOCOL_VERSION, 1, 0), None, "refused the nonce"),
    "noise": (b"hello", None, "not an hxcomm process"),
    "no file": (REPLY.pack(MAGIC, _core.PROTOCOL_VERSION, 0, 8192), None, "refused the nonce"),
    "not sealed": (REPLY.pack(MAGIC, _core.PROTOCOL_VERSION, 0, 8192), 0, "not sealed"),
    "shorter": (REPLY.pack(MAGIC, _core.PROTOCOL_VERSION, 0, 1 << 30), SHRINK_AND_GROW, "size is not what it says"),
    "tiny": (
        REPLY.pack(MAGIC, _core.PROTOCOL_VERSION, 0, 0),
        SHRINK_AND_GROW,
        "cannot map a shared segment of 0 bytes",
    ),
    "empty": (REPLY.pack(MAGIC, _core.PROTOCOL_VERSION, 0, 8192), SHRINK_AND_GROW, "header is not the one"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_at_the_address_is_refused(kind: str) -> None:
    answer, seals, what = STRANGERS[kind]
    name = "hxcomm-test-" + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0" + name)
        listener.listen()

        def serve() -> None:
            visitor, _ = listener.accept()
            with visitor:
                visitor.recv(100)
                if seals is None:
                    visitor.send(answer)
                else:
                    fds = [sealed_memfd(0 if kind == "tiny" else 8192, seals), os.eventfd(0)]
                    visitor.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                    for fd in fds:
                        os.close(fd)

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(InitError, match=re.escape(what)):
            connect_to(name, bytes(16))
        server.join()


def test_nobody_at_the_address_is_another_host_and_nobody_answering_an_error() -> None:
    assert not connect_to("hxcomm-" + secrets.token_hex(8), bytes(16))
    name = "hxcomm-test-" + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0" + name)
        listener.listen()
        with pytest.raises(InitError, match="did not answer within 50 ms"):
            connect_to(name, bytes(16), timeout_ms=50)


def one_rank(rank: int, world_size: int) -> float:
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    return float(tensor.sum())


def test_a_world_of_one_needs_nobody(rank_pool: Pool) -> None:
    assert rank_pool(1).run(one_rank) == [3.0]
