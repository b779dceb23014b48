"""Finds the model that --model names: a preset, or a config of transformers on this machine. Downloads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hxcomm.predict import presets
from hxcomm.predict.arguments import UsageError
from hxcomm.predict.steps import ModelError, Pass


class Model(Protocol):
    """What can be recorded."""

    name: str
    positions: int | None  # that it can tell apart; None: any number

    def world_sizes(self) -> list[int]:
        """Over how many ranks it can be split, ascending. Raises SplitError where it cannot be split."""
        ...

    def record(self, world_size: int, *, batch: int, context: int, prompt: int, stored: str) -> tuple[Pass, Pass]:
        """(prefill of the prompt, one decode step whose token is the last of the context). Raises ModelError."""
        ...


def find(name: str) -> Model:
    """Raises UsageError where there is no such model, or transformers is missing for one that needs it."""
    preset = name.lower()
    if preset in presets.DECODERS:
        from hxcomm.predict.decoder_model import DecoderModel

        return DecoderModel(preset, presets.DECODERS[preset])
    if preset not in presets.CONFIGS and not Path(name).exists():
        raise UsageError(
            f"--model {name}: there is no such preset and no such file or folder. Presets are "
            f"{', '.join(presets.NAMES)}; of any other causal model of transformers give the config.json, or "
            "the folder that has it"
        )
    try:
        from hxcomm.predict import transformers_model
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--model {name}: needs the package {error.name}: pip install 'hxcomm[predict]' (without it there are "
            f"{', '.join(presets.DECODERS)})"
        ) from None
    try:
        if preset in presets.CONFIGS:
            config = transformers_model.config_of(presets.CONFIGS[preset])
            return transformers_model.TransformersModel(preset, config)
        return transformers_model.TransformersModel(name, transformers_model.load_config(Path(name)))
    except ModelError as error:
        raise UsageError(f"--model {error}") from error
