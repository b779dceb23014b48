"""Models of transformers by their config: recorded as hxcomm's own decoder is, split by rules that are data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from predict.small_models import DECODER, OPT

from hxcomm.decoder.shards import SplitError, parameters_read, split
from hxcomm.predict.presets import CONFIGS
from hxcomm.predict.recording import Peers
from hxcomm.predict.splitting import rules
from hxcomm.predict.steps import Collective, LinearAllReduce, ModelError, Pass, Step
from hxcomm.predict.tensor_parallel_plans import DIVIDED, PLANS
from hxcomm.predict.transformers_model import TransformersModel, config_of, load_config
from hxcomm.sim.costs import OpRecord

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": DECODER.layers,
    "hidden_size": DECODER.hidden,
    "num_attention_heads": DECODER.heads,
    "num_key_value_heads": DECODER.kv_heads,
    "head_dim": DECODER.head_dim,
    "intermediate_size": DECODER.intermediate,
    "vocab_size": DECODER.vocabulary,
    "max_position_embeddings": DECODER.context,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_embd": 96, "n_head": 4, "vocab_size": 1000, "n_positions": 4096}
NEOX = {
    "model_type": "gpt_neox",
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "vocab_size": 1000,
}


def model(values: dict[str, Any]) -> TransformersModel:
    return TransformersModel(values["model_type"], config_of(values))


def decode_step(values: dict[str, Any], ranks: int = 1, *, batch: int = 1, context: int = 512) -> Pass:
    return model(values).record(ranks, batch=batch, context=context, prompt=16, stored="fp16")[1]


def flops(steps: tuple[Step, ...]) -> int:
    whole = [step.product(step.columns) if isinstance(step, LinearAllReduce) else step for step in steps]
    return sum(step.flops for step in whole if isinstance(step, OpRecord) and step.kind == "weights")


def cache_bytes(passed: Pass) -> int:
    steps = passed.streams[0].steps
    return sum(step.nbytes for step in steps if isinstance(step, OpRecord) and step.kind == "kv_cache")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_llama_of_transformers_multiplies_what_the_decoder_of_its_shape_does(ranks: int) -> None:
    steps = decode_step(LLAMA, ranks).streams[0].steps
    assert flops(steps) == 2 * parameters_read(DECODER, split(DECODER, ranks)[0])


@pytest.mark.parametrize("values", [OPT, LLAMA, GPT2, NEOX], ids=lambda values: values["model_type"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_split_model_has_two_sums_for_each_layer_one_for_the_embedding_and_gathers_logits(
    values: dict[str, Any], batch: int
) -> None:
    steps = decode_step(values, 2, batch=batch).streams[0].steps
    calls = Counter(
        step.sum(step.columns) if isinstance(step, LinearAllReduce) else step
        for step in steps
        if not isinstance(step, OpRecord)
    )
    assert calls == {
        Collective("all_reduce", batch * 96 * 2, 2): 2 * 3 + 1,
        Collective("all_gather", batch * 500 * 2, 2): 1,
    }


@pytest.mark.parametrize("values", [OPT, LLAMA, GPT2, NEOX], ids=lambda values: values["model_type"])
def test_two_ranks_share_the_products_and_the_cache_evenly(values: dict[str, Any]) -> None:
    one, two = decode_step(values), decode_step(values, 2)
    assert flops(one.streams[0].steps) == 2 * flops(two.streams[0].steps)
    assert one.memory.kv_cache == 2 * two.memory.kv_cache


@pytest.mark.parametrize("values", [OPT, LLAMA, GPT2, NEOX], ids=lambda values: values["model_type"])
def test_the_cache_is_read_once_and_written_in_place(values: dict[str, Any]) -> None:
    kv_heads = values.get("num_key_value_heads", 4)
    position = 2 * 2 * 3 * kv_heads * 24
    assert cache_bytes(decode_step(values, context=2000)) - cache_bytes(decode_step(values, context=1000)) == (
        1000 * position
    )
    # No op but attention touches more than the new position: a cache that grew by copying would.
    others = [
        step.nbytes
        for step in decode_step(values, context=2000).streams[0].steps
        if isinstance(step, OpRecord) and step.kind == "other"
    ]
    assert max(others) < 2000 * position // 3
    assert decode_step(values, context=2000, batch=3).memory.kv_cache == 3 * 2000 * position


def test_the_number_of_ranks_must_divide_heads_and_matrices() -> None:
    assert model(OPT).world_sizes() == [1, 2, 4]
    assert model(LLAMA).world_sizes() == [1, 2]  # 2 KV heads
    assert model({**OPT, "num_attention_heads": 6}).world_sizes() == [1, 2, 3, 6]


def test_a_model_without_a_plan_is_for_one_rank() -> None:
    bloom = {"model_type": "bloom", "n_layer": 1, "hidden_size": 64, "n_head": 4, "vocab_size": 100}
    assert model(bloom).world_sizes() == [1]
    assert decode_step(bloom).memory.weights > 0


def test_a_plan_in_a_style_that_is_not_known_is_refused_by_its_name() -> None:
    phi3 = {
        "model_type": "phi3",
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    with pytest.raises(SplitError, match="style 'rowwise_split_input', which is not known here"):
        model(phi3 | {"intermediate_size": 128, "pad_token_id": 0}).world_sizes()


def test_a_window_shorter_than_the_context_is_refused() -> None:
    windowed = {**LLAMA, "model_type": "mistral", "sliding_window": 256}
    assert decode_step(windowed, context=256).memory.kv_cache > 0
    with pytest.raises(ModelError, match="a sliding window of 256 positions; only full attention"):
        decode_step(windowed, context=512)


@pytest.mark.parametrize("values", [OPT, GPT2], ids=lambda values: values["model_type"])
def test_every_rule_of_the_table_names_modules_of_its_architecture(values: dict[str, Any]) -> None:
    kind = values["model_type"]
    built = model(values)._build()
    found = {
        name if not any(part.isdecimal() for part in name.split(".")) else
        ".".join("*" if part.isdecimal() else part for part in name.split("."))
        for name, _, _ in rules(built, PLANS[kind])
    }  # fmt: skip
    assert found == set(PLANS[kind])
    assert set(DIVIDED) <= set(PLANS)


def test_tied_weights_stay_one_tensor_when_they_are_split() -> None:
    whole, half = decode_step(OPT), decode_step(OPT, 2)
    vocabulary = OPT["vocab_size"] * OPT["hidden_size"] * 2
    positions = (OPT["max_position_embeddings"] + 2) * OPT["hidden_size"] * 2
    assert (
        whole.memory.weights - vocabulary - positions > 2 * (half.memory.weights - vocabulary // 2 - positions) * 0.99
    )
    assert half.memory.weights < whole.memory.weights * 0.75


@pytest.mark.parametrize(
    ("name", "parameters"), [("opt-1.3b", 1_315_758_080), ("opt-30b", 29_974_540_288), ("opt-66b", 65_719_701_504)]
)
def test_a_preset_has_as_many_parameters_as_the_published_model(name: str, parameters: int) -> None:
    built = TransformersModel(name, config_of(CONFIGS[name]))._build()
    assert built.num_parameters() == parameters


def test_a_config_is_read_from_its_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        assert load_config(path).hidden_size == DECODER.hidden
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_config(tmp_path / "elsewhere")
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(ModelError, match="is no config of transformers"):
        load_config(tmp_path)


def test_peers_outside_a_recording_change_nothing() -> None:
    import torch

    peers = Peers(2)
    x, weight = torch.ones(1, 3), torch.ones(2, 3)
    assert torch.equal(peers.linear_all_reduce(x, weight), torch.full((1, 2), 3.0))
    assert peers.all_reduce(x) is x
