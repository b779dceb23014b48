"""What a call reads and what it writes, from the arguments of its pre hook."""

from __future__ import annotations

from torch import Tensor

from hxcomm.torchcomms.hook_args import OpName, PreHookArgs

_NO_TENSORS = frozenset({OpName.barrier, OpName.split, OpName.new_window, OpName.finalize})
_READS_AND_WRITES = frozenset({OpName.all_reduce, OpName.reduce})


def inputs(op: OpName, args: PreHookArgs, rank: int) -> list[Tensor]:
    """The tensors this rank reads, in the caller's order."""
    if op in _NO_TENSORS or op is OpName.recv:
        return []
    if op is OpName.broadcast:
        return [args.tensor] if args.root == rank else []  # type: ignore[union-attr]  # op says which class args has
    if op is OpName.scatter and args.root != rank:  # type: ignore[union-attr]
        return []
    return _listed(args.tensor if op is OpName.send or op in _READS_AND_WRITES else args.input)  # type: ignore[union-attr]


def outputs(op: OpName, args: PreHookArgs, rank: int) -> list[Tensor]:
    """The tensors this rank's call writes, in the caller's order."""
    if op in _NO_TENSORS or op is OpName.send:
        return []
    if op in (OpName.broadcast, OpName.reduce, OpName.gather, OpName.gather_single) and (
        (args.root == rank) == (op is OpName.broadcast)  # type: ignore[union-attr]
    ):
        return []
    if op in _READS_AND_WRITES or op in (OpName.recv, OpName.broadcast):
        return [args.tensor]  # type: ignore[union-attr]
    return _listed(args.output)  # type: ignore[union-attr]


def _listed(tensors: Tensor | list[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
