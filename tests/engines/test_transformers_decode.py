"""examples/plain_transformers.py, a program that knows of no backend, over three ranks with the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="pip install 'hxcomm[examples]'")

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
RANKS = 3
NEW_TOKENS = 8
CLOSE = 1e-3  # of logits around 10: ranks add in another order than one process


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=150, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model."""
    path = tmp_path_factory.mktemp("smollm2")
    done = run(EXAMPLES / "smollm2_folder.py", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the example makes in one process."""
    import torch

    out = tmp_path_factory.mktemp("alone")
    done = run(HERE / "plain_decode.py", out, "distributed_config", folder)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout
    made: dict[str, Any] = torch.load(out / "rank-alone.pt")
    assert made["backends"] is None
    return made


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("device", "variables", "form"),
    [("cpu", {"HXCOMM_CPU": "1"}, "distributed_config"), ("hx", {}, "tp_plan")],
    ids=["cpu with the switch", "hx"],
)
def test_a_program_without_distributed_code_decodes_as_one_process_with_61_all_reduces_a_forward(
    device: str, variables: dict[str, str], form: str, folder: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
    done = run(*torchrun, HERE / "plain_decode.py", tmp_path, form, folder, HXCOMM_STATS=str(tmp_path), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    forwards = NEW_TOKENS + 1
    for rank in range(RANKS):
        made = torch.load(tmp_path / f"rank{rank}.pt")
        assert made["tokens"].tolist() == alone["tokens"].tolist()
        assert float((made["logits"] - alone["logits"]).abs().max()) <= CLOSE
        assert made["device"] == ("cpu" if device == "cpu" else f"hx:{rank}")
        assert f"{device}:hxcomm" in made["backends"].split(",")
        rows = json.loads(next(tmp_path.glob(f"hxcomm-stats-*-rank{rank}.json")).read_text())["rows"]
        calls = {row["op"]: row["calls"] for row in rows}
        # Two in each of 30 layers and one for the embedding; the head's parts are gathered. Nothing else is.
        assert calls == {"all_reduce": 61 * forwards, "all_gather": forwards}
