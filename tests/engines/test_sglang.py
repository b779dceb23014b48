"""What SGLang's own discovery makes of hxcomm's plug-in.

Its wheel alone is enough, and scripts/test_engines.sh installs that. `import sglang` would import all that SGLang
serves models with; its package of platforms needs little.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("bash scripts/test_engines.sh installs SGLang's wheel and runs these", allow_module_level=True)

PROGRAM = """
import importlib.util, sys, types
package = types.ModuleType("sglang")
package.__path__ = list(importlib.util.find_spec("sglang").submodule_search_locations)
sys.modules["sglang"] = package
from sglang.srt.platforms import current_platform as platform
print(type(platform).__name__, platform.get_torch_distributed_backend_str(), platform.is_cpu())
"""


def chosen(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HXCOMM_CPU": "0", "SGLANG_USE_CPU_ENGINE": "1", **environment},
    )


def test_without_the_switch_sglang_keeps_its_cpu_platform() -> None:
    assert chosen().stdout == "CpuSRTPlatform gloo True\n"


def test_with_the_switch_its_process_groups_are_ours() -> None:
    assert chosen(HXCOMM_CPU="1").stdout == "HxcommSRTPlatform hxcomm True\n"
    assert chosen(HXCOMM_CPU="1", SGLANG_PLATFORM="hxcomm").stdout == "HxcommSRTPlatform hxcomm True\n"


def test_a_program_that_did_not_ask_for_cpu_keeps_its_platform() -> None:
    assert "Hxcomm" not in chosen(HXCOMM_CPU="1", SGLANG_USE_CPU_ENGINE="0").stdout


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "torch.distributed does not know the backend hxcomm"),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HXCOMM_CPU": "yes"}, "HXCOMM_CPU='yes': not 0 or 1"),
    ],
)
def test_what_would_make_it_take_gloo_raises(environment: dict[str, str], error: str) -> None:
    done = chosen(**{"HXCOMM_CPU": "1", **environment})
    assert done.returncode == 1
    assert error in done.stderr.splitlines()[-1]
