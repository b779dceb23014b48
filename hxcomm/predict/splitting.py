"""Makes of a model of transformers, on meta, what one rank of a tensor-parallel group has of it.

Weights are replaced by smaller ones, and the modules whose results every rank needs get a forward that asks the peers.
The model's code stays as it is. Knows neither which models there are nor who records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hxcomm.decoder.shards import SplitError
from hxcomm.predict.recording import Peers


def rules(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, style) of every module that has a rule. Raises SplitError for a style that is not known."""
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or style in UNCHANGED:
            continue
        if style not in STYLES or not isinstance(getattr(module, "weight", None), Tensor):
            known = ", ".join((*STYLES, *UNCHANGED))
            raise SplitError(
                f"its plan splits {name} ({type(module).__name__}) in the style {style!r}, which is not known here "
                f"(known are {known}): only --ranks 1 can be predicted"
            )
        yield name, module, style


def world_sizes(model: nn.Module, plan: Mapping[str, str], *counts: int) -> list[int]:
    """Over how many ranks it can be split: what divides each split side of a matrix, and each of `counts` (of heads).

    The vocabulary need not be divided: its last part may be smaller.
    """
    sides = list(counts)
    for _, module, style in rules(model, plan):
        if style in ("colwise", "rowwise"):
            sides.append(_matrix(module).shape[0 if style == "colwise" else 1])
    greatest = math.gcd(*sides)
    return [count for count in range(1, greatest + 1) if greatest % count == 0]


def split(model: nn.Module, plan: Mapping[str, str], divided: Mapping[str, tuple[str, ...]], peers: Peers) -> None:
    """In place: the model becomes that of rank 0, whose parts are the largest."""
    parts = peers.world_size
    replaced: dict[int, nn.Parameter] = {}  # tied weights stay tied

    def cut(module: nn.Module, name: str, dimension: int) -> None:
        whole = getattr(module, name)
        if id(whole) not in replaced:
            shape = list(whole.shape)
            shape[dimension] = -(-shape[dimension] // parts)
            replaced[id(whole)] = nn.Parameter(whole.new_empty(shape), requires_grad=False)
            replaced[id(replaced[id(whole)])] = replaced[id(whole)]
        setattr(module, name, replaced[id(whole)])

    found: list[tuple[str, Any, str]] = list(rules(model, plan))
    for _, module, style in found:
        columns, inputs = (1, 0) if _is_transposed(module) else (0, 1)
        cut(module, "weight", inputs if style == "rowwise" else columns)
        if style.startswith("colwise") and getattr(module, "bias", None) is not None:
            cut(module, "bias", 0)
        if _is_transposed(module) and style == "colwise":
            module.nf = module.weight.shape[1]
        forward = STYLES[style]
        if forward is not None:
            module.forward = forward(module, peers)
    for name, module in model.named_modules():
        for attribute in divided.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), ()):
            setattr(module, attribute, getattr(module, attribute) // parts)


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its matrix as [inputs, columns]."""
    return type(module).__name__ == "Conv1D"


def _matrix(module: nn.Module) -> Tensor:
    """[columns, inputs]"""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if _is_transposed(module) else weight


def _rowwise(module: nn.Module, peers: Peers) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = peers.linear_all_reduce(x, _matrix(module))
        bias = getattr(module, "bias", None)
        return y if bias is None else y + bias

    return forward


def _gathered(module: nn.Module, peers: Peers) -> Callable[[Tensor], Tensor]:
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        return peers.all_gather(inner(x)).movedim(0, -2).flatten(-2)

    return forward


def _vocabulary(module: Any, peers: Peers) -> Callable[[Tensor], Tensor]:
    inner = module.forward

    def forward(tokens: Tensor) -> Tensor:
        elsewhere = tokens >= module.weight.shape[0]
        x = inner(tokens.masked_fill(elsewhere, 0))
        return peers.all_reduce(x.masked_fill_(elsewhere.unsqueeze(-1), 0))

    return forward


# What replaces the forward of a module of each style; None: nothing does.
STYLES: dict[str, Callable[[Any, Peers], Callable[[Tensor], Tensor]] | None] = {
    "colwise": None,
    "rowwise": _rowwise,
    "colwise_gather_output": _gathered,
    "embedding_rowwise": _vocabulary,
}
UNCHANGED = ("replicate", "replicated_with_grad_allreduce")  # of the forward pass
