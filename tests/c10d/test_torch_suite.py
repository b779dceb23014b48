"""A slice of torch's own suite of torch.distributed, and the runner: docs/torch_suite.md has the whole."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "torch_suite.py"
pytestmark = [
    pytest.mark.ranks,
    # Part of the dev extra; torch's test modules cannot be imported without it.
    pytest.mark.skipif(importlib.util.find_spec("expecttest") is None, reason="torch's suite needs expecttest"),
]

# One or two of every kind: collectives, lists, objects, messages, groups, futures, profiles, timeouts, DDP.
SLICE = (
    "test_all_gather",
    "test_all_reduce_coalesced_sum",
    "test_all_reduce_complex_unsupported_ops",
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
    "test_barrier_timeout_full_group",
    "test_barrier_timeout_global",
    "test_batch_isend_irecv_gloo_tags",
    "test_broadcast",
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_gather_object",
    "test_get_backend",
    "test_isend_torch_profiler",
    "test_all_gather_object_subgroup",
    "test_reduce_product",
    "test_send_recv_any_source_autograd_profiler",
    "test_sparse_all_reduce_sum",
)


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=150)


def test_a_slice_of_torchs_suite_passes_at_four_ranks() -> None:
    result = suite("--timeout", "60", "-k", f"^({'|'.join(SLICE)})$")
    assert f"{len(SLICE)} passed, 0 failed, 0 skipped, 0 hung" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0


def test_torchs_uneven_lists_of_all_to_all_pass() -> None:
    result = suite("--timeout", "60", "--as", "mpi", "-k", "^test_all_to_all(_complex|_single_unequal_split)?$")
    assert "3 passed, 0 failed, 0 skipped, 0 hung" in result.stdout, result.stdout + result.stderr


HANGING = """
import importlib.util, os, signal, sys, unittest
spec = importlib.util.spec_from_file_location("torch_suite", sys.argv[1])
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
runner.STACKS_S = 0

class Suite(unittest.TestCase):
    def test_hangs(self):
        if (pid := os.fork()) == 0:
            signal.pause()
        open(sys.argv[2], "w").write(str(pid))
        signal.pause()

    def test_dies(self):
        os._exit(1)

    def test_fails(self):
        self.assertEqual(1, 2)

    def test_passes(self):
        pass

for name in ("test_hangs", "test_dies", "test_fails", "test_passes"):
    result = runner.run_one(Suite, name, timeout_s=2)
    print(name, result["outcome"], result["detail"])
"""


def test_a_test_that_hangs_or_dies_costs_the_others_nothing_and_leaves_no_process(tmp_path: Path) -> None:
    child = tmp_path / "child"
    command = [sys.executable, "-c", HANGING, str(SCRIPT), str(child)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert lines == [
        "test_hangs hung did not end in 2 s",
        "test_dies failed the process that ran the test died",
        "test_fails failed AssertionError: 1 != 2",
        "test_passes passed ",
    ]
    stat = Path(f"/proc/{child.read_text()}/stat")  # where nobody reaps orphans, a dead one stays, as a zombie
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


COMPARE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("torch_suite", sys.argv[1])
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
def results(**outcomes):
    return [{"test": name, "outcome": outcome, "detail": "why"} for name, outcome in outcomes.items()]
other = {"backend": "gloo", "results": results(a="passed", b="passed", c="failed", d="passed")}
print(runner.compare("hxcomm", results(a="passed", b="hung", c="passed", d="skipped"), other))
"""


def test_a_test_that_only_the_other_backend_passes_is_named_also_where_it_is_skipped() -> None:
    command = [sys.executable, "-c", COMPARE, str(SCRIPT)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert output.splitlines()[-1] == "['b', 'd']"
    assert "gloo passes and hxcomm does not: 2" in output and "hxcomm passes and gloo does not: 1" in output
