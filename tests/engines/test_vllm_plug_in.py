"""What hxcomm tells vLLM, and how its communicator communicates: with a stand-in for vLLM, so here without a model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hxcomm

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process with the stand-in: what a platform's module does, it does at its import."""
    preamble = "import sys; sys.path.insert(0, sys.argv[1]); import vllm_stand_in; platforms = vllm_stand_in.install();"
    return subprocess.run(
        [sys.executable, "-c", preamble + program, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def printed(program: str, **environment: str) -> str:
    done = run(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def error_of(program: str, **environment: str) -> str:
    done = run(program, **environment)
    assert done.returncode == 1, done.stdout
    return done.stderr.strip().splitlines()[-1]


ASK = "from hxcomm.engines import vllm; print(vllm.platform())"
CHOOSE = "from hxcomm.engines.vllm.platform import HxcommCpuPlatform as P; platforms.current_platform = P();"


def test_without_the_switch_vllm_keeps_its_own_platform() -> None:
    assert printed(ASK, HXCOMM_CPU="0") == "None"
    assert printed("from hxcomm.engines import vllm; vllm.check(); print('fine')", HXCOMM_CPU="0") == "fine"


def test_with_the_switch_vllm_is_told_our_platform() -> None:
    assert printed(ASK, HXCOMM_CPU="1") == "hxcomm.engines.vllm.platform.HxcommCpuPlatform"


def test_a_vllm_for_another_device_keeps_its_platform() -> None:
    assert printed(f"vllm_stand_in.install(cpu_build=False); {ASK}", HXCOMM_CPU="1") == "None"


def test_the_plug_in_imports_neither_torch_nor_vllm_before_it_is_asked() -> None:
    program = "del sys.modules['vllm']; import hxcomm.engines.vllm; print('vllm' in sys.modules)"
    assert printed(program, HXCOMM_CPU="1") == "False"


def test_the_platform_names_our_backend_and_communicator() -> None:
    shown = printed(f"{CHOOSE} print(P.dist_backend, P.get_device_communicator_cls())", HXCOMM_CPU="1")
    assert shown == "hxcomm hxcomm.engines.vllm.communicator.HxcommCommunicator"


@pytest.mark.parametrize(("avx512", "backend"), [(True, "inductor"), (False, "eager")])
def test_without_avx512_inductor_compiles_nothing(avx512: bool, backend: str) -> None:
    program = f"""
import torch; torch.cpu._is_avx512_supported = lambda: {avx512}
{CHOOSE}
config = vllm_stand_in.Config(); P.check_and_update_config(config)
print(P.simple_compile_backend, config.compilation_config.backend)"""
    assert printed(program, HXCOMM_CPU="1") == f"{backend} {backend}"


def test_compiled_models_are_cached_apart_from_those_of_other_platforms() -> None:
    program = (
        f"{CHOOSE} config = vllm_stand_in.Config(); P.check_and_update_config(config); print(config.additional_config)"
    )
    assert printed(program, HXCOMM_CPU="1") == f"{{'theirs': 1, 'hxcomm': '{hxcomm.__version__}'}}"


def test_a_wrong_switch_raises_where_vllm_hears_it() -> None:
    # `import torch` raises already, unless it loads no plug-ins.
    wrong = {"HXCOMM_CPU": "yes", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert printed(ASK, **wrong) == "hxcomm.engines.vllm.platform.HxcommCpuPlatform"
    assert "HXCOMM_CPU='yes': not 0 or 1" in error_of(CHOOSE, **wrong)


def test_a_backend_that_torch_does_not_know_raises_instead_of_becoming_gloo() -> None:
    error = error_of(CHOOSE, HXCOMM_CPU="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert error.startswith("ImportError: torch.distributed does not know the backend hxcomm")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in error


def test_vllm_on_a_cpu_platform_that_is_not_ours_raises() -> None:
    error = error_of("from hxcomm.engines import vllm; vllm.check()", HXCOMM_CPU="1")
    assert "vLLM chose the platform vllm.platforms.cpu.CpuPlatform" in error
    assert "VLLM_TARGET_DEVICE" in error
    assert printed(f"{CHOOSE} from hxcomm.engines import vllm; vllm.check(); print('fine')", HXCOMM_CPU="1") == "fine"


def communicator_of(name: str, **arguments: Any) -> Any:
    sys.path.insert(0, str(Path(__file__).parent))
    import vllm_stand_in

    vllm_stand_in.install()
    import torch.distributed as dist

    from hxcomm.engines.vllm.communicator import HxcommCommunicator

    return HxcommCommunicator(dist.group.WORLD, device_group=dist.group.WORLD, unique_name=name, **arguments)


def calls() -> dict[str, int]:
    import hxcomm

    counted: dict[str, int] = {}
    for row in hxcomm.statistics():
        counted[row["op"]] = counted.get(row["op"], 0) + row["calls"]
    return counted


def eager_calls(rank: int, world_size: int) -> None:
    import torch

    communicator = communicator_of("tp:0")
    mine = torch.arange(12.0).reshape(2, 6) + 100 * rank
    everyone = [torch.arange(12.0).reshape(2, 6) + 100 * peer for peer in range(world_size)]
    summed = mine.clone()
    assert communicator.all_reduce(summed) is summed
    assert torch.equal(summed, sum(everyone))
    strided = mine.t()
    assert torch.equal(communicator.all_reduce(strided), sum(each.t() for each in everyone))
    for dim in (0, 1, -1, -2):
        assert torch.equal(communicator.all_gather(mine, dim), torch.cat(everyone, dim))
        assert torch.equal(communicator.all_gather(strided, dim), torch.cat([each.t() for each in everyone], dim))
        gathered = communicator.gather(mine, dst=1, dim=dim)
        if rank == 1:
            assert torch.equal(gathered, torch.cat(everyone, dim))
        else:
            assert gathered is None
    assert calls() == {"all_reduce": 2, "all_gather": 8, "gather": 4}


def test_the_communicator_sums_and_gathers(run_ranks: Callable[..., Any]) -> None:
    run_ranks(eager_calls, 3)


def compiled_calls(rank: int, world_size: int, backend: str) -> None:
    import torch

    communicator = communicator_of("tp:0")

    def layer(x: Any) -> Any:
        once = communicator.all_reduce(x * 2)
        return communicator.all_gather(communicator.all_reduce(once + 1), 0)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch._inductor.config.patch(compile_threads=1):
        for value in (1.0, 5.0):
            x = torch.full((2, 8), value + rank)
            once = sum(2 * (value + peer) for peer in range(world_size))
            assert torch.equal(compiled(x), torch.full((2 * world_size, 8), world_size * (once + 1)))
            assert torch.equal(x, torch.full((2, 8), value + rank))
    assert calls() == {"all_reduce": 4, "all_gather": 2}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_calls_it_in_one_graph(run_ranks: Callable[..., Any], backend: str) -> None:
    run_ranks(compiled_calls, 2, backend, timeout_s=150)


def refused(rank: int, world_size: int) -> None:
    import torch.distributed as dist

    with pytest.raises(RuntimeError, match="vLLM's group 'tp:0' has the backend ProcessGroupGloo for CPU tensors"):
        communicator_of("tp:0")
    assert dist.get_backend() == "gloo"


def test_a_group_of_another_backend_is_refused(run_ranks: Callable[..., Any]) -> None:
    run_ranks(refused, 2, backend="gloo")


def all_to_all_refused(rank: int, world_size: int) -> None:
    with pytest.raises(NotImplementedError, match="expert parallelism over data-parallel ranks"):
        communicator_of("ep:0", use_all2all=True)


def test_what_vllm_cannot_do_on_cpu_is_refused_when_the_group_is_made(run_ranks: Callable[..., Any]) -> None:
    run_ranks(all_to_all_refused, 2)
