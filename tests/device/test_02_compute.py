"""The device hx, step by step. 2: operations give the bits of CPU, and their results are not copied."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[..., Tensor]


def both(op: Op, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """The result on hx, and on CPU."""
    return op(*(x.hx() for x in arguments)), op(*arguments)


OPS: dict[str, Op] = {
    "add": lambda a, b: a + b,
    "scalar": lambda a, b: 2 * a - b / 3,
    "matmul": lambda a, b: a @ b.t(),
    "softmax": lambda a, b: a.softmax(-1),
    "layer norm": lambda a, b: F.layer_norm(a, a.shape[1:]),
    "rms norm": lambda a, b: F.rms_norm(a, a.shape[1:], b[0]),
    "attention": lambda a, b: F.scaled_dot_product_attention(*(3 * [a.view(1, 4, 4, 16)]), is_causal=True),
    "convolution": lambda a, b: F.conv2d(a.view(1, 1, 16, 16), b[:1, :9].view(1, 1, 3, 3)),
    "sort": lambda a, b: a.sort(dim=1).values,
    "index": lambda a, b: a[torch.tensor([1, 3], device=a.device)],
    "boolean index": lambda a, b: a[a > 0],
    "cat": lambda a, b: torch.cat((a, b)),
    "where": lambda a, b: torch.where(a > b, a, b),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "complex": lambda a, b: torch.complex(a, b).conj().abs(),
    "cast": lambda a, b: a.bfloat16().float(),
    "cumsum": lambda a, b: a.cumsum(1),
    "svd": lambda a, b: torch.linalg.svdvals(a),
}


@pytest.mark.parametrize("name", OPS)
def test_an_operation_gives_the_bits_of_cpu_without_a_copy(name: str) -> None:
    torch.manual_seed(1)
    copies = torch.hx.output_copies()
    ours, theirs = both(OPS[name], torch.randn(16, 16), torch.randn(16, 16))
    assert ours.device.type == "hx"
    assert ours.cpu().equal(theirs)
    assert ours.stride() == theirs.stride()
    assert torch.hx.output_copies() == copies


def test_in_place_operations_and_out_arguments_write_where_they_should() -> None:
    x = torch.ones(4, device="hx")
    address = x.data_ptr()
    x.add_(1).mul_(3)
    x[1:3] = 0
    assert x.tolist() == [6, 0, 0, 6]
    assert x.data_ptr() == address
    out = torch.empty(4, device="hx")
    assert torch.add(x, x, out=out) is out
    assert out.tolist() == [12, 0, 0, 12]
    grown = torch.empty(0, device="hx")
    torch.cat((x, x), out=grown)
    assert grown.tolist() == 2 * x.tolist()
    assert torch.hx.segment_offset(grown) is not None
    assert x.resize_(6).shape == (6,)


def test_an_operation_takes_no_tensor_of_another_device() -> None:
    x = torch.ones(3, device="hx")
    for other, name in ((torch.ones(3), "cpu"), (torch.ones(3, device="hx:1"), "hx:1")):
        with pytest.raises(RuntimeError, match=f"same device, but found at least two devices, hx:0 and {name}"):
            x + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat((x, other))
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3) + x
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a number on CPU, as on CUDA
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]  # indices on CPU, as on CUDA
    x[torch.tensor([0])] = 5.0
    assert x.tolist() == [5, 1, 1]
    with pytest.raises(RuntimeError, match="same device"):
        x[torch.tensor([0, 2])] = torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3)[torch.tensor([0, 2], device="hx")]


def test_what_is_not_supported_says_which_operation_and_dtype() -> None:
    with pytest.raises(NotImplementedError, match=r"aten::.*cholesky.* hx does not support Half"):
        torch.linalg.cholesky_ex(torch.eye(2, dtype=torch.float16, device="hx"))
    with pytest.raises(NotImplementedError, match="Sparse"):
        torch.ones(2, 2, device="hx").to_sparse()
    with pytest.raises(NotImplementedError, match="qint8"):
        torch.quantize_per_tensor(torch.ones(2, device="hx"), 0.1, 0, torch.qint8)


def test_counters_say_how_an_operation_ran() -> None:
    def counts(name: str) -> tuple[int, int]:
        count = torch.hx.op_counts().get(name, {"fast": 0, "boxed": 0})
        return count["fast"], count["boxed"]

    x = torch.ones(3, device="hx")
    mul, erf = counts("aten::mul.Tensor"), counts("aten::erf")
    x * x
    x.erf()
    assert counts("aten::mul.Tensor") == (mul[0] + 1, mul[1])
    assert counts("aten::erf") == (erf[0], erf[1] + 1)


def test_mixed_products_that_only_accelerators_have_run_too() -> None:
    a = torch.randn(4, 4).bfloat16()
    assert torch.mm(a.hx(), a.hx(), out_dtype=torch.float32).cpu().equal(a.float() @ a.float())


def test_threads_compute_on_different_chips_at_once() -> None:
    wrong: list[str] = []

    def work(chip: int) -> None:
        torch.hx.set_device(chip)
        for step in range(200):
            x = torch.full((1 + step % 50,), float(chip), device="hx")
            y = (x * 2 + 1).cumsum(0)
            if y.device.index != chip or y[-1].item() != len(x) * (2 * chip + 1):
                wrong.append(f"{y} on {y.device} by the thread of chip {chip}")

    threads = [threading.Thread(target=work, args=(chip,)) for chip in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert torch.hx.current_device() == 0


def test_an_operator_of_ones_own_with_a_kernel_for_cpu_runs_on_hx_too() -> None:
    library = torch.library.Library("hxcomm_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    x = torch.ones(3, device="hx")
    with pytest.raises(NotImplementedError, match="hxcomm_test::twice is not supported on hx"):
        torch.ops.hxcomm_test.twice(x)
    library.impl("twice", lambda x: x * 2, "CPU")
    assert torch.ops.hxcomm_test.twice(x).tolist() == [2, 2, 2]
    assert torch.ops.hxcomm_test.twice(x).device == x.device
