"""How models are split over ranks, where transformers has no plan of its own. Data only.

Each rule is a module's name (`*` for the number of a layer) and a style, in transformers' words
(https://huggingface.co/docs/transformers/perf_infer_gpu_multi):

    colwise                 each rank has some of the output columns, and of the bias
    rowwise                 each rank has some of the input rows; the outputs are summed over ranks, then the bias added
    colwise_gather_output   as colwise, and each rank gets everybody's columns
    embedding_rowwise       each rank has some of the vocabulary; the rows found are summed over ranks

To add an architecture: its model_type (config.json), the rules, and in DIVIDED what its code reads sizes from that are
now a rank's own. Whatever has no rule is on every rank in whole.
"""

from __future__ import annotations

from collections.abc import Mapping

PLANS: Mapping[str, Mapping[str, str]] = {
    "opt": {
        "lm_head": "colwise_gather_output",
        "model.decoder.embed_tokens": "embedding_rowwise",
        "model.decoder.layers.*.self_attn.q_proj": "colwise",
        "model.decoder.layers.*.self_attn.k_proj": "colwise",
        "model.decoder.layers.*.self_attn.v_proj": "colwise",
        "model.decoder.layers.*.self_attn.out_proj": "rowwise",
        "model.decoder.layers.*.fc1": "colwise",
        "model.decoder.layers.*.fc2": "rowwise",
    },
    "gpt2": {
        "lm_head": "colwise_gather_output",
        "transformer.wte": "embedding_rowwise",
        "transformer.h.*.attn.c_attn": "colwise",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
    },
}

# Attributes of modules that count what is split: each is divided by the number of ranks.
DIVIDED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "opt": {"model.decoder.layers.*.self_attn": ("num_heads",)},
    "gpt2": {"transformer.h.*.attn": ("num_heads", "split_size")},
}
