"""The decoder on meta tensors: what is recorded are the closed forms of a Llama's bytes, products and collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from predict.small_models import DECODER, decoder

from hxcomm.decoder.shards import Config, SplitError, parameters_read, split
from hxcomm.predict.decoder_model import DecoderModel
from hxcomm.predict.presets import DECODERS
from hxcomm.predict.steps import Collective, LinearAllReduce, Pass, Step
from hxcomm.sim.costs import OpRecord


def recorded(
    ranks: int = 1, *, batch: int = 1, context: int = 512, prompt: int = 64, stored: str = "fp16"
) -> list[Pass]:
    return list(decoder().record(ranks, batch=batch, context=context, prompt=prompt, stored=stored))


def ops(steps: Iterable[Step], kind: str) -> list[OpRecord]:
    """Of that kind; a product that is to be summed over ranks in one piece."""
    whole = [step.product(step.columns) if isinstance(step, LinearAllReduce) else step for step in steps]
    return [step for step in whole if isinstance(step, OpRecord) and step.kind == kind]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_decode_step_multiplies_each_weight_of_a_rank_once_for_each_sequence(ranks: int, batch: int) -> None:
    _, decode = recorded(ranks, batch=batch)
    for rank, shard in enumerate(split(DECODER, ranks)):
        steps = decode.streams[decode.stream_of_rank[rank]].steps
        assert sum(op.flops for op in ops(steps, "weights")) == 2 * batch * parameters_read(DECODER, shard)


def test_a_prompt_multiplies_each_weight_once_for_each_token_but_the_head_once() -> None:
    prefill, _ = recorded(prompt=64)
    (shard,) = split(DECODER, 1)
    head = DECODER.hidden * DECODER.vocabulary
    flops = sum(op.flops for op in ops(prefill.streams[0].steps, "weights"))
    assert flops == 2 * (64 * (parameters_read(DECODER, shard) - head) + head)


def test_the_bytes_of_products_are_their_matrices_and_what_goes_in_and_out() -> None:
    _, decode = recorded()
    hidden, width, columns = DECODER.hidden, DECODER.heads * DECODER.head_dim, DECODER.intermediate
    qkv = (DECODER.heads + 2 * DECODER.kv_heads) * DECODER.head_dim
    of_layer = [(hidden, qkv), (width, hidden), (hidden, 2 * columns), (columns, hidden)]
    shapes = of_layer * DECODER.layers + [(hidden, DECODER.vocabulary)]
    products = [op for op in ops(decode.streams[0].steps, "weights") if op.flops]
    assert [op.nbytes for op in products] == [2 * (inputs * out + inputs + out) for inputs, out in shapes]


def test_attention_reads_and_grows_with_context_and_batch() -> None:
    def nbytes(context: int, batch: int) -> int:
        _, decode = recorded(context=context, batch=batch)
        return sum(op.nbytes for op in ops(decode.streams[0].steps, "kv_cache"))

    position = 2 * 2 * DECODER.layers * DECODER.kv_heads * DECODER.head_dim  # keys and values, 2 bytes each
    assert nbytes(2000, 1) - nbytes(1000, 1) == 1000 * position
    assert nbytes(1000, 7) == 7 * nbytes(1000, 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_pass_has_two_sums_for_each_layer_one_for_the_embedding_and_the_choice(ranks: int, batch: int) -> None:
    for passed, tokens in zip(recorded(ranks, batch=batch, prompt=64), (64, 1), strict=True):
        nbytes = batch * tokens * DECODER.hidden * 2
        for stream in passed.streams:
            calls = Counter(
                step.sum(step.columns) if isinstance(step, LinearAllReduce) else step
                for step in stream.steps
                if not isinstance(step, OpRecord)
            )
            assert calls == {
                Collective("all_reduce", nbytes, 2): 2 * DECODER.layers + 1,
                Collective("all_gather", batch * 16, 8): 1,  # a logit and a token as float64, as the example sends
            }


def test_one_rank_has_no_collective() -> None:
    for passed in recorded(1):
        assert all(isinstance(step, OpRecord) for step in passed.streams[0].steps)


def test_the_memory_of_a_rank_is_its_weights_and_its_cache() -> None:
    _, decode = recorded(context=512, batch=3)
    parameters = parameters_read(DECODER, split(DECODER, 1)[0]) + DECODER.vocabulary * DECODER.hidden  # the embedding
    norms = (2 * DECODER.layers + 1) * DECODER.hidden
    memory = decode.streams[0].memory
    assert memory.weights == 2 * (parameters + norms)
    assert memory.kv_cache == 3 * 512 * 2 * 2 * DECODER.layers * DECODER.kv_heads * DECODER.head_dim


@pytest.mark.parametrize(("stored", "divisor", "dtype"), [("fp8", 2, "float8"), ("int4", 4, "int4")])
def test_narrower_weights_are_fewer_bytes_and_change_nothing_else(stored: str, divisor: int, dtype: str) -> None:
    for ranks in (1, 2):
        (_, wide), (_, narrow) = recorded(ranks), recorded(ranks, stored=stored)
        matrices = parameters_read(DECODER, split(DECODER, ranks)[0])
        saved = 2 * matrices - 2 * matrices // divisor
        for before, after in zip(wide.streams, narrow.streams, strict=True):
            products = [op for op in ops(after.steps, "weights") if op.flops]
            assert {op.dtype for op in products} == {dtype}
            difference = sum(op.nbytes for op in ops(before.steps, "weights")) - sum(
                op.nbytes for op in ops(after.steps, "weights")
            )
            assert difference == saved == before.memory.weights - after.memory.weights
            assert ops(before.steps, "other") == ops(after.steps, "other")
            assert ops(before.steps, "kv_cache") == ops(after.steps, "kv_cache")


def test_ranks_with_equal_shards_share_a_recording_and_unequal_ones_do_not() -> None:
    uneven = DecoderModel("smollm2-135m", DECODERS["smollm2-135m"])  # 9 heads on 2 ranks
    _, decode = uneven.record(2, batch=1, context=64, prompt=8, stored="fp16")
    assert decode.stream_of_rank == [0, 1]
    _, even = recorded(2)
    assert even.stream_of_rank == [0, 0]


def test_more_ranks_than_heads_are_refused_with_how_many_there_may_be() -> None:
    assert decoder().world_sizes() == [1, 2, 3, 4]
    with pytest.raises(SplitError, match="use at most 4 ranks"):
        recorded(5)


# Parameters as published: 135M, 6.74 and 69.0 billion (arXiv:2307.09288, table 2, of 7B and 70B), 8.03 and 70.6.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_a_preset_has_as_many_parameters_as_the_published_model(name: str, parameters: int) -> None:
    config: Config = DECODERS[name]
    _, decode = DecoderModel(name, config).record(1, batch=1, context=2, prompt=1, stored="fp16")
    assert decode.memory.weights == 2 * parameters


def test_recording_leaves_gradients_of_the_program_as_they_were() -> None:
    assert torch.is_grad_enabled()
    recorded(2)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
