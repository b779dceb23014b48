"""The device hx, step by step. 6: training, with the gradients of CPU; mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 4))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_training_steps_give_the_weights_of_cpu(optimizer: type[torch.optim.Optimizer]) -> None:
    trained = []
    for device in ("cpu", "hx"):
        net = copy.deepcopy(model()).to(device)
        steps = optimizer(net.parameters(), lr=0.1)  # type: ignore[call-arg]
        torch.manual_seed(1)
        for _ in range(3):
            x, y = torch.randn(5, 8, device=device), torch.randint(4, (5,), device=device)
            steps.zero_grad()
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            steps.step()
        trained.append([p.detach().cpu() for p in net.parameters()])
    assert all(a.equal(b) for a, b in zip(*trained, strict=True))


def test_gradients_flow_between_the_devices() -> None:
    x = torch.ones(3, requires_grad=True)
    (x.hx() * 2).cpu().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_a_backward_pass_has_the_chip_of_its_tensors_for_the_current_one() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            seen.append((torch.hx.current_device(), torch.empty(1, device="hx").device.index))
            return gradient

    for chip in (2, 5):
        x = torch.ones(3, device=f"hx:{chip}", requires_grad=True)
        Look.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert seen == [(2, 2), (5, 5)]
    assert torch.hx.current_device() == 0


def test_autocast_casts_as_on_other_accelerators() -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    with torch.autocast("hx", dtype=torch.bfloat16):
        product = a.hx() @ b.hx()
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
        assert F.linear(a.hx(), b.hx()).dtype == torch.bfloat16
    assert product.cpu().equal(a.bfloat16() @ b.bfloat16())
    with torch.autocast("cpu"):
        assert (a.hx() @ b.hx()).dtype == torch.float32  # another device's autocast


def test_a_gradient_scaler_steps_and_skips_infinite_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, device="hx"))
    steps = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("hx", init_scale=4.0)

    def step(gradient: Tensor) -> list[float]:
        weight.grad = None
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(steps)
        scaler.update()
        return weight.tolist()

    assert step(torch.tensor([0.5, 0.5], device="hx")) == [0.5, 0.5]
    assert step(torch.tensor([float("inf"), 0.0], device="hx")) == [0.5, 0.5]
    assert scaler.get_scale() == 2.0


def test_checkpointed_layers_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(4, 8, device="hx", requires_grad=True)
    net = model().hx().eval()
    (plain,) = torch.autograd.grad(net(x).sum(), x)
    (saved,) = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).sum(), x)
    assert plain.equal(saved)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_as_on_cpu(kind: type[nn.RNNBase]) -> None:
    results = []
    for device in ("cpu", "hx"):
        torch.manual_seed(0)
        net = kind(6, 8, num_layers=2, bidirectional=True).to(device)
        x = torch.randn(5, 3, 6).to(device)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2]))
        loss = net(x)[0].square().sum() + net(packed)[0].data.sum()
        loss.backward()
        with torch.inference_mode():
            results.append([loss.detach().cpu(), net(x)[0].cpu(), *(p.grad.cpu() for p in net.parameters())])
    # torch has a fused kernel for CPU, which rounds otherwise.
    torch.testing.assert_close(results[0], results[1])
