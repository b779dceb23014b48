"""The operators in compiled graphs, `torch.ops.hxcomm.*`: a communicator's operations as functions of tensors.

All have one signature: (comm, given, like, numbers, kind, factor, scale, async_op, hints, timeout) -> results, ticket.
`given` are read. Results are new: of the shapes of `like`, or, where there is none, copies of `given` that the
operation then changes. `numbers` are root, peer or splits, `kind`, `factor` and `scale` the ReduceOp.

An operation with async_op runs on when its operator has returned. The results are then stand-ins, of the right shape
and without memory: the ticket tells `wait` whose results to return. So nothing in a graph, a copy for instance, can
touch them before. Operators are ordered effects: a graph keeps their order, which is the same on every rank. Gradients
of collectives are collectives: every rank's backward pass must come to them (so in a broadcast the other
ranks' tensors must require a gradient).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _register_effectful_op
from torch._library.effects import EffectType
from torch._library.opaque_object import get_opaque_type_name

from hxcomm.torchcomms.comm import TorchComm
from hxcomm.torchcomms.options import Timeout
from hxcomm.torchcomms.reduce_op import RedOpType, ReduceOp

_library: Any = torch.library.Library("hxcomm", "FRAGMENT")  # type: ignore[no-untyped-call]
_kept: list[Any] = []  # torch forgets an effect when its handle is dropped
_tickets = itertools.count(1)
_running: dict[int, tuple[Any, list[Tensor]]] = {}  # by ticket: works that nobody has waited for, and their results

ARGUMENTS = (
    f"({get_opaque_type_name(TorchComm)} comm, Tensor[] given, Tensor[] like, int[] numbers, str kind, float? factor, "
    f"Tensor? scale, bool async_op, str[] hints, {get_opaque_type_name(Timeout)}? timeout) -> (Tensor[], Tensor)"
)
Grads = list[Tensor]


@dataclass
class Call:
    """One call, as the communicator is called: `into` are the results."""

    comm: Any
    given: list[Tensor]
    into: list[Tensor]
    numbers: list[int]
    op: ReduceOp | None
    rest: dict[str, Any]


@dataclass
class Operator:
    """How an operation is carried out and what its gradient is. None: it has none."""

    call: Callable[[Call], Any]
    gradient: Callable[[Backward, Grads], Grads] | None = None


@dataclass
class Backward:
    """What a gradient's formula knows of the call it is of."""

    comm: Any
    name: str
    shapes: list[torch.Size]  # of `given`
    numbers: list[int]
    kind: str
    factor: float | None
    scale: Tensor | None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.comm.get_size()

    def run(self, name: str, given: Grads, like: Grads, numbers: list[int] | None = None, kind: str = "") -> Grads:
        operator = getattr(torch.ops.hxcomm, name)
        results: Grads = operator(self.comm, given, like, numbers or [], kind, None, None, False, [], None)[0]
        return results

    def like_given(self, grads: Grads) -> Grads:
        return [grads[0].new_empty(shape) for shape in self.shapes]

    def share(self, grad: Tensor) -> Tensor:
        """How much this rank's contribution to a reduction counts."""
        if self.kind == "SUM":
            return grad
        if self.kind == "AVG":
            return grad / self.size
        if self.kind == "PREMUL_SUM":
            return grad * (self.factor or 0.0) if self.scale is None else grad * self.scale.to(grad.dtype)
        raise NotImplementedError(
            f"{self.name} with {self.kind} has no gradient here: SUM, AVG and PREMUL_SUM have one"
        )


def _of_all_reduce(call: Backward, grads: Grads) -> Grads:
    call.share(grads[0])  # raises before anything is sent
    return [call.share(call.run("all_reduce", grads, [], kind="SUM")[0])]


def _of_reduce(call: Backward, grads: Grads) -> Grads:
    """Root's result is of all contributions; another rank's tensor stays as it was."""
    share = call.share(call.run("broadcast", grads, [], call.numbers)[0])
    return [share if call.comm.get_rank() == call.numbers[0] else share + grads[0]]


def _of_broadcast(call: Backward, grads: Grads) -> Grads:
    total = call.run("reduce", grads, [], call.numbers, "SUM")[0]
    return [total if call.comm.get_rank() == call.numbers[0] else torch.zeros_like(total)]


def _of_all_gather(way: str) -> Callable[[Backward, Grads], Grads]:
    return lambda call, grads: call.run(way, grads, call.like_given(grads), kind="SUM")


def _of_reduce_scatter(way: str) -> Callable[[Backward, Grads], Grads]:
    def gradient(call: Backward, grads: Grads) -> Grads:
        call.share(grads[0])
        return [call.share(each) for each in call.run(way, grads, call.like_given(grads))]

    return gradient


def _of_all_to_all(way: str) -> Callable[[Backward, Grads], Grads]:
    def gradient(call: Backward, grads: Grads) -> Grads:
        half = len(call.numbers) // 2
        return call.run(way, grads, call.like_given(grads), [*call.numbers[half:], *call.numbers[:half]])

    return gradient


def _batch(call: Call) -> Any:
    batch, given, into = call.comm.batch_op_create(), iter(call.given), iter(call.into)
    for number in call.numbers:
        if number >= 0:
            batch.send(next(given), number)
        else:
            batch.recv(next(into), -1 - number)
    options = None
    if call.rest["hints"]:
        from hxcomm.torchcomms.options import BatchP2POptions

        options = BatchP2POptions(hints=call.rest["hints"])
    return batch.issue(call.rest["async_op"], options)


def _split(call: Call) -> Any:
    half = len(call.numbers) // 2
    return call.comm.all_to_all_v_single(
        call.into[0], call.given[0], call.numbers[:half], call.numbers[half:], **call.rest
    )


OPERATORS: dict[str, Operator] = {
    "all_reduce": Operator(lambda c: c.comm.all_reduce(c.into[0], c.op, **c.rest), _of_all_reduce),
    "reduce": Operator(lambda c: c.comm.reduce(c.into[0], c.numbers[0], c.op, **c.rest), _of_reduce),
    "broadcast": Operator(lambda c: c.comm.broadcast(c.into[0], c.numbers[0], **c.rest), _of_broadcast),
    "all_gather": Operator(lambda c: c.comm.all_gather(c.into, c.given[0], **c.rest), _of_all_gather("reduce_scatter")),
    "all_gather_v": Operator(
        lambda c: c.comm.all_gather_v(c.into, c.given[0], **c.rest), _of_all_gather("reduce_scatter_v")
    ),
    "all_gather_single": Operator(
        lambda c: c.comm.all_gather_single(c.into[0], c.given[0], **c.rest), _of_all_gather("reduce_scatter_single")
    ),
    "reduce_scatter": Operator(
        lambda c: c.comm.reduce_scatter(c.into[0], c.given, c.op, **c.rest), _of_reduce_scatter("all_gather")
    ),
    "reduce_scatter_v": Operator(
        lambda c: c.comm.reduce_scatter_v(c.into[0], c.given, c.op, **c.rest), _of_reduce_scatter("all_gather_v")
    ),
    "reduce_scatter_single": Operator(
        lambda c: c.comm.reduce_scatter_single(c.into[0], c.given[0], c.op, **c.rest),
        _of_reduce_scatter("all_gather_single"),
    ),
    "all_to_all_single": Operator(
        lambda c: c.comm.all_to_all_single(c.into[0], c.given[0], **c.rest), _of_all_to_all("all_to_all_single")
    ),
    "all_to_all_v_single": Operator(_split, _of_all_to_all("all_to_all_v_single")),
    "all_to_all": Operator(lambda c: c.comm.all_to_all(c.into, c.given, **c.rest), _of_all_to_all("all_to_all")),
    "scatter": Operator(lambda c: c.comm.scatter(c.into[0], c.given, c.numbers[0], **c.rest)),
    "gather": Operator(lambda c: c.comm.gather(c.into, c.given[0], c.numbers[0], **c.rest)),
    "gather_single": Operator(
        lambda c: c.comm.gather_single(c.into[0] if c.into else c.given[0], c.given[0], c.numbers[0], **c.rest)
    ),
    "send": Operator(lambda c: c.comm.send(c.given[0], c.numbers[0], **c.rest)),
    "recv": Operator(lambda c: c.comm.recv(c.into[0], c.numbers[0], **c.rest)),
    "barrier": Operator(lambda c: c.comm.barrier(**c.rest)),
    "batch": Operator(_batch),
}
# These change what they are given; of the others `like` says what they return.
IN_PLACE = ("all_reduce", "reduce", "broadcast")


def _reduce_op(kind: str, factor: float | None, scale: Tensor | None) -> ReduceOp | None:
    if not kind:
        return None
    return ReduceOp(RedOpType[kind], factor if scale is None else scale)


def _empty(like: list[Tensor]) -> list[Tensor]:
    return [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in like]


def _stand_ins(tensors: list[Tensor]) -> list[Tensor]:
    return [each.new_empty(()).expand(each.shape) for each in tensors]


def _define(name: str, operator: Operator) -> None:
    def run(
        comm: Any,
        given: list[Tensor],
        like: list[Tensor],
        numbers: list[int],
        kind: str,
        factor: float | None,
        scale: Tensor | None,
        async_op: bool,
        hints: list[str],
        timeout: timedelta | None,
    ) -> tuple[list[Tensor], Tensor]:
        given = [each.contiguous() for each in given]
        if name in IN_PLACE:
            into = [each.clone(memory_format=torch.contiguous_format) for each in given]
        else:
            into = _empty(like)
        rest = {"async_op": async_op, "timeout": timeout, "hints": dict(zip(hints[::2], hints[1::2], strict=True))}
        rest["hints"] = rest["hints"] or None
        work = operator.call(Call(comm, given, into, list(numbers), _reduce_op(kind, factor, scale), rest))
        if not async_op:
            return into, torch.tensor(0)
        ticket = next(_tickets)
        _running[ticket] = work, into
        return _stand_ins(into), torch.tensor(ticket)

    def shapes(comm: Any, given: list[Tensor], like: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
        into, async_op = _empty(given if name in IN_PLACE else like), rest[4]
        return _stand_ins(into) if async_op else into, torch.empty((), dtype=torch.int64, device="cpu")

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        comm, given, like, numbers, kind, factor, scale, _, hints, _ = inputs
        ctx.call = comm, [each.shape for each in given], list(numbers), kind, factor
        # What torch takes as gradients: a list for a list of tensors or an empty one, else None.
        ctx.none = [None] * len(like), None if numbers else [], None if hints else []
        ctx.save_for_backward(scale)

    def backward(ctx: Any, grads: Grads, _: Any) -> tuple[Any, ...]:
        comm, given, numbers, kind, factor = ctx.call
        if operator.gradient is None:
            raise NotImplementedError(
                f"{name} has no gradient: ranks whose tensors are not read, or not written, have no backward pass"
            )
        call = Backward(comm, name, given, numbers, kind, factor, ctx.saved_tensors[0])
        found = operator.gradient(call, [grad.contiguous() for grad in grads])
        like, whole, words = ctx.none
        return None, found, like, whole, None, None, None, None, words, None

    _library.define(name + ARGUMENTS, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hxcomm::{name}", shapes, lib=_library)
    torch.library.register_autograd(f"hxcomm::{name}", backward, setup_context=save, lib=_library)
    _kept.append(_register_effectful_op(getattr(torch.ops.hxcomm, name).default, EffectType.ORDERED))


def _define_wait() -> None:
    """(stand-ins, held, ticket) -> results. `held` is what the operation read: its memory is needed until here."""

    def wait(results: list[Tensor], held: list[Tensor], ticket: Tensor) -> list[Tensor]:
        work, into = _running.pop(int(ticket))
        work.wait()
        return into

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.held = len(inputs[1])

    def backward(ctx: Any, grads: Grads) -> tuple[Any, ...]:
        return grads, [None] * ctx.held, None

    _library.define(
        "wait(Tensor[] results, Tensor[] held, Tensor ticket) -> Tensor[]", tags=[torch.Tag.pt2_compliant_tag]
    )
    _library.impl("wait", wait, "CompositeExplicitAutograd")
    torch.library.register_fake("hxcomm::wait", lambda results, held, ticket: _empty(results), lib=_library)
    torch.library.register_autograd("hxcomm::wait", backward, setup_context=save, lib=_library)
    _kept.append(_register_effectful_op(torch.ops.hxcomm.wait.default, EffectType.ORDERED))


for _name, _operator in OPERATORS.items():
    _define(_name, _operator)
_define_wait()
