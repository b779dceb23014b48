"""A tiny random Llama: as a Hugging Face folder, as a GGUF file, and as a forward pass written for reading only.

The forward pass shares no line with examples/tp_decode: whole matrices, no cache, one position after another, repeated
KV heads, in float64. It is what the decoder's logits are held against.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, COLUMNS, VOCABULARY = 2, 64, 6, 3, 16, 96, 300
THETA, EPS = 10000.0, 2.0**-17  # EPS is a float32 number, as GGUF stores it


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": 1 + 0.1 * torch.randn(HIDDEN, generator=generator),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        weights |= {
            name + "input_layernorm.weight": 1 + 0.1 * torch.randn(HIDDEN, generator=generator),
            name + "post_attention_layernorm.weight": 1 + 0.1 * torch.randn(HIDDEN, generator=generator),
            name + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            name + "mlp.gate_proj.weight": matrix(COLUMNS, HIDDEN),
            name + "mlp.up_proj.weight": matrix(COLUMNS, HIDDEN),
            name + "mlp.down_proj.weight": matrix(HIDDEN, COLUMNS),
        }
    return weights


def logits(tokens: list[int]) -> Tensor:
    """[len(tokens), VOCABULARY] float64."""
    w = {name: weight.double() for name, weight in random_weights().items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        h = norm(x, w[name + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{name}self_attn.{part}_proj.weight"].T).view(len(tokens), -1, HEAD_DIM).transpose(0, 1)
            for part in "qkv"
        )
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=0) for part in (rotated(k), v))
        scores = rotated(q) @ k.transpose(1, 2) / HEAD_DIM**0.5
        future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        attention = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + attention.transpose(0, 1).reshape(len(tokens), -1) @ w[name + "self_attn.o_proj.weight"].T
        h = norm(x, w[name + "post_attention_layernorm.weight"])
        gate, up = h @ w[name + "mlp.gate_proj.weight"].T, h @ w[name + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[name + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of [heads, positions, HEAD_DIM], pair by pair: (i, i + HEAD_DIM / 2)."""
    y = x.clone()
    half = HEAD_DIM // 2
    for position in range(x.shape[1]):
        for i in range(half):
            angle = torch.tensor(position * THETA ** (-2 * i / HEAD_DIM), dtype=torch.float64)
            a, b = x[:, position, i], x[:, position, i + half]
            y[:, position, i] = a * angle.cos() - b * angle.sin()
            y[:, position, i + half] = a * angle.sin() + b * angle.cos()
    return y


def byte_tokenizer() -> Tokenizer:
    """Every byte a token, without merges; then special tokens up to VOCABULARY."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [f"<|special_{index}|>" for index in range(len(alphabet), VOCABULARY)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def write_folder(folder: Path, **changes: object) -> Path:
    """A Hugging Face folder, its weights in two files as large models have them. `changes` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": COLUMNS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rope_theta": THETA,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": False,
        "eos_token_id": VOCABULARY - 1,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    weights = random_weights()
    first = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file({n: w for n, w in weights.items() if n not in first}, folder / "model-00002-of-00002.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_gguf(path: Path) -> Path:
    """The same model as llama.cpp's converter writes it: other names, and q and k rows permuted for its RoPE."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(COLUMNS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPS)
    for name, weight in random_weights().items():
        if "q_proj" in name or "k_proj" in name:
            heads = len(weight) // HEAD_DIM  # convert_hf_to_gguf.py, LlamaModel.permute
            weight = weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None
        writer.add_tensor(theirs, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
