"""Hooks run in order, may come and go at any time, and NanCheckHook stops a NaN before it is sent."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from recorded_calls import SilentComm

import hxcomm.torchcomms as torchcomms
from hxcomm.errors import AbortedError
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


def every_operation_tells(rank: int, n: int) -> list[tuple[str, str]]:
    comm = torchcomms.new_comm("hxcomm", "cpu", "world", abort_process_on_timeout_or_error=False)
    told: list[tuple[str, int, object]] = []
    comm.register_pre_hook(lambda op, op_id, args: told.append((op.name, op_id, args)))
    comm.register_post_hook(lambda op_id, args: told.append(("post", op_id, args)))
    sum_, peer = torchcomms.ReduceOp.SUM, (rank + 1) % n
    t, each = torch.ones(2), [torch.ones(2) for _ in range(n)]
    if rank == 0:
        comm.send(t, peer, async_op=False)
    else:
        comm.recv(t, peer, async_op=False)
    comm.broadcast(t, 0, async_op=False)
    comm.all_reduce(t, sum_, async_op=True).wait()
    comm.reduce(t, 0, sum_, async_op=False)
    comm.all_gather(each, t, async_op=False)
    comm.all_gather_v(each, t, async_op=False)
    comm.all_gather_single(torch.empty(2 * n), t, async_op=False)
    comm.reduce_scatter(t, each, sum_, async_op=False)
    comm.reduce_scatter_v(t, each, sum_, async_op=False)
    comm.reduce_scatter_single(t, torch.ones(2 * n), sum_, async_op=False)
    comm.all_to_all_single(torch.empty(n), torch.ones(n), async_op=False)
    comm.all_to_all_v_single(torch.empty(n), torch.ones(n), [1] * n, [1] * n, async_op=False)
    comm.all_to_all([torch.empty(2) for _ in range(n)], each, async_op=False)
    comm.barrier(async_op=False)
    comm.scatter(t, each if rank == 0 else [], 0, async_op=False)
    comm.gather(each if rank == 0 else [], t, 0, async_op=False)
    comm.gather_single(torch.empty(2 * n if rank == 0 else 0), t, 0, async_op=False)
    comm.split([0, 1], "part")
    comm.finalize()
    ids = [op_id for _, op_id, _ in told]
    # The two hooks of a call share its id, and ids grow by one.
    assert ids == [ids[0] + index // 2 for index in range(len(ids))]
    works = [args.work for _, _, args in told if isinstance(args, hook_args.CollectivePostHookArgs)]
    assert len(works) == 17 and all(work.is_completed() for work in works)
    return [
        (told[i][0], type(told[i][2]).__name__ + "/" + type(told[i + 1][2]).__name__) for i in range(0, len(told), 2)
    ]


def test_every_operation_tells_its_hooks_with_one_id(rank_pool: Callable[[int], Any]) -> None:
    for rank, told in enumerate(rank_pool(2).run(every_operation_tells, backend=None)):
        names = [op.name for op in OpName if op is not OpName.new_window]
        expected = [name for name in names if name != ("recv" if rank == 0 else "send")]
        assert sorted(name for name, _ in told) == sorted(expected)
        for name, classes in told:
            stem = name.title().replace("_", "")
            assert classes == f"{stem}PreHookArgs/{stem}PostHookArgs"


def nan_on_one_rank(rank: int, n: int) -> str:
    comm = torchcomms.new_comm("hxcomm", "cpu", "world", abort_process_on_timeout_or_error=False)
    check = torchcomms.hooks.NanCheckHook()
    check.register_with_comm(comm)
    tensor = torch.tensor([1.0, NAN if rank == 1 else 2.0])
    said = ""
    try:
        comm.all_reduce(tensor, torchcomms.ReduceOp.SUM, async_op=rank == 0)
    except NanFoundError as error:
        said = str(error)
        tensor[1] = 5  # nothing was sent: this rank may mend its tensor and call again
        comm.all_reduce(tensor, torchcomms.ReduceOp.SUM, async_op=True)
    comm.barrier(async_op=False)
    assert tensor.tolist() == [2, 7]
    comm.finalize()
    return said


def test_a_nan_on_one_rank_is_stopped_there_and_the_communicator_stays_usable(
    rank_pool: Callable[[int], Any],
) -> None:
    assert rank_pool(2).run(nan_on_one_rank, backend=None) == [
        "",
        "input of all_reduce #1 on rank 1 of communicator 'world' holds NaN: 1 of 2 elements, the first at [1]",
    ]


def abort_is_told(rank: int, n: int) -> list[str]:
    told: list[str] = []
    comm = torchcomms.new_comm("hxcomm", "cpu", "world", abort_process_on_timeout_or_error=False)
    comm.register_abort_hook(lambda: told.append("aborted"))
    comm.register_abort_hook(lambda: told.append("never")).remove()
    if rank == 0:
        comm.abort()
        comm.abort()
    else:
        with pytest.raises(AbortedError):
            comm.barrier(async_op=False, timeout=timedelta(seconds=20))
    comm.finalize()
    return told


def test_abort_hooks_run_once_where_abort_is_called(rank_pool: Callable[[int], Any]) -> None:
    assert rank_pool(2).run(abort_is_told, backend=None)[0] == ["aborted"]
