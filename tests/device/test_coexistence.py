"""The device keeps out of the way: of other accelerators, of programs that use CPU only, and of forked children."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def python(program: str, **variables: str) -> str:
    """What the program prints, run in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STATE = "import torch; from hxcomm.device import registration; print(registration.state(), hasattr(torch, 'hx'))"


def test_the_device_is_there_with_the_chips_that_variables_ask_for() -> None:
    assert python(STATE) == "on: 8 chips of 16 GiB each True"
    assert python(STATE, HXCOMM_CHIPS="2", HXCOMM_HBM="64MiB") == "on: 2 chips of 0.0625 GiB each True"


def test_a_small_chip_is_full_soon() -> None:
    program = (
        "import torch\n"
        "try: torch.empty(65 << 20, dtype=torch.uint8, device='hx')\n"
        "except torch.OutOfMemoryError as error: print(torch.hx.device_count(), error)"
    )
    printed = python(program, HXCOMM_CHIPS="2", HXCOMM_HBM="64MiB")
    assert printed.startswith("2 ") and "capacity of 64.00 MiB" in printed


def test_hxcomm_device_0_leaves_torch_as_it_was() -> None:
    assert python(STATE, HXCOMM_DEVICE="0") == "off: HXCOMM_DEVICE=0 False"
    program = "import torch; print(torch.accelerator.current_accelerator(), torch._C._get_privateuse1_backend_name())"
    assert python(program, HXCOMM_DEVICE="0") == "None privateuseone"


def test_hxcomm_cpu_1_keeps_a_process_on_cpu_unless_hx_is_asked_for() -> None:
    expected = "off: HXCOMM_CPU=1 keeps this process on CPU; HXCOMM_DEVICE=1 registers hx all the same False"
    assert python(STATE, HXCOMM_CPU="1") == expected
    assert python(STATE, HXCOMM_CPU="1", HXCOMM_DEVICE="1") == "on: 8 chips of 16 GiB each True"


BEFORE_AUTOLOAD = """
import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'
import torch
{}
import hxcomm; hxcomm._autoload()
from hxcomm.device import registration
print(registration.state())
"""


def test_another_device_that_has_torchs_place_keeps_it() -> None:
    printed = python(BEFORE_AUTOLOAD.format("torch.utils.rename_privateuse1_backend('npu')"))
    assert printed == "off: torch has room for one such device, and npu has taken it"


@pytest.mark.parametrize("asked", [False, True])
def test_another_accelerator_stays_the_default_unless_hx_is_asked_for(asked: bool) -> None:
    pretend = "torch.accelerator.current_accelerator = lambda check_available=False: torch.device('cuda')"
    printed = python(BEFORE_AUTOLOAD.format(pretend), HXCOMM_DEVICE="1" if asked else "auto")
    expected = "off: this machine has an accelerator (cuda); HXCOMM_DEVICE=1 registers hx all the same"
    assert printed == ("on: 8 chips of 16 GiB each" if asked else expected)


def test_an_installed_plug_in_for_another_device_comes_first() -> None:
    pretend = (
        "import importlib.metadata as m\n"
        "m.entry_points = lambda group: m.EntryPoints([m.EntryPoint('npu', 'torch_npu:load', group)])"
    )
    assert python(BEFORE_AUTOLOAD.format(pretend)).startswith("off: another device for torch is installed (npu)")


def test_import_torch_makes_no_device() -> None:
    program = (
        "import torch\n"
        "x = torch.ones(3, requires_grad=True); (x * x).sum().backward()\n"
        "print(torch.hx.is_initialized(), sum(1 for line in open('/proc/self/maps') if 'memfd:hxcomm' in line))"
    )
    assert python(program) == "False 0"


def test_a_group_without_a_name_gives_cpu_collectives_as_without_hx() -> None:
    program = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)\n"
        "t = torch.ones(3); dist.all_reduce(t)\n"
        "print(dist.get_backend_config()); dist.destroy_process_group()"
    )
    assert python(program) == python(program, HXCOMM_DEVICE="0")


FIRST_TOUCHES = {
    "empty": "torch.empty(3, device='hx')",
    "copy": "torch.ones(3).to('hx')",
    "generator": "torch.Generator(device='hx').manual_seed(3)",
    "stream": "torch.Stream(device='hx')",
    "event": "torch.Event(device='hx').record()",
    "storage": "torch.UntypedStorage(10, device='hx')",
    "pinned": "torch.ones(3).pin_memory()",
    "statistics": "torch.accelerator.memory_stats()",
    "device index": "torch.accelerator.set_device_index(1)",
    "current stream": "torch.accelerator.current_stream()",
    "empty cache": "torch.accelerator.empty_cache()",
    "random state": "torch.hx.get_rng_state()",
    "default device": "torch.set_default_device('hx'); torch.nn.Linear(2, 2)",
    "data loader": "list(torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4, pin_memory=True))",
}


def test_whatever_touches_the_device_first_makes_it() -> None:
    # One process, forked for each: a fresh one would import torch each time.
    program = "\n".join(
        [
            "import os, sys, traceback, torch",
            f"for name, touch in {FIRST_TOUCHES!r}.items():",
            "    if (child := os.fork()) == 0:",
            "        try:",
            "            exec(touch)",
            "            x = torch.ones(3, device='hx', requires_grad=True); (x * x).sum().backward()",
            "            os._exit(0 if x.grad.tolist() == [2, 2, 2] else 1)",
            "        except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)",
            "    if os.waitpid(child, 0)[1] != 0: print(name)",
        ]
    )
    assert python(program) == ""


def test_a_backward_on_cpu_before_the_first_on_hx_spoils_nothing() -> None:
    program = (
        "import torch\n"
        "for device in ('cpu', 'hx', 'cpu', 'hx:3'):\n"
        "    x = torch.ones(3, device=device, requires_grad=True); (x * x).sum().backward(); print(x.grad.tolist())"
    )
    assert python(program).splitlines() == ["[2.0, 2.0, 2.0]"] * 4


def test_a_seed_set_before_the_device_is_made_counts() -> None:
    program = (
        "import torch\n"
        "torch.manual_seed(3); print(torch.hx.is_initialized(), torch.rand(3, device='hx').tolist())\n"
        "torch.manual_seed(3); print(torch.hx.is_initialized(), torch.rand(3).tolist())"
    )
    first, second = python(program).splitlines()
    assert (
        first.startswith("False ") and second.startswith("True ") and first.split(" ", 1)[1] == second.split(" ", 1)[1]
    )


@pytest.mark.parametrize("before", ["", "torch.ones(3, requires_grad=True).sum().backward()"])
def test_a_program_may_end_right_after_a_backward(before: str) -> None:
    # On one core the main thread gets to the end before autograd's: half of such programs ended with SIGABRT.
    program = (
        "import os, torch\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        f"{before}\n"
        "x = torch.ones(3, device='hx', requires_grad=True)\n"
        "(x * 2).sum().backward()\n"
        "print(x.grad.tolist())"
    )
    for _ in range(4):
        assert python(program) == "[2.0, 2.0, 2.0]"


FORKED = """
import os, torch
x = torch.ones(3, device='hx')
reader, writer = os.pipe()
if (child := os.fork()) == 0:
    try: {}
    except RuntimeError as error: os.write(writer, str(error).encode())
    del x
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
os.close(writer)
print(os.read(reader, 1000).decode(), x.tolist())
"""


@pytest.mark.parametrize(
    "touch",
    [
        "x + 1",
        "torch.empty(3, device='hx')",
        "print(x)",
        "x.cpu()",
        "torch.hx.synchronize()",
        "torch.accelerator.empty_cache()",
    ],
)
def test_a_forked_child_that_touches_hx_gets_an_error(touch: str) -> None:
    printed = python(FORKED.format(touch))
    assert "hx" in printed and "forked subprocess" in printed and "'spawn'" in printed
    assert printed.endswith("[1.0, 1.0, 1.0]")


def test_a_forked_data_loader_worker_that_touches_hx_gets_an_error() -> None:
    program = (
        "import torch\n"
        "x = torch.ones(4, device='hx')\n"
        "class Set(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return x[i] + 1\n"
        "try: list(torch.utils.data.DataLoader(Set(), num_workers=1))\n"
        "except RuntimeError as error: print(error)"
    )
    assert "forked subprocess" in python(program)


def test_the_fallback_gate_warns_or_raises() -> None:
    program = (
        "import torch, warnings\n"
        "x = torch.ones(3, device='hx')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    try: x.erf(); x.erf(); x + x\n"
        "    except NotImplementedError as error: print('raised', error)\n"
        "print(*(w.message for w in caught))"
    )
    assert python(program) == ""
    assert python(program, HXCOMM_FALLBACK="warn").startswith("aten::erf has no fast path on hx")
    assert python(program, HXCOMM_FALLBACK="raise").startswith("raised aten::erf has no fast path on hx")
