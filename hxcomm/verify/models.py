"""Models whose training is exact, for checks that compare many ranks with one process bit by bit.

Weights and inputs are small integers in float64, steps are powers of two and the loss is linear in the output, so for
a few steps every sum fits in 53 bits and the order of addition cannot matter. Knows nothing of distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 24  # is divided by 2, 3 and 4 ranks; not by 5, which makes shards uneven
ROWS = 2  # of one rank's part of a batch
STEP = 2.0**-6


def integers(seed: int, *shape: int) -> Tensor:
    """-1, 0 and 1. The same for the same seed, wherever it is called."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(torch.float64)


def exact(model: nn.Module, device: torch.device, seed: int = 0) -> Any:
    """The module, its parameters filled with exact values. As Any, for torch's types make every attribute a riddle."""
    model.to(device=device, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(integers(1000 * seed + number, *parameter.shape))
    return model


class Perceptron(nn.Module):
    """Two layers, as in a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(rows)))
        return out


class Attention(nn.Module):
    """Attention over rows, without the softmax, which would not be exact. Each head knows WIDTH / heads columns."""

    def __init__(self, heads: int = 12) -> None:
        super().__init__()
        self.head_size = WIDTH // heads
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        # Of whatever heads are here: parallelize_module leaves a rank some of them.
        query, key, value = (
            layer(rows).unflatten(-1, (-1, self.head_size)).transpose(0, 1)
            for layer in (self.query, self.key, self.value)
        )
        mixed = (query @ key.transpose(1, 2)) @ value
        out: Tensor = self.out(mixed.transpose(0, 1).flatten(1))
        return out


class Sum(nn.Module):
    """Parts side by side: more parameters, and yet no product of more than two of them, which would not stay exact."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.stack([part(rows) for part in self.parts]).sum(0)


def backward(output: Any, factors: Any) -> None:
    """Adds the gradients of the loss, which is linear in the output."""
    (output * factors).sum().backward()


def rows_of(step: int, rank: int, device: torch.device, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """A rank's part of the batch of a step: inputs, and the factors that the loss gives each output."""
    seed = 10_000 + 100 * step + 2 * rank
    return integers(seed, rows, WIDTH).to(device), integers(seed + 1, rows, WIDTH).to(device)
