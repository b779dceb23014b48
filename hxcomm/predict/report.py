"""The tables of `hxcomm predict`, as text for a terminal. Every number has its unit."""

from __future__ import annotations

from collections.abc import Sequence

from hxcomm.predict.arguments import Settings
from hxcomm.predict.prediction import PS_PER_MS, Prediction
from hxcomm.sim.pictures import size_text, time_text

PARTS = ("weights", "kv_cache", "other", "exposed_communication", "hidden_communication")


def heading(model: str, settings: Settings) -> str:
    chip = settings.chip
    overlap = f"overlapped in {settings.chunks} chunks" if settings.chunks > 1 else "not overlapped"
    links = "; ".join(sorted({network.text() for network in settings.networks.values() if network.world_size > 1}))
    return "\n".join(
        [
            f"{model}, weights {settings.weights}, context {settings.context}, prompt {settings.prompt}",
            f"{chip.name}: {chip.description}" if chip.description else chip.name,
            f"products and their all_reduces are {overlap}" + (f"; links: {links}" if links else ""),
            "",
        ]
    )


def table(predictions: Sequence[Prediction]) -> str:
    """One line for each number of ranks and batch; the parts are of one decode step."""
    power = any(each.joule_per_token is not None for each in predictions)
    names = ["ranks", "batch", "first token", "per token", "tokens/s", *(["J/token"] if power else [])]
    names += ["weights", "KV cache", "other", "exposed", "hidden", "memory of a chip"]
    units = ["", "", "ms", "ms", "", *([""] if power else []), *["ms"] * 5, "weights + KV + activations"]
    rows = [names, units]
    for each in predictions:
        rows.append([str(each.ranks), str(each.batch), *_times(each, power), _memory(each)])
    return _aligned(rows)


def _times(prediction: Prediction, power: bool) -> list[str]:
    if prediction.decode is None:
        return ["does not fit", *["-"] * (7 + power)]
    parts = [f"{getattr(prediction.decode, name) / PS_PER_MS:.4g}" for name in PARTS]
    joule = [f"{prediction.joule_per_token:.4g}"] if power else []
    times = [f"{prediction.ttft_ms:.4g}", f"{prediction.ms_per_token:.4g}", f"{prediction.tokens_per_s:.5g}"]
    return [*times, *joule, *parts]


def _memory(prediction: Prediction) -> str:
    memory = prediction.memory
    parts = " + ".join(gigabytes(each) for each in (memory.weights, memory.kv_cache, memory.activations))
    return f"{gigabytes(memory.total)} = {parts}"


def collectives(predictions: Sequence[Prediction]) -> str:
    """What a decode step asks of the links, and by which algorithm the chip would do it."""
    rows = [["ranks", "batch", "collective", "a block", "calls", "algorithm", "one alone"]]
    rows += [
        [
            str(each.ranks),
            str(each.batch),
            use.op,
            size_text(use.nbytes),
            str(use.calls),
            use.algorithm,
            time_text(use.time_ps),
        ]
        for each in predictions
        if each.ranks > 1
        for use in each.collectives
    ]
    return "\nCollectives of a decode step\n" + _aligned(rows) if len(rows) > 1 else ""


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.4g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"
