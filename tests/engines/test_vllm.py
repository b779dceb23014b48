"""vLLM itself over hxcomm, with real weights: scripts/test_engines.sh runs this in an environment that has vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="bash scripts/test_engines.sh makes an environment with vLLM and runs these there")

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "build" / "SmolLM2-135M-Instruct"
RANKS = 3
NEW_TOKENS = 16
ALL_REDUCES = 61  # in each forward: two in each of 30 layers, and one for the embedding
CLOSE = 1e-3  # of log-probabilities: ranks add in another order than one process
OURS = ["HxcommCpuPlatform", "HxcommCommunicator", "hxcomm"]


def environment(asked: bool, *folders: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, (HERE, *folders)))
    return {**os.environ, "HXCOMM_CPU": "1" if asked else "0", "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def decoded(
    folder: Path, ranks: int, mode: str, workers: str = "vllm_workers", asked: bool = True, avx512: bool = True
) -> dict[str, Any]:
    """What vllm_program.py reports. vLLM keeps in `folder` what it compiles."""
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_program.py"), str(result), str(MODEL), str(ranks), mode, workers],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={
            **environment(asked, *([] if avx512 else [HERE / "only_avx2"])),
            "VLLM_CACHE_ROOT": str(folder),
        },
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return dict(json.loads(result.read_text()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process of vLLM as it is without hxcomm."""
    return decoded(tmp_path_factory.mktemp("alone"), 1, "eager", asked=False)


def check_equal(result: dict[str, Any], alone: dict[str, Any]) -> None:
    assert len(result["tokens"]) == NEW_TOKENS
    assert result["tokens"] == alone["tokens"]
    differences = [abs(one - other) for one, other in zip(result["logprobs"], alone["logprobs"], strict=True)]
    assert max(differences) < CLOSE


def test_vllm_finds_both_entry_points() -> None:
    for group, name in (("vllm.platform_plugins", "platform"), ("vllm.general_plugins", "check")):
        values = [entry.value for entry in entry_points(group=group) if entry.name == "hxcomm"]
        assert values == [f"hxcomm.engines.vllm:{name}"]


def test_without_the_switch_vllm_is_what_it_was(alone: dict[str, Any]) -> None:
    assert alone["names"] == ["CpuPlatform", "NoneType", "gloo"]
    assert alone["calls"] == [{}]
    assert alone["text"].startswith(" Paris.")


def check_ours(result: dict[str, Any], alone: dict[str, Any]) -> None:
    assert result["names"] == OURS
    assert result["calls"] == [{"all_reduce": ALL_REDUCES * NEW_TOKENS, "all_gather": NEW_TOKENS}] * RANKS
    check_equal(result, alone)


def test_three_ranks_give_the_tokens_of_one_process_with_61_all_reduces_a_forward(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    check_ours(decoded(tmp_path, RANKS, "eager"), alone)


def test_so_do_they_compiled_also_where_vllm_has_compiled_the_model_before_without_us(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    theirs = decoded(tmp_path, RANKS, "compiled", asked=False)
    assert (theirs["names"], theirs["calls"]) == (["CpuPlatform", "CpuCommunicator", "gloo"], [{}] * RANKS)
    check_ours(decoded(tmp_path, RANKS, "compiled"), alone)
    check_ours(decoded(tmp_path, RANKS, "compiled"), alone)  # as the run before has left it


def test_so_do_they_where_the_processor_has_no_avx512(tmp_path: Path, alone: dict[str, Any]) -> None:
    check_ours(decoded(tmp_path, RANKS, "compiled", avx512=False), alone)


def test_without_our_communicator_no_collective_of_the_model_is_ours_although_tokens_and_backend_are(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    result = decoded(tmp_path, RANKS, "eager", "vllm_workers_of_their_own")
    assert result["names"] == ["HxcommCpuPlatform", "CpuCommunicator", "hxcomm"]
    assert result["calls"] == [{}] * RANKS
    check_equal(result, alone)


def test_a_platform_chosen_without_asking_plug_ins_raises() -> None:
    program = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        env={**environment(asked=True), "VLLM_TARGET_DEVICE": "cpu"},
    )
    assert done.returncode == 1
    assert "vLLM chose the platform vllm.platforms.cpu.CpuPlatform" in done.stderr


def test_a_backend_that_is_not_registered_raises_instead_of_becoming_gloo() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from vllm.platforms import current_platform; current_platform.dist_backend"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**environment(asked=True), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.returncode == 1
    assert "ImportError: torch.distributed does not know the backend hxcomm" in done.stderr


@contextlib.contextmanager
def server(log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`vllm serve` with three ranks, ready to be asked, and where it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL), "--served-model-name", "model"]
    options = ["--tensor-parallel-size", str(RANKS), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options, *listen], stdout=output, stderr=subprocess.STDOUT, env=environment(asked=True)
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield process, f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text(errors="replace")[-6000:]
            assert time.monotonic() < end, log.read_text(errors="replace")[-6000:]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)


def stream(url: str, started: threading.Event) -> None:
    """A long answer; says when the first of it has come."""
    body = {"model": "model", "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                started.set()


def worker(server_process: subprocess.Popen[bytes], rank: int) -> int:
    """The process of a rank, by the title that vLLM gives it."""
    import psutil

    for child in psutil.Process(server_process.pid).children(recursive=True):
        if f"Worker_TP{rank}" in " ".join(child.cmdline()):
            return int(child.pid)
    raise AssertionError(f"no process of rank {rank} among the server's")


def test_when_a_worker_is_killed_the_log_says_who_and_how_and_the_server_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server(log) as (process, url):
        started = threading.Event()
        asking = threading.Thread(target=stream, args=(url, started), daemon=True)
        asking.start()
        assert started.wait(60), log.read_text(errors="replace")[-6000:]
        killed = worker(process, 1)
        os.kill(killed, signal.SIGKILL)
        process.wait(timeout=60)
        asking.join(timeout=60)
    text = log.read_text(errors="replace")
    said = [line for line in text.splitlines() if "PeerFailedError" in line and "rank 1" in line]
    assert said, text[-6000:]
    assert all("SIGKILL" in line and str(killed) in line for line in said)
