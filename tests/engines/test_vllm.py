"""vLLM itself over hxcomm, with real weights: scripts/test_engines.sh runs this in an environment that has vLLM."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from hxcomm.stats import report

pytest.importorskip("vllm", reason="bash scripts/test_engines.sh makes an environment with vLLM and runs these there")

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "build" / "SmolLM2-135M-Instruct"
RANKS = 3
NEW_TOKENS = 16
LAYERS, FEW = 30, 4
CLOSE = 1e-3  # of log-probabilities: ranks add in another order than one process
OURS = ["HxcommCpuPlatform", "HxcommCommunicator", "hxcomm"]


def environment(asked: bool, *folders: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, (HERE, *folders)))
    return {**os.environ, "HXCOMM_CPU": "1" if asked else "0", "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def decoded(
    folder: Path,
    model: Path,
    ranks: int,
    mode: str,
    workers: str = "vllm_workers",
    asked: bool = True,
    avx512: bool = True,
) -> dict[str, Any]:
    """What vllm_program.py reports, and what HXCOMM_STATS has left. vLLM keeps in `folder` what it compiles."""
    result, stats = folder / "result.json", Path(tempfile.mkdtemp(dir=folder))
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_program.py"), str(result), str(model), str(ranks), mode, workers],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={
            **environment(asked, *([] if avx512 else [HERE / "only_avx2"])),
            "VLLM_CACHE_ROOT": str(folder),
            "HXCOMM_STATS": str(stats),
        },
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return {**json.loads(result.read_text()), "files": recorded(stats)}


def recorded(stats: Path) -> list[dict[str, int]]:
    """How often each rank did which op, by its file."""
    processes = sorted(map(report.read, stats.glob("*.json")), key=lambda process: process.rank)
    counted: list[dict[str, int]] = []
    for process in processes:
        counted.append({})
        for row in process.rows:
            counted[-1][row["op"]] = counted[-1].get(row["op"], 0) + row["calls"]
    return counted


def calls(layers: int, forwards: int) -> list[dict[str, int]]:
    """What all ranks count: all_reduces of the embedding and twice in each layer, an all_gather of the logits."""
    return [{"all_reduce": (1 + 2 * layers) * forwards, "all_gather": forwards}] * RANKS


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process of vLLM as it is without hxcomm."""
    return decoded(tmp_path_factory.mktemp("alone"), MODEL, 1, "eager", asked=False)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model's first layers, which start and compile in less time; what one process without hxcomm makes of them."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("short")
    shutil.copytree(MODEL, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = json.loads((MODEL / "config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": FEW}))
    left_out = tuple(f"model.layers.{layer}." for layer in range(FEW, LAYERS))
    tensors = load_file(MODEL / "model.safetensors").items()
    kept = {name: tensor for name, tensor in tensors if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, decoded(tmp_path_factory.mktemp("alone"), folder, 1, "eager", asked=False)


def check_equal(result: dict[str, Any], alone: dict[str, Any]) -> None:
    assert len(result["tokens"]) == NEW_TOKENS
    assert result["tokens"] == alone["tokens"]
    check_close(result["logprobs"], alone)


def check_close(logprobs: list[float], alone: dict[str, Any]) -> None:
    differences = [abs(one - other) for one, other in zip(logprobs, alone["logprobs"], strict=True)]
    assert max(differences) < CLOSE


def test_vllm_finds_both_entry_points() -> None:
    for group, name in (("vllm.platform_plugins", "platform"), ("vllm.general_plugins", "check")):
        values = [entry.value for entry in entry_points(group=group) if entry.name == "hxcomm"]
        assert values == [f"hxcomm.engines.vllm:{name}"]


def test_without_the_switch_vllm_is_what_it_was(alone: dict[str, Any]) -> None:
    assert alone["names"] == ["CpuPlatform", "NoneType", "gloo"]
    assert (alone["calls"], alone["files"]) == ([{}], [])
    assert alone["text"].startswith(" Paris.")


def check_ours(result: dict[str, Any], alone: dict[str, Any]) -> None:
    assert result["names"] == OURS
    assert result["calls"] == calls(FEW, NEW_TOKENS)
    assert result["files"] == result["totals"]
    check_equal(result, alone)


def test_three_ranks_compiled_give_the_tokens_of_one_process_with_all_collectives_ours(
    tmp_path: Path, short: tuple[Path, dict[str, Any]]
) -> None:
    model, alone = short
    check_ours(decoded(tmp_path, model, RANKS, "compiled"), alone)
    check_ours(decoded(tmp_path, model, RANKS, "compiled"), alone)  # as the run before has left it compiled


def test_so_do_they_where_the_processor_has_no_avx512(tmp_path: Path, short: tuple[Path, dict[str, Any]]) -> None:
    model, alone = short
    check_ours(decoded(tmp_path, model, RANKS, "compiled", avx512=False), alone)


def test_what_vllm_compiles_without_us_it_does_not_load_with_us() -> None:
    program = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"print(EngineArgs({str(MODEL)!r}, tensor_parallel_size=3).create_engine_config().compute_hash())"
    )

    def name_of_compiled_models(asked: bool) -> str:
        """The last of what is printed: vLLM logs to the same place."""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, env=environment(asked)
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    without, ours, again = map(name_of_compiled_models, (False, True, True))
    assert without != ours == again


def test_without_our_communicator_no_collective_of_the_model_is_ours_although_tokens_and_backend_are(
    tmp_path: Path, short: tuple[Path, dict[str, Any]]
) -> None:
    model, alone = short
    result = decoded(tmp_path, model, RANKS, "eager", "vllm_workers_of_their_own")
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


@dataclasses.dataclass
class Server:
    """`vllm serve` with three ranks."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    stats: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ask(self, **wanted: Any) -> http.client.HTTPResponse:
        body = json.dumps({"model": "model", "temperature": 0, "ignore_eos": True, **wanted}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=60)
        return answer

    def wait_until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.said()[-6000:]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.2)

    def is_healthy(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Ready to be asked, in eager mode."""
    folder = tmp_path_factory.mktemp("server")
    log, stats = folder / "log", folder / "stats"
    stats.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL), "--served-model-name", "model"]
    options = ["--tensor-parallel-size", str(RANKS), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    variables = {**environment(asked=True), "HXCOMM_STATS": str(stats)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options, *listen], stdout=output, stderr=subprocess.STDOUT, env=variables
        )
    try:
        started = Server(process, f"http://127.0.0.1:{port}", log, stats)
        started.wait_until(started.is_healthy)
        yield started
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        if process.poll() is None:
            process.kill()
            process.wait()


def worker(server_process: subprocess.Popen[bytes], rank: int) -> int:
    """The process of a rank, by the title that vLLM gives it."""
    import psutil

    for child in psutil.Process(server_process.pid).children(recursive=True):
        if f"Worker_TP{rank}" in " ".join(child.cmdline()):
            return int(child.pid)
    raise AssertionError(f"no process of rank {rank} among the server's")


def test_a_server_gives_the_answer_of_one_process_and_its_files_show_61_all_reduces_a_forward(
    server: Server, alone: dict[str, Any]
) -> None:
    with server.ask(prompt=alone["prompt"], max_tokens=NEW_TOKENS, logprobs=0) as answer:
        [choice] = json.load(answer)["choices"]
    assert choice["text"] == alone["text"]
    check_close(choice["logprobs"]["token_logprobs"], alone)
    server.wait_until(lambda: recorded(server.stats) == calls(LAYERS, NEW_TOKENS))  # written each second


def test_when_a_worker_is_killed_the_log_says_who_and_how_the_server_ends_and_files_of_all_ranks_remain(
    server: Server,
) -> None:
    with server.ask(prompt="Once upon a time", max_tokens=900, stream=True) as answer:
        assert answer.readline().startswith(b"data: ")
        before = recorded(server.stats)
        killed = worker(server.process, 1)
        os.kill(killed, signal.SIGKILL)
        server.process.wait(timeout=60)
    said = [line for line in server.said().splitlines() if "PeerFailedError" in line and "rank 1" in line]
    assert said, server.said()[-6000:]
    assert all("SIGKILL" in line and str(killed) in line for line in said)
    after = recorded(server.stats)
    assert [rank["all_reduce"] >= earlier["all_reduce"] for rank, earlier in zip(after, before, strict=True)] == [
        True
    ] * 3
