"""all_reduce of hxcomm, gloo, MPICH and Open MPI, in interleaved rounds; medians of the rounds as a markdown table.

    python scripts/bench_peers.py --ranks 2 --sizes 4KiB,16KiB,64KiB,1MiB,64MiB --rounds 5
    python scripts/bench_peers.py --ranks 2 --sizes 4KiB,16KiB,64KiB --backend torchcomm    # by TorchComm's calls

Peers of other runtimes cannot share a process, so rounds take turns: hxcomm with gloo (interleaved in one process),
MPICH, Open MPI, and again. scripts/bench.sh --mpi makes the environments it looks for, build/venv-mpich and
build/venv-openmpi; one that is missing is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("hxcomm", "torchcomm", "gloo", "mpich", "openmpi")
LAUNCH = {"mpich": ["-n"], "openmpi": ["--oversubscribe", "--allow-run-as-root", "-n"]}
ROUND_TIMEOUT_S = 900.0

Times = dict[tuple[str, int], list[float]]  # (backend, bytes) -> median us of each round


def environment() -> dict[str, str]:
    """One thread a rank for everybody, and hxcomm from this tree."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(command: list[str], result: Path, times: Times) -> None:
    """Runs one measurement and adds its rows. Raises CalledProcessError where it fails or a result was wrong."""
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL, timeout=ROUND_TIMEOUT_S)
    for row in json.loads(result.read_text(encoding="utf-8"))["rows"]:
        if row["backend"] in BACKENDS:
            times.setdefault((row["backend"], row["nbytes"]), []).append(row["p50_us"])


def run_round(ranks: int, sizes: str, device: str, backend: str, times: Times) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [
            "-m",
            "hxcomm.bench",
            "--backend",
            backend,
            "--compare",
            "gloo",
            "--ops",
            "all_reduce",
            "--device",
            device,
        ]
        run([*command, "--sizes", sizes, "--json", str(result)], result, times)
        for mpi, options in LAUNCH.items():
            binaries = ROOT / "build" / f"venv-{mpi}" / "bin"
            if not (binaries / "mpiexec").exists():
                continue
            command = [str(binaries / "mpiexec"), *options, str(ranks), str(binaries / "python")]
            command += [str(ROOT / "scripts" / "bench_mpi.py"), "--sizes", sizes, "--json", str(result)]
            run(command, result, times)


def markdown(times: Times, ranks: int, rounds: int, ours: str) -> str:
    backends = [name for name in BACKENDS if any(backend == name for backend, _ in times)]
    mpis = [name for name in backends if name in LAUNCH]
    lines = [
        f"all_reduce, float32, {ranks} ranks on {len(os.sched_getaffinity(0))} cores: median us a call, medians of "
        f"{rounds} rounds, buffers touched up to 1 MiB."
    ]
    missing = [name for name in LAUNCH if name not in backends]
    if missing:
        lines.append(f"Not installed here: {', '.join(missing)} (scripts/bench.sh --mpi installs them).")
    titles = ["bytes", *backends, f"gloo / {ours}", *([f"better MPI / {ours}"] if mpis else [])]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for nbytes in sorted({size for _, size in times}):
        us = {name: median(times[name, nbytes]) for name in backends if (name, nbytes) in times}
        cells = [f"{nbytes}", *(f"{us[name]:.1f}" if name in us else "-" for name in backends)]
        cells.append(f"{us['gloo'] / us[ours]:.1f}x")
        if mpis:
            cells.append(f"{min(us[name] for name in mpis) / us[ours]:.2f}x")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", default="4KiB,16KiB,64KiB,1MiB,64MiB", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of hxcomm's tensors, cpu or hx (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=("hxcomm", "torchcomm"), default="hxcomm", help="by c10d's calls (default) or TorchComm's"
    )
    options = parser.parse_args()
    if options.ranks < 2 or options.rounds < 1:
        parser.error("--ranks must be at least 2 and --rounds at least 1")
    times: Times = {}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        try:
            run_round(options.ranks, options.sizes, options.device, options.backend, times)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"bench_peers.py: {error}", file=sys.stderr)
            return 1
    print(markdown(times, options.ranks, options.rounds, options.backend))
    return 0


if __name__ == "__main__":
    sys.exit(main())
