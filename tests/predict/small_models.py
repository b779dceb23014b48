"""A decoder and an OPT of a few layers, for tests that count every byte."""

from __future__ import annotations

from typing import Any

from hxcomm.decoder.shards import Config
from hxcomm.predict.decoder_model import DecoderModel

# 4 query heads on 2 KV heads; nothing divides anything else by accident.
DECODER = Config(
    layers=3,
    hidden=96,
    heads=4,
    kv_heads=2,
    head_dim=24,
    intermediate=320,
    vocabulary=1000,
    context=4096,
    rope_theta=10000.0,
    rms_eps=1e-5,
    tied=False,
)

OPT: dict[str, Any] = {
    "model_type": "opt",
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "word_embed_proj_dim": 96,
    "num_attention_heads": 4,
    "ffn_dim": 384,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def decoder() -> DecoderModel:
    return DecoderModel("small", DECODER)
