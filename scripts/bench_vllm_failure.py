"""One worker of `vllm serve` is killed while it answers: how long until the server has ended, and what its log says.

    source scripts/setup.sh; source scripts/vllm_environment.sh
    "$VLLM_BIN/python" scripts/bench_vllm_failure.py "$MODEL" --rounds 2

With hxcomm, and with vLLM's own shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

import psutil

RANKS = 3
START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 120.0
WAYS = {"hxcomm": "1", "vLLM's shared memory": "0"}  # HXCOMM_CPU
NAMED = re.compile(r"(PeerFailedError: .*|ERROR .*(?:died|SIGKILL).*)")


def measure(model: str, asked: str, log: Path) -> tuple[float, list[str]]:
    """Seconds from the kill to the end of the server's process (END_TIMEOUT_S: it was still there), and the lines of
    its log that say who died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    vllm = str(Path(sys.executable).with_name("vllm"))
    options = ["--tensor-parallel-size", str(RANKS), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [vllm, "serve", model, "--served-model-name", "model", "--port", str(port), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HXCOMM_CPU": asked},
        )
    workers: list[psutil.Process] = []
    try:
        wait_until_healthy(server, port)
        workers = [each for each in psutil.Process(server.pid).children(recursive=True) if "Worker" in title(each)]
        [killed] = [each for each in workers if "Worker_TP1" in title(each)]
        body = {"model": "model", "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            begin = time.monotonic()
            killed.send_signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=END_TIMEOUT_S)
            seconds = time.monotonic() - begin
    finally:
        server.kill()
        server.wait()
        for each in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    return seconds, list(dict.fromkeys(NAMED.findall(log.read_text(errors="replace"))))


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the server did not come up")
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    args = parser.parse_args()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    lines: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for way, asked in WAYS.items():
                seconds, lines[way] = measure(args.model, asked, Path(folder) / "log")
                times[way].append(seconds)
    for way in WAYS:
        each = ", ".join(f"{seconds:.1f}" for seconds in times[way])
        print(f"{way}: ended {median(times[way]):.1f} s after the kill ({each}); its log:")
        print(*(f"    {line}" for line in lines[way]), sep="\n")


if __name__ == "__main__":
    main()
