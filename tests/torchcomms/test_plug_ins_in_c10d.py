"""A c10d process group over a communicator of a backend written in Python."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch._C._distributed_c10d import _make_nccl_premul_sum

Pool = Callable[[int], RankPool]

OPERATIONS = (
    "broadcast",
    "all_reduce",
    "reduce",
    "all_gather",
    "all_gather_v",
    "all_gather_single",
    "reduce_scatter",
    "reduce_scatter_v",
    "reduce_scatter_single",
    "all_to_all_single",
    "all_to_all_v_single",
    "all_to_all",
    "barrier",
    "scatter",
    "gather",
    "send",
    "recv",
)


def passing_on() -> type:
    """A backend in Python over a communicator of ours, which carries out what it is asked for. It notes each call."""
    from hxcomm.torchcomms import P2POpType, TorchCommBackend, new_comm

    class PassingOn(TorchCommBackend):
        def init(self, device: Any, name: str, options: Any) -> None:
            self.under = new_comm("hxcomm", device, f"under {name}", False, store=options.store)
            self.called: list[str] = []

        def get_rank(self) -> int:
            return self.under.get_rank()

        def get_size(self) -> int:
            return self.under.get_size()

        def get_backend_name(self) -> str:
            return "passing_on"

        def finalize(self) -> None:
            self.under.finalize()

        def set_timeout(self, timeout: timedelta) -> None:
            self.under.set_timeout(timeout)

        def batch_op_issue(self, ops: list[Any], async_op: bool) -> Any:
            self.called.append("batch")
            batch = self.under.batch_op_create()
            for each in ops:
                (batch.send if each.type is P2POpType.SEND else batch.recv)(each.tensor, each.peer)
            return batch.issue(async_op)

    def operation(name: str) -> Any:
        def call(self: Any, *args: Any) -> Any:
            self.called.append(name)
            return getattr(self.under, name)(*args)

        return call

    for name in OPERATIONS:
        setattr(PassingOn, name, operation(name))
    return PassingOn


def trained(rank: int, world_size: int) -> list[str]:
    """DDP and tensors split among ranks over it, against one process; then each call of c10d."""
    import copy

    from torch.nn.parallel import DistributedDataParallel

    from hxcomm import torchcomms
    from hxcomm.torchcomms.device_mesh import init_device_mesh
    from hxcomm.verify.models import STEP, Perceptron, backward, exact, rows_of

    if not torchcomms._is_backend_registered("passing_on"):
        torchcomms.register_backend("passing_on", passing_on())  # type: ignore[arg-type]
    comm = torchcomms.new_comm("passing_on", "cpu", "plugged", abort_process_on_timeout_or_error=False)
    mesh = init_device_mesh((comm,), ("all",))
    called = comm.get_backend_impl().called

    alone: Any = exact(Perceptron(), torch.device("cpu"))
    model = DistributedDataParallel(copy.deepcopy(alone))
    optimizers = [torch.optim.SGD(each.parameters(), lr=STEP) for each in (model, alone)]
    for step in range(2):
        inputs, factors = rows_of(step, rank, torch.device("cpu"))
        backward(model(inputs), factors * world_size)
        for other in range(world_size):
            inputs, factors = rows_of(step, other, torch.device("cpu"))
            backward(alone(inputs), factors)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert ours.equal(theirs)
    whole = torch.arange(6.0 * world_size).view(2 * world_size, 3)
    sharded = dist.tensor.distribute_tensor(whole, mesh, [dist.tensor.Shard(0)])
    assert sharded.full_tensor().equal(whole)

    called.clear()
    every_call(rank, world_size)
    noted = list(called)
    dist.destroy_process_group()
    return noted


def every_call(rank: int, world_size: int) -> None:
    n, ones = world_size, torch.ones(world_size)
    dist.all_reduce(ones)
    assert ones.tolist() == [n] * n
    dist.all_reduce(ones, dist.ReduceOp.MAX)
    dist.broadcast(ones, src=1)
    dist.reduce(ones, dst=0)
    assert ones.tolist() == ([n * n] * n if rank == 0 else [n] * n)
    own = torch.full((2,), float(rank))
    into = [torch.empty(2) for _ in range(n)]
    dist.all_gather(into, own)
    assert [each.tolist() for each in into] == [[r, r] for r in range(n)]
    together = torch.empty(2 * n)
    dist.all_gather_into_tensor(together, own)
    assert together.tolist() == [r for r in range(n) for _ in range(2)]
    dist.reduce_scatter(own, list(together.split(2)))
    assert own.tolist() == [n * rank] * 2
    dist.reduce_scatter_tensor(own, together)
    assert own.tolist() == [n * rank] * 2
    out = torch.empty(n)
    dist.all_to_all_single(out, torch.arange(float(n)))
    assert out.tolist() == [rank] * n
    dist.all_to_all_single(out, torch.arange(float(n)), [1] * n, [1] * n)
    dist.all_to_all([torch.empty(1) for _ in range(n)], [torch.ones(1)] * n)
    dist.scatter(out, [torch.full((n,), float(r)) for r in range(n)] if rank == 0 else None, src=0)
    assert out.tolist() == [rank] * n
    parts = [torch.empty(n) for _ in range(n)] if rank == 0 else None
    dist.gather(out, parts, dst=0)
    assert parts is None or [each[0].item() for each in parts] == list(range(n))
    dist.barrier()
    received = torch.empty(n)
    ops = [dist.P2POp(dist.irecv, received, (rank - 1) % n), dist.P2POp(dist.isend, out, (rank + 1) % n)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert received.tolist() == [(rank - 1) % n] * n
    work = dist.all_reduce(ones, async_op=True)
    assert work is not None
    assert work.get_future().wait()[0] is not None
    with dist._coalescing_manager(async_ops=True) as block:
        dist.all_reduce(ones)
        dist.all_reduce(out)
    block.wait()
    dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).set_timeout(timedelta(seconds=9))


def test_models_train_over_a_backend_written_in_python(rank_pool: Pool) -> None:
    for noted in rank_pool(2).run(trained, backend=None, timeout_s=120):
        assert noted == [
            "all_reduce",
            "all_reduce",
            "broadcast",
            "reduce",
            "all_gather",
            "all_gather_single",
            "reduce_scatter",
            "reduce_scatter_single",
            "all_to_all_single",
            "all_to_all_v_single",
            "all_to_all",
            "scatter",
            "gather",
            "barrier",
            "batch",
            "all_reduce",
            "all_reduce",
            "all_reduce",
        ]


def lacking(rank: int, world_size: int) -> list[str]:
    from hxcomm import torchcomms
    from hxcomm.torchcomms.device_mesh import init_device_mesh

    if not torchcomms._is_backend_registered("passing_on"):
        torchcomms.register_backend("passing_on", passing_on())  # type: ignore[arg-type]
    comm = torchcomms.new_comm("passing_on", "cpu", "plugged", abort_process_on_timeout_or_error=False)
    init_device_mesh((comm,), ("all",))
    messages = []
    for call in (
        lambda: dist.send(torch.ones(1), 1 - rank, tag=7),
        lambda: dist.all_reduce(torch.ones(1), _make_nccl_premul_sum(2.0)),
        lambda: dist.recv(torch.ones(1)),
    ):
        with pytest.raises(NotImplementedError) as caught:
            call()
        messages.append(str(caught.value).splitlines()[0])
    dist.destroy_process_group()
    return messages


def test_what_a_communicator_has_no_word_for_is_refused_over_a_backend_written_in_python(rank_pool: Pool) -> None:
    for tag, factor, anyone in rank_pool(2).run(lacking, backend=None):
        assert "tag 7: messages of a communicator have no tags" in tag
        assert "torch does not say the factor" in factor
        assert "recv from any rank is not an operation of a communicator" in anyone


def test_torch_does_not_let_python_subclass_its_backend() -> None:
    """Why the class is C++. Where this fails, torch has changed, and the class could go."""

    class Ours(torch._C._distributed_c10d.Backend):
        pass

    with pytest.raises(TypeError, match="No constructor defined"):
        Ours(0, 1)
