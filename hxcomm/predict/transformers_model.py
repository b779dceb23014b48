"""A causal model of Hugging Face transformers, by its config, recorded on meta tensors: its own code, no weights.

Needs transformers (an extra). It is split over ranks by transformers' own plan where it has one, else by that of
tensor_parallel_plans.py. Its cache is allocated once and written in place, as engines do; transformers' default copies
all keys and values at each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from hxcomm.predict.recording import DTYPE, Peers, Recorder
from hxcomm.predict.splitting import split, world_sizes
from hxcomm.predict.steps import ModelError, Pass, Stream
from hxcomm.predict.tensor_parallel_plans import DIVIDED, PLANS


class TransformersModel:
    """One config. All ranks have equal shards, but for the last rows of the vocabulary."""

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.config = config.get_text_config()
        self.positions: int | None = getattr(self.config, "max_position_embeddings", None)

    def world_sizes(self) -> list[int]:
        model = self._build()
        plan = self._plan(model)
        heads = self.config.num_attention_heads
        if not plan:
            return [1]
        return world_sizes(model, plan, heads, getattr(self.config, "num_key_value_heads", None) or heads)

    def record(self, world_size: int, *, batch: int, context: int, prompt: int, stored: str) -> tuple[Pass, Pass]:
        """(prefill of the prompt, one decode step whose token is the last of the context)."""
        self._check_windows(context)
        model, peers = self._build(), Peers(world_size)
        if world_size > 1:
            split(model, self._plan(model), DIVIDED.get(self.config.model_type, {}), peers)
        prefill = self._stream(model, peers, batch, prompt, 0, context, stored)
        decode = self._stream(model, peers, batch, 1, context - 1, context, stored)
        of_rank = [0] * world_size
        return Pass((prefill,), of_rank), Pass((decode,), of_rank)

    def _build(self) -> Any:
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=DTYPE)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ModelError(f"{self.name}: is no causal language model of transformers: {error}") from error
        return model.eval().requires_grad_(False)

    def _plan(self, model: Any) -> Mapping[str, str]:
        return model.tp_plan or PLANS.get(self.config.model_type, {})

    def _check_windows(self, context: int) -> None:
        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ("sliding_attention" if window else "full_attention",))
        unknown = kinds - {"full_attention", "sliding_attention"}
        if unknown or ("sliding_attention" in kinds and window and context > window):
            what = f"layers of {', '.join(sorted(unknown))}" if unknown else f"a sliding window of {window} positions"
            limit = "" if unknown else f", which is up to --context {window}"
            raise ModelError(f"{self.name}: has {what}; only full attention is predicted{limit}")

    def _stream(
        self, model: Any, peers: Peers, batch: int, count: int, position: int, context: int, stored: str
    ) -> Stream:
        recorder = Recorder([*model.parameters(), *model.buffers()], [], stored)
        peers.recorder = recorder
        layers: list[Any] = [
            _CacheInPlace(context, position, recorder.add_cache) for _ in range(self.config.num_hidden_layers)
        ]
        known = inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"cache" if "cache" in known else "past_key_values": Cache(layers=layers)}
        if "logits_to_keep" in known:
            options["logits_to_keep"] = 1
        try:
            with recorder:
                tokens = torch.empty(batch, count, dtype=torch.int64, device="meta")
                logits = model(input_ids=tokens, use_cache=True, **options).logits
                logits[:, -1].argmax(dim=-1)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ModelError(
                f"{self.name}: the code of {type(model).__name__} cannot be run without weights: {error}"
            ) from error
        return recorder.stream()


class _CacheInPlace(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, allocated once for the whole context; `seen` positions are filled."""

    def __init__(self, context: int, seen: int, allocated: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Any
        self.values: Any
        self.context, self.seen, self.allocated = context, seen, allocated

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def empty(like: Tensor) -> Tensor:
            return like.new_empty(*like.shape[:2], self.context, like.shape[3])

        self.keys, self.values = empty(key_states), empty(value_states)
        self.allocated(self.keys)
        self.allocated(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.seen = self.seen, self.seen + key_states.shape[2]
        self.keys[:, :, begin : self.seen] = key_states
        self.values[:, :, begin : self.seen] = value_states
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def get_seq_length(self) -> int:
        return self.seen


def load_config(path: Path) -> Any:
    """Of a folder with a config.json, or of such a file. Raises ModelError."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path}: has no config.json")
    try:
        return transformers.AutoConfig.from_pretrained(str(file))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{file}: is no config of transformers {transformers.__version__}: {error}") from error


def config_of(values: Mapping[str, Any]) -> Any:
    values = dict(values)
    return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
