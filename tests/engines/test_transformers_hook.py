"""How transformers comes to use hxcomm: for hx always, for CPU only where that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest

pytest.importorskip("transformers", reason="pip install 'hxcomm[examples]'")


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )


def printed(program: str, **variables: str) -> str:
    done = run(program, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BACKENDS = "from transformers.distributed.utils import DISTRIBUTED_BACKEND_MAP as m; print(m.get('hx'), m['cpu'])"
ORDERS = {
    "torch first": "import torch, transformers.modeling_utils",
    "transformers first": "import transformers.modeling_utils",
    # Then `import torch` is a line of the very module that is waited for.
    "the module itself first": "import transformers.distributed.utils, transformers.modeling_utils",
}


@pytest.mark.parametrize("order", ORDERS)
def test_hx_is_served_whatever_is_imported_first_and_cpu_with_the_switch_only(order: str) -> None:
    program = f"{ORDERS[order]}\n{BACKENDS}"
    assert printed(program) == "hxcomm gloo"
    assert printed(program, HXCOMM_CPU="1") == "hxcomm hxcomm"


def test_import_torch_imports_nothing_for_an_engine() -> None:
    names = "[name for name in sys.modules if name.startswith(('transformers', 'vllm', 'sglang', 'hxcomm.engines.'))]"
    assert printed(f"import sys, torch; print({names})") == "['hxcomm.engines.watching']"


def test_the_switch_raises_where_transformers_keeps_its_backends_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from hxcomm.engines.transformers import set_up

    monkeypatch.delenv("HXCOMM_CPU", raising=False)
    set_up(ModuleType("another_version"))
    monkeypatch.setenv("HXCOMM_CPU", "1")
    with pytest.raises(ImportError, match=r"^HXCOMM_CPU=1: transformers [\d.]+ keeps its backends elsewhere"):
        set_up(ModuleType("another_version"))


def test_with_the_switch_a_broken_hxcomm_fails_instead_of_leaving_cpu_to_gloo() -> None:
    program = (
        "import os, torch, transformers.modeling_utils\n"
        "from hxcomm import build_check\n"
        "build_check.problem = lambda: 'hxcomm was built for another torch'\n"
        "os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')\n"
        "from transformers.distributed.utils import _ensure_torch_distributed\n"
        "try: _ensure_torch_distributed('cpu')\n"
        "except OSError as error: print(type(error.__cause__).__name__, error.__cause__)\n"
        "else: print(torch.distributed.get_backend())"
    )
    assert printed(program, HXCOMM_CPU="1") == "ImportError hxcomm was built for another torch"
    assert printed(program) == "gloo"


AUTOLOAD = """
import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'
import torch, hxcomm, hxcomm.c10d, warnings
def fail(): raise RuntimeError('no backend today')
hxcomm.c10d.register_backend = fail
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    try: hxcomm._autoload()
    except RuntimeError as error: print('raised', error)
print(*[each.message for each in caught])
"""


def test_a_registration_that_fails_is_a_warning_and_with_the_switch_an_error() -> None:
    assert printed(AUTOLOAD) == "hxcomm could not register its backend: no backend today"
    assert printed(AUTOLOAD, HXCOMM_CPU="1").splitlines()[0] == "raised no backend today"


def test_a_switch_that_is_neither_0_nor_1_stops_import_torch() -> None:
    done = run("import torch", HXCOMM_CPU="yes")
    assert done.returncode != 0
    assert "HXCOMM_CPU='yes': not 0 or 1" in done.stderr
