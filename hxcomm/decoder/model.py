"""A Llama-family decoder, split over the ranks of a tensor-parallel group (Megatron-LM, arXiv:1909.08053, section 3).

Every rank runs this same code on its own shard (shards.py) and holds the whole residual stream `x`. Query/key/value and
gate/up projections are split by output column, attention output and down projections by input row, so each of the two
blocks of a layer ends in a partial sum: two all_reduces a layer, and one for the vocabulary-parallel embedding.

Knows nothing of files, tokens' text or backends; a `Communication` is its only way to other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hxcomm.decoder.shards import Config, Shard


class Communication(Protocol):
    """What the decoder asks of its peers (examples/tp_decode/communication.py, for one)."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place; returns x."""
        ...

    def linear_all_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum over all ranks of x @ weight.T, each rank having some of the inputs: in one piece or overlapped."""
        ...


@dataclass(frozen=True)
class Layer:
    """One layer's weights of one rank, each [out, in] as F.linear reads them.

    Projections of the same input are fused (one pass over the input and one kernel launch instead of three or two).
    """

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden], this rank's query, then key, then value heads
    output: Tensor  # [hidden, heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * columns, hidden], this rank's gate columns, then its up columns
    down: Tensor  # [hidden, columns]


@dataclass(frozen=True)
class Weights:
    """All weights of one rank. `head` is the same tensor as `embedding` in models that tie them."""

    embedding: Tensor  # [vocabulary rows of this rank, hidden]
    layers: list[Layer]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocabulary rows of this rank, hidden]


class Decoder:
    """The forward pass of one rank, with a KV cache preallocated for `max_length` positions of each sequence.

    `batch` sequences of equal length are decoded together. `mark` is told what begins: "embedding", "layer 0" ... or
    "head".
    """

    def __init__(
        self,
        config: Config,
        shard: Shard,
        weights: Weights,
        communication: Communication,
        max_length: int,
        *,
        batch: int = 1,
        mark: Callable[[str], object] = lambda part: None,
    ) -> None:
        self.config = config
        self.shard = shard
        self.weights = weights
        self.communication = communication
        like = weights.norm
        self.batch = batch
        self.mark = mark
        shape = (config.layers, batch, len(shard.kv_heads), max_length, config.head_dim)
        self.keys, self.values = like.new_empty(shape).unbind(), like.new_empty(shape).unbind()
        cos, sin = rope_tables(config, max_length)
        self.cos, self.sin = cos.to(like), sin.to(like)
        self.root_eps = torch.tensor(config.rms_eps**0.5, device=like.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, position: int) -> Tensor:
        """Logits of the token after `tokens` [T], which stand at `position` and up in the sequence.

        Several sequences are [batch, T]. Returns [rows of this rank] ([batch, rows]) in the weights' dtype: the part of
        the vocabulary this rank owns. Writes the KV cache at `position : position + T`. Blocks in collectives: every
        rank must call it with the same tokens.
        Bytes all-reduced per rank: (2 * layers + 1) * batch * T * hidden * itemsize.
        """
        count = tokens.shape[-1]
        end = position + count
        self.mark("embedding")
        x = self.embed(tokens)
        rope = self.cos[position:end], self.sin[position:end]
        mask = None  # one new token sees everything that is in the cache
        if count > 1:
            mask = torch.ones(count, end, dtype=torch.bool, device=x.device).tril(diagonal=position)
            mask = mask.repeat_interleave(self.shard.group, dim=0)
        for number, (layer, keys, values) in enumerate(zip(self.weights.layers, self.keys, self.values, strict=True)):
            self.mark(f"layer {number}")
            cache = keys[:, :, :end], values[:, :, :end]
            x += self.attention(layer, cache, self.norm(x, layer.attention_norm), rope, mask)
            x += self.mlp(layer, self.norm(x, layer.mlp_norm))
        self.mark("head")
        return F.linear(self.norm(x[..., -1, :], self.weights.norm), self.weights.head)

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., T] -> [..., T, hidden]. Each rank looks up the tokens whose rows it owns; others contribute zeros."""
        rows = self.shard.rows
        elsewhere = (tokens < rows.start) | (tokens >= rows.stop)
        x = F.embedding((tokens - rows.start).masked_fill_(elsewhere, 0), self.weights.embedding)
        return self.communication.all_reduce(x.masked_fill_(elsewhere.unsqueeze(-1), 0))

    def attention(
        self, layer: Layer, cache: tuple[Tensor, Tensor], x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Grouped-query attention over this rank's heads, then the sum over ranks: [..., T, hidden] -> the same.

        `cache`: keys and values [batch, kv_heads, position + T, head_dim], whose last T positions are written here.
        """
        keys, values = cache
        batch, count, head_dim = self.batch, x.shape[-2], self.config.head_dim
        heads, kv_heads, group = len(self.shard.heads), len(self.shard.kv_heads), self.shard.group
        qkv = F.linear(x, layer.qkv).view(batch, count, heads + 2 * kv_heads, head_dim)
        qk = rotate(qkv[:, :, : heads + kv_heads], *rope)
        keys[:, :, -count:] = qk[:, :, heads:].transpose(1, 2)
        values[:, :, -count:] = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        # The query heads of a group become further queries of its one KV head: K and V are read once, never repeated.
        q = qk[:, :, :heads].view(batch, count, kv_heads, group, head_dim).transpose(1, 2)
        q = q.reshape(batch, kv_heads, count * group, head_dim)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        y = y.view(batch, kv_heads, count, group * head_dim).transpose(1, 2).reshape(*x.shape[:-1], heads * head_dim)
        return self.communication.linear_all_reduce(y, layer.output)

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """SwiGLU (arXiv:2002.05202) over this rank's columns, then the sum over ranks."""
        gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
        return self.communication.linear_all_reduce(F.silu(gate).mul_(up), layer.down)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight, the mean in float32.

        Spelled with norm and hypot because torch's CPU kernel of F.rms_norm takes twice as long for one token (14 us
        against 8 at 576 wide), which 61 of them make 3 % of a decode step of SmolLM2-135M on two ranks.
        """
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(norm * self.config.hidden**-0.5, self.root_eps)).to(x.dtype) * weight


def rope_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary embeddings (arXiv:2104.09864), each [length, 1, head_dim] float32.

    The first half of every sin row is negated, so that `rotate` needs no negation of its own.
    """
    inverse = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).float().unsqueeze(1), torch.cat((-sin, sin), -1).float().unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [..., T, heads, head_dim]: Hugging Face's order of the pairs."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
