"""Models by name: shapes that are published, each with its source. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hxcomm.decoder.shards import Config

# Of hxcomm's own decoder. Llama 3.1 scales its rotary frequencies (rope_type llama3): other numbers in the tables that
# are computed once, and the same work per token.
DECODERS: Mapping[str, Config] = {
    # huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json
    "smollm2-135m": Config(30, 576, 9, 3, 64, 1536, 49152, 8192, 100000.0, 1e-5, True),
    # arXiv:2307.09288, section 2.2; huggingface.co/meta-llama/Llama-2-7b-hf and Llama-2-70b-hf, config.json
    "llama-2-7b": Config(32, 4096, 32, 32, 128, 11008, 32000, 4096, 10000.0, 1e-5, False),
    "llama-2-70b": Config(80, 8192, 64, 8, 128, 28672, 32000, 4096, 10000.0, 1e-5, False),
    # arXiv:2407.21783, table 3; huggingface.co/meta-llama/Llama-3.1-8B and Llama-3.1-70B, config.json
    "llama-3.1-8b": Config(32, 4096, 32, 8, 128, 14336, 128256, 131072, 500000.0, 1e-5, False),
    "llama-3.1-70b": Config(80, 8192, 64, 8, 128, 28672, 128256, 131072, 500000.0, 1e-5, False),
}


def _opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "tie_word_embeddings": True,
    }


# Of transformers: what config.json holds where it differs from the class's defaults.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    # arXiv:2205.01068, table 1; huggingface.co/facebook/opt-1.3b, opt-30b and opt-66b, config.json
    "opt-1.3b": _opt(layers=24, hidden=2048, heads=32),
    "opt-30b": _opt(layers=48, hidden=7168, heads=56),
    "opt-66b": _opt(layers=64, hidden=9216, heads=72),
}

NAMES = (*DECODERS, *CONFIGS)
