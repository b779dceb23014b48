"""examples/tp_transformers.py as its users run it: transformers' own Llama and plan, on hx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="pip install 'hxcomm[examples]'")

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "tp_transformers.py"
NEW_TOKENS = 4


def run_program(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), "--max-new-tokens", str(NEW_TOKENS), *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
    )


def result_of(ranks: int, *arguments: str) -> dict[str, Any]:
    done = run_program(ranks, *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_three_ranks_on_hx_give_the_tokens_and_logits_of_one_process_with_61_all_reduces_a_forward() -> None:
    result = result_of(3)
    assert result["text"].startswith(" Paris.")
    assert len(result["token_ids"]) == NEW_TOKENS
    assert result["tokens_equal"]
    assert result["largest_difference"] < 1e-3
    assert result["all_reduces_per_forward"] == 61  # two in each of 30 layers, and one for the embedding
    assert (result["device"], result["world_size"]) == ("hx:0", 3)


def test_one_process_needs_no_process_group_and_shows_one_screen() -> None:
    done = run_program(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("The capital of France is Paris.")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "tokens equal" in done.stdout
    assert "all_reduces          0 in each forward" in done.stdout
