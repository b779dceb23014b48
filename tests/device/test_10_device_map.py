"""The device hx, step by step. 10: a model of transformers on one chip, or laid over several by device_map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="pip install 'hxcomm[examples]'")
pytest.importorskip("accelerate", reason="pip install 'hxcomm[examples]'")

PROMPT = torch.tensor([[1, 2, 3, 5, 8]])
OVER_THREE_CHIPS = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": 3,
    "model.layers.2": 3,
    "model.layers.3": 5,
    "model.norm": 5,
    "lm_head": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(folder: Path, **how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how)


@torch.inference_mode()
def decoded(model: Any) -> tuple[list[int], Tensor]:
    """Greedy tokens and the logits of the prompt. From aligned weights: MKL rounds otherwise in a mapped file."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    prompt = PROMPT.to(model.device)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    return tokens[0].tolist(), model(prompt).logits.cpu()


@pytest.mark.parametrize(
    ("device_map", "chips"), [("hx", {0}), ("hx:2", {2}), ({"": 1}, {1}), (OVER_THREE_CHIPS, {0, 3, 5})], ids=str
)
def test_device_map_names_the_chips_and_the_results_are_those_of_cpu(
    folder: Path, device_map: Any, chips: set[int]
) -> None:
    model = loaded(folder, device_map=device_map)
    assert {p.device for p in model.parameters()} == {torch.device("hx", chip) for chip in chips}
    tokens, logits = decoded(model)
    expected_tokens, expected = decoded(loaded(folder))
    assert tokens == expected_tokens
    assert logits.equal(expected)


def test_device_map_auto_fills_the_chips_whose_memory_it_is_told(folder: Path) -> None:
    # Told, because accelerate has a fixed list of devices whose memory it asks for; without, it would take the CPU.
    model = loaded(folder, device_map="auto", max_memory=dict.fromkeys((0, 1, 2), "1MB"))
    assert {p.device for p in model.parameters()} == {torch.device("hx", chip) for chip in (0, 1, 2)}
    assert decoded(model)[1].equal(decoded(loaded(folder))[1])
