"""hxcomm's own decoder (hxcomm/decoder/), recorded on meta tensors: what examples/tp_decode runs, split as there."""

from __future__ import annotations

import torch
from torch import Tensor

from hxcomm.decoder.model import Decoder, Layer, Weights
from hxcomm.decoder.shards import Config, Shard, split
from hxcomm.predict.recording import DTYPE, Peers, Recorder
from hxcomm.predict.steps import Pass, Stream


class DecoderModel:
    """One shape of the decoder. Any number of ranks up to its query heads: shards need not be equal."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self.config = config
        self.positions: int | None = config.context

    def world_sizes(self) -> list[int]:
        return list(range(1, self.config.heads + 1))

    def record(self, world_size: int, *, batch: int, context: int, prompt: int, stored: str) -> tuple[Pass, Pass]:
        """(prefill of the prompt, one decode step whose token is the last of the context)."""
        kinds: dict[tuple[int, ...], tuple[Stream, Stream]] = {}
        of_rank = []
        for shard in split(self.config, world_size):
            kind = tuple(map(len, (shard.heads, shard.kv_heads, shard.columns, shard.rows)))
            if kind not in kinds:
                kinds[kind] = self._streams(shard, world_size, batch, context, prompt, stored)
            of_rank.append(list(kinds).index(kind))
        prefills, decodes = zip(*kinds.values(), strict=True)
        return Pass(prefills, of_rank), Pass(decodes, of_rank)

    def _streams(
        self, shard: Shard, world_size: int, batch: int, context: int, prompt: int, stored: str
    ) -> tuple[Stream, Stream]:
        weights = weights_without_memory(self.config, shard)
        peers = Peers(world_size)
        model = Decoder(self.config, shard, weights, peers, context, batch=batch)
        streams = []
        for count, position in ((prompt, 0), (1, context - 1)):
            recorder = Recorder(_tensors(weights), [model.keys[0], model.values[0]], stored)
            peers.recorder = recorder
            with recorder:
                tokens = torch.empty(batch, count, dtype=torch.int64, device="meta")
                _choose(model.forward(tokens, position), peers)
            streams.append(recorder.stream())
        return streams[0], streams[1]


def weights_without_memory(config: Config, shard: Shard) -> Weights:
    """A rank's weights as examples/tp_decode/weights.py loads them, on meta."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE, device="meta")

    hidden, head_dim = config.hidden, config.head_dim
    heads, kv_heads, columns, rows = map(len, (shard.heads, shard.kv_heads, shard.columns, shard.rows))
    layers = [
        Layer(
            attention_norm=empty(hidden),
            qkv=empty((heads + 2 * kv_heads) * head_dim, hidden),
            output=empty(hidden, heads * head_dim),
            mlp_norm=empty(hidden),
            gate_up=empty(2 * columns, hidden),
            down=empty(hidden, columns),
        )
        for _ in range(config.layers)
    ]
    embedding = empty(rows, hidden)
    return Weights(embedding, layers, empty(hidden), embedding if config.tied else empty(rows, hidden))


def _tensors(weights: Weights) -> list[Tensor]:
    layers = [tensor for layer in weights.layers for tensor in vars(layer).values()]
    return [weights.embedding, *layers, weights.norm, weights.head]


def _choose(logits: Tensor, peers: Peers) -> None:
    """The greedy choice of examples/tp_decode/sampling.py: each rank sends its best logit and token as float64."""
    values, rows = logits.max(dim=-1)
    best = torch.stack((values.double(), rows.double()), dim=-1)
    peers.all_gather(best)[..., 0].argmax(dim=0)
