"""Hooks run in order, may come and go at any time, and NanCheckHook stops a NaN before it is sent."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_calls import SilentComm

from hxcomm.torchcomms import hook_args
from hxcomm.torchcomms.hook_args import BarrierPreHookArgs, Hooks, OpName
from hxcomm.torchcomms.hooks import NanCheckHook, NanFoundError

NAN = float("nan")
BARRIER = OpName.barrier, 0, BarrierPreHookArgs(False)


def test_hooks_run_in_the_order_of_registration_until_removed() -> None:
    hooks, told = Hooks(), []
    handles = [hooks.register_pre(lambda op, op_id, args, n=n: told.append(n)) for n in range(3)]  # type: ignore[misc]
    assert hooks
    hooks.pre(*BARRIER)
    handles[1].remove()
    handles[1].remove()
    hooks.pre(*BARRIER)
    assert told == [0, 1, 2, 0, 2]
    for handle in handles:
        handle.remove()
    assert not hooks


def test_a_function_registered_twice_runs_twice_and_each_handle_removes_one() -> None:
    hooks, told = Hooks(), []

    def tell(op_id: int, args: object) -> None:
        told.append(op_id)

    first, _ = hooks.register_post(tell), hooks.register_post(tell)
    first.remove()
    hooks.post(7, hook_args.BarrierPostHookArgs(None))
    assert told == [7]


def test_a_hook_may_remove_itself_and_register_others_while_it_runs() -> None:
    hooks, told = Hooks(), []

    def once(op: OpName, op_id: int, args: object) -> None:
        told.append("once")
        handle.remove()
        hooks.register_pre(lambda *_: told.append("later"))

    handle = hooks.register_pre(once)
    hooks.pre(*BARRIER)
    assert told == ["once"]
    hooks.pre(*BARRIER)
    assert told == ["once", "later"]


def test_abort_hooks_do_not_slow_calls_and_all_run_even_if_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    hooks, told = Hooks(), []

    def broken() -> None:
        raise OSError("disk full")

    hooks.register_abort(broken)
    hooks.register_abort(lambda: told.append("second"))
    assert not hooks
    hooks.abort()
    assert told == ["second"] and "disk full" in caplog.text


def test_what_a_pre_hook_raises_stops_the_call() -> None:
    comm, told = SilentComm(0, 1), []

    def refuse(*_: object) -> None:
        raise PermissionError("not now")

    comm.register_pre_hook(refuse)
    comm.register_post_hook(lambda op_id, args: told.append(op_id))
    with pytest.raises(PermissionError, match="not now"):
        comm.call(OpName.barrier)
    assert told == []


def test_what_cannot_be_called_is_no_hook() -> None:
    with pytest.raises(TypeError, match="a hook must be callable, got 3"):
        Hooks().register_pre(3)  # type: ignore[arg-type]


def test_threads_may_register_and_remove_while_calls_run() -> None:
    hooks = Hooks()
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    hooks.register_pre(count)

    def come_and_go() -> None:
        for _ in range(500):
            hooks.register_pre(lambda *_: None).remove()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        hooks.pre(*BARRIER)
    for thread in threads:
        thread.join(60)
    assert calls == [500] and len(hooks._pre) == 1


def test_every_operation_has_arguments_for_both_hooks() -> None:
    stems = {op: op.name.title().replace("_", "") for op in OpName}
    for stem in stems.values():
        pre, post = getattr(hook_args, f"{stem}PreHookArgs"), getattr(hook_args, f"{stem}PostHookArgs")
        assert pre in hook_args.PreHookArgs.__args__ and post in hook_args.PostHookArgs.__args__
        assert not hasattr(pre(*range(len(pre.__slots__))), "__dict__")
    assert len(hook_args.PreHookArgs.__args__) == len(hook_args.PostHookArgs.__args__) == len(OpName) == 21


@pytest.fixture
def checked() -> Callable[..., None]:
    """Makes one call on rank 1 of 2 under a NanCheckHook."""

    def call(op: OpName, *fields: Any, **settings: bool) -> None:
        comm = SilentComm(1, 2)
        NanCheckHook(**settings).register_with_comm(comm)
        comm.call(OpName.barrier)
        comm.call(op, *fields)

    return call


GOOD, BAD = torch.ones(4), torch.tensor([[1.0, 2.0], [NAN, NAN]])


@pytest.mark.parametrize(
    ("op", "fields", "named"),
    [
        (OpName.send, (BAD, 0), "input of send"),
        (OpName.broadcast, (BAD, 1), "input of broadcast"),
        (OpName.all_reduce, (BAD,), "input of all_reduce"),
        (OpName.reduce, (BAD, 0), "input of reduce"),
        (OpName.all_gather, (BAD, [GOOD, GOOD]), "input of all_gather"),
        (OpName.reduce_scatter, ([GOOD, BAD], GOOD), "input[1] of reduce_scatter"),
        (OpName.all_to_all, ([BAD, GOOD], [GOOD, GOOD]), "input[0] of all_to_all"),
        (OpName.all_to_all_v_single, (BAD, GOOD), "input of all_to_all_v_single"),
        (OpName.scatter, (GOOD, [GOOD, BAD], 1), "input[1] of scatter"),
        (OpName.gather, (BAD, [], 0), "input of gather"),
    ],
    ids=lambda value: value.name if isinstance(value, OpName) else None,
)
def test_a_nan_is_found_before_it_is_sent(
    checked: Callable[..., None], op: OpName, fields: tuple[Any, ...], named: str
) -> None:
    message = f"{named} #1 on rank 1 of communicator 'world' holds NaN: 2 of 4 elements, the first at [1, 0]"
    with pytest.raises(NanFoundError, match=re.escape(message)):
        checked(op, *fields)


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        (OpName.recv, (BAD, 0)),
        (OpName.broadcast, (BAD, 0)),
        (OpName.all_gather, (GOOD, [BAD, BAD])),
        (OpName.scatter, (BAD, [BAD, BAD], 0)),
        (OpName.all_reduce, (torch.tensor([1, 2]),)),
    ],
    ids=lambda value: value.name if isinstance(value, OpName) else None,
)
def test_what_will_only_be_written_may_hold_anything(
    checked: Callable[..., None], op: OpName, fields: tuple[Any, ...]
) -> None:
    checked(op, *fields)


@pytest.mark.parametrize("op", [OpName.recv, OpName.broadcast])
def test_outputs_are_checked_where_asked_for(checked: Callable[..., None], op: OpName) -> None:
    with pytest.raises(NanFoundError, match=f"^output of {op.name} #1 on rank 1"):
        checked(op, BAD, 0, check_inputs=False, check_outputs=True)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_nan_is_found_in_every_type_that_has_one(checked: Callable[..., None], dtype: torch.dtype) -> None:
    with pytest.raises(NanFoundError, match="1 of 3 elements, the first at \\[2\\]"):
        checked(OpName.all_reduce, torch.tensor([1.0, 2.0, NAN]).to(dtype))
    checked(OpName.all_reduce, torch.tensor([1.0, 2.0, 3.0]).to(dtype))


def test_a_nan_check_that_is_taken_off_checks_no_more() -> None:
    comm, check = SilentComm(0, 1), NanCheckHook()
    check.register_with_comm(comm)
    assert check.is_enabled()
    check.unregister()
    comm.call(OpName.all_reduce, BAD)
    assert not check.is_enabled()
