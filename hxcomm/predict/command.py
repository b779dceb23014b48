"""`hxcomm predict`: predicts what was asked for, and prints it."""

from __future__ import annotations

import json
import sys

from hxcomm.decoder.shards import SplitError
from hxcomm.predict import models, report
from hxcomm.predict.arguments import Settings, UsageError
from hxcomm.predict.models import Model
from hxcomm.predict.prediction import Prediction, Predictor
from hxcomm.predict.steps import ModelError
from hxcomm.sim import pictures
from hxcomm.sim.costs import CostError
from hxcomm.sim.engine import DeadlockError
from hxcomm.sim.legality import IllegalSchedule


def run(settings: Settings) -> int:
    """The exit status: 0, or 1 where nothing of what was asked for fits. Raises UsageError."""
    try:
        return _run(settings)
    except (ModelError, SplitError, IllegalSchedule, DeadlockError, CostError) as error:
        raise UsageError(str(error)) from error


def _run(settings: Settings) -> int:
    model = models.find(settings.model)
    _check(model, settings)
    predictor = Predictor(
        model,
        settings.chip,
        settings.costs,
        context=settings.context,
        prompt=settings.prompt,
        weights=settings.weights,
    )
    predictions = _predictions(predictor, settings, settings.chunks)
    if not settings.json:
        print(report.heading(model.name, settings))
        print(report.table(predictions))
        print(report.collectives(predictions))
    else:
        print(json.dumps([each.as_json() for each in predictions], indent=2))
    for each in predictions:
        if not each.fits:
            print(_refusal(predictor, each), file=sys.stderr)
    if settings.plot is not None:
        _plot(predictor, settings)
    return 0 if any(each.fits for each in predictions) else 1


def _check(model: Model, settings: Settings) -> None:
    if model.positions is not None and settings.context > model.positions:
        raise UsageError(f"--context {settings.context}: {model.name} has {model.positions} positions")
    for ranks in settings.networks:
        if ranks == 1:
            continue
        known = model.world_sizes()
        if ranks not in known:
            allowed = f"1 to {known[-1]}" if known == list(range(1, known[-1] + 1)) else ", ".join(map(str, known))
            raise UsageError(f"--ranks {ranks}: {model.name} can be split over {allowed} ranks")


def _predictions(predictor: Predictor, settings: Settings, chunks: int) -> list[Prediction]:
    return [
        predictor.predict(network, batch, chunks=chunks)
        for network in settings.networks.values()
        for batch in settings.batches
    ]


def _refusal(predictor: Predictor, prediction: Prediction) -> str:
    memory, capacity = prediction.memory, predictor.chip.memory.capacity_bytes
    enough = predictor.smallest_that_fits(prediction.ranks, prediction.batch)
    then = f"it fits from {enough} chips on" if enough else "it fits no number of chips that it can be split over"
    return (
        f"hxcomm predict: {predictor.model.name} with batch {prediction.batch} does not fit {prediction.ranks} "
        f"chip{'s' * (prediction.ranks > 1)} of {report.gigabytes(capacity)}: a chip would need "
        f"{report.gigabytes(memory.total)} (weights {report.gigabytes(memory.weights)}, KV cache "
        f"{report.gigabytes(memory.kv_cache)}, activations {report.gigabytes(memory.activations)}); {then}"
    )


def _plot(predictor: Predictor, settings: Settings) -> None:
    curves: dict[str, dict[int, float]] = {}
    for name, chunks in (("with overlap", settings.chip.overlap_chunks), ("without overlap", 1)):
        for each in _predictions(predictor, settings, chunks):
            if each.ms_per_token is not None:
                label = name if len(settings.batches) == 1 else f"batch {each.batch}, {name}"
                curves.setdefault(label, {})[each.ranks] = each.ms_per_token
    if not curves:
        raise UsageError("--plot: nothing fits, so there is nothing to draw")
    assert settings.plot is not None
    title = f"{predictor.model.name}, {settings.weights}, context {settings.context}, on {settings.chip.name}"
    pictures.scaling_picture(settings.plot, curves, title)
