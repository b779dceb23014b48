"""The device hx, step by step. 9: a small Llama decodes on a chip, token by token, as on CPU, without a copy."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, KV_HEADS, LAYERS, LONGEST = 256, 64, 4, 2, 4, 48
HEAD = WIDTH // HEADS


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Tensor, position: int) -> Tensor:
        tokens = x.shape[0]
        qkv = self.qkv(self.norms[0](x)).view(tokens, -1, HEAD).transpose(0, 1)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS))
        cache[0, :, position : position + tokens] = rotate(k, rotation)
        cache[1, :, position : position + tokens] = v
        k, v = cache[:, :, : position + tokens]
        attention = F.scaled_dot_product_attention(
            rotate(q, rotation)[None], k[None], v[None], is_causal=tokens > 1, enable_gqa=True
        )
        x = x + self.out(attention[0].transpose(0, 1).reshape(tokens, WIDTH))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rotation
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the logits that they were chosen by."""
        like = self.embedding.weight
        frequencies = 10_000.0 ** -(torch.arange(0, HEAD, 2, device=like.device) / HEAD)
        angles = torch.outer(torch.arange(LONGEST, device=like.device).float(), frequencies)
        cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        caches = [like.new_zeros(2, KV_HEADS, LONGEST, HEAD) for _ in self.layers]
        tokens = torch.tensor(prompt, device=like.device)
        logits, position = [], 0
        for _ in range(count):
            x, end = self.embedding(tokens), position + len(tokens)
            for layer, cache in zip(self.layers, caches, strict=True):
                x = layer(x, (cos[position:end], sin[position:end]), cache, position)
            logits.append(self.head(self.norm(x[-1:])))
            tokens, position = logits[-1].argmax(-1), end
        return [int(each.argmax()) for each in logits], torch.cat(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_gives_the_logits_of_cpu_without_a_copy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Llama().to(dtype)
    copies = torch.hx.output_copies()
    expected_tokens, expected = model.generate([1, 2, 3, 5, 8], 20)
    tokens, logits = copy.deepcopy(model).hx().generate([1, 2, 3, 5, 8], 20)
    assert tokens == expected_tokens
    assert logits.cpu().equal(expected)
    assert torch.hx.output_copies() == copies


def test_a_decode_step_runs_by_fast_paths_alone_and_its_memory_does_not_grow() -> None:
    torch.manual_seed(0)
    model = Llama().hx()
    model.generate([1, 2, 3], 2)
    boxed = {name: count["boxed"] for name, count in torch.hx.op_counts().items()}
    allocated = []
    for count in (5, 10, 15):
        model.generate([1, 2, 3], count)
        allocated.append(torch.hx.memory_allocated())
    assert all(a == b for a, b in itertools.pairwise(allocated))
    # What is left is done once for each call: the table of rotations. There were 30 tokens.
    more = {name: count["boxed"] - boxed.get(name, 0) for name, count in torch.hx.op_counts().items()}
    assert {name for name, times in more.items() if times >= 30} == set()
