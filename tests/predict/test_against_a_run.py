"""A decode step predicted on meta tensors takes as long as the same step does that is run on simulated chips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from predict.small_models import DECODER
from torch import Tensor

from hxcomm.decoder.model import Decoder, Layer, Weights
from hxcomm.decoder.shards import split
from hxcomm.predict.decoder_model import DecoderModel, weights_without_memory
from hxcomm.predict.prediction import Predictor
from hxcomm.predict.recording import Peers, Recorder
from hxcomm.predict.steps import Pass
from hxcomm.predict.timing import Parts, time_pass
from hxcomm.sim import chips
from hxcomm.sim.costs import CostModel
from hxcomm.sim.interconnect import interconnect

Run = Callable[..., list[Any]]

CHIP = """
name = "run and predicted"
overlap_chunks = 4
[memory]
bandwidth_bytes_per_s = 1e11
capacity_bytes = 1e9
[compute]
fixed_ns_per_op = 20
[compute.flops_per_s]
float16 = 1e12
[[links]]
topology = "ring"
bandwidth_bytes_per_s = 1e9
latency_ns = 300
forwarding = "cut_through"
"""
CONTEXT = 200


class OverHxcomm:
    """The decoder's Communication, of torch.distributed."""

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def linear_all_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.all_reduce(F.linear(x, weight))


def on_hx(weights: Weights) -> Weights:
    """Of the same shapes, with memory. Not filled: ranks with more to fill would begin the step later."""

    def empty(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device="hx")

    layers = [Layer(**{name: empty(each) for name, each in vars(layer).items()}) for layer in weights.layers]
    return Weights(empty(weights.embedding), layers, empty(weights.norm), empty(weights.head))


def step_on_chips(rank: int, world_size: int) -> Parts:
    """This rank's parts of one decode step, by its virtual clock."""
    from hxcomm import virtual

    torch.hx.set_device(rank)
    shard = split(DECODER, world_size)[rank]
    weights = on_hx(weights_without_memory(DECODER, shard))
    model = Decoder(DECODER, shard, weights, OverHxcomm(), CONTEXT)
    token = torch.zeros(1, dtype=torch.int64, device="hx")
    dist.barrier()
    before = virtual.report()
    model.forward(token, CONTEXT - 1)
    parts = (virtual.report() - before).parts
    return Parts(parts.weights, parts.kv_cache, parts.other, parts.exposed, parts.hidden)


def step_predicted(world_size: int, chip: chips.Chip) -> Parts:
    streams = []
    for shard in split(DECODER, world_size):
        weights, peers = weights_without_memory(DECODER, shard), Peers(world_size)
        model = Decoder(DECODER, shard, weights, peers, CONTEXT)
        recorder = peers.recorder = Recorder([], [], "fp16")
        with recorder:
            model.forward(torch.empty(1, dtype=torch.int64, device="meta"), CONTEXT - 1)
        streams.append(recorder.stream())
    costs = CostModel(chip)
    predictor = Predictor(DecoderModel("small", DECODER), chip, costs, context=CONTEXT, prompt=1, weights="fp16")
    timer = predictor._timer(interconnect(chip, world_size))
    return time_pass(Pass(tuple(streams), range(world_size)), costs, timer, chunks=1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_decode_step_takes_on_simulated_chips_what_was_predicted(run_ranks: Run, tmp_path: Path, ranks: int) -> None:
    path = tmp_path / "chip.toml"
    path.write_text(CHIP)
    found = run_ranks(step_on_chips, ranks, env={"HXCOMM_SIM": str(path)})
    last = max(found, key=lambda parts: parts.total)
    assert last == step_predicted(ranks, chips.load(path))
