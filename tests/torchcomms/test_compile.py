"""torch.compile of functions that call a communicator: one graph, the results of the eager calls, and gradients.

Gradients are compared with those of the same function of all ranks' inputs, computed in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor
from ranks import RankPool
from torch import Tensor

Pool = Callable[[int], RankPool]


def communicator(device: str = "cpu", name: str = "compiled") -> Any:
    from hxcomm.torchcomms import new_comm

    return new_comm("hxcomm", device, name, abort_process_on_timeout_or_error=False)


def numbers(rank: int, *shape: int, device: str = "cpu") -> Tensor:
    return (torch.arange(float(torch.Size(shape).numel())).view(shape) + 100 * rank).to(device)


def every_operation(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    """Each operation once, on tensors made from x, with something computed before and after it."""
    from hxcomm.torchcomms import ReduceOp, Timeout

    n, rank = comm.get_size(), comm.get_rank()
    out: list[Tensor] = []

    def end(work: Any, *tensors: Tensor) -> None:
        if later:
            work.wait()
        out.extend(each + 1 for each in tensors)

    t = x * 2
    end(comm.all_reduce(t, ReduceOp.SUM, later), t)
    t = x * 2
    end(comm.all_reduce(t, ReduceOp.MAX, later, timeout=Timeout(seconds=20)), t)
    t = x * 2
    end(comm.all_reduce(t, ReduceOp.PREMUL_SUM(0.5), async_op=later, hints={"algorithm": "ring"}), t)
    t = x * 2
    end(comm.all_reduce(t, ReduceOp.PREMUL_SUM(x.flatten()[0:1] + 2), later), t)
    t = x * 2
    end(comm.reduce(t, 1, ReduceOp.AVG, later), t)
    t = x * 2
    end(comm.broadcast(t, root=0, async_op=later), t)
    into = [torch.empty_like(x) for _ in range(n)]
    end(comm.all_gather(into, x * 2, later), *into)
    into = [x.new_empty(r + 1) for r in range(n)]
    end(comm.all_gather_v(into, x.flatten()[: rank + 1] * 2, later), *into)
    one = x.new_empty(n * x.size(0), *x.shape[1:])
    end(comm.all_gather_single(one, x * 2, later), one)
    one = torch.empty_like(x)
    end(comm.reduce_scatter(one, [x * (r + 1) for r in range(n)], ReduceOp.SUM, later), one)
    one = x.new_empty(rank + 1)
    end(comm.reduce_scatter_v(one, [x.flatten()[: r + 1] * 2 for r in range(n)], ReduceOp.SUM, later), one)
    one = x.new_empty(x.size(0) // n, *x.shape[1:])
    end(comm.reduce_scatter_single(one, x * 2, ReduceOp.AVG, later), one)
    one = torch.empty_like(x)
    end(comm.all_to_all_single(one, x * 2, later), one)
    given = [1] + [0] * (n - 2) + [x.size(0) - 1]
    one = x.new_empty(n * given[rank], *x.shape[1:])
    end(comm.all_to_all_v_single(one, x * 2, [given[rank]] * n, given, later), one)
    into = [torch.empty_like(x) for _ in range(n)]
    end(comm.all_to_all(into, [x * (r + 1) for r in range(n)], later), *into)
    one = torch.empty_like(x)
    end(comm.scatter(one, [x * (r + 1) for r in range(n)], 1, later), one)
    into = [torch.zeros_like(x) for _ in range(n)]
    end(comm.gather(into, x * 2, 0, later), *into)
    one = torch.zeros_like(x).repeat(n, *[1] * (x.dim() - 1))
    end(comm.gather_single(one, x * 2, 0, later), one)
    other, received = rank ^ 1, torch.empty_like(x)
    if other < n:
        batch = comm.batch_op_create()
        batch.send(x * 2, other)
        batch.recv(received, other)
        end(batch.issue(later), received)
        if rank % 2:
            end(comm.send(x * 3, other, later))
            end(comm.recv(received, other, later), received)
        else:
            end(comm.recv(received, other, later), received)
            end(comm.send(x * 3, other, later))
    end(comm.barrier(later))
    return out


def compiled_as_eager(rank: int, world_size: int, device: str, compiler: str) -> list[int]:
    torch.set_num_threads(1)
    comm = communicator(device)
    x = numbers(rank, 2 * world_size, 3, device=device)
    counts = []
    with torch._inductor.config.patch(compile_threads=1):
        for later in (False, True):
            torch._dynamo.reset()
            expected = every_operation(comm, x, later)
            compiled = torch.compile(every_operation, fullgraph=True, backend=compiler)
            for _ in range(2):
                found = compiled(comm, x, later)
                different = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not a.equal(b)]
                assert different == [], (later, different)
            counts.append(len(found))
    torch._dynamo.reset()
    comm.finalize()
    return counts


@pytest.mark.parametrize(
    ("device", "compiler", "world_size"),
    [("cpu", "eager", 2), ("cpu", "aot_eager", 3), ("cpu", "inductor", 2), ("hx", "aot_eager", 2)],
)
def test_every_operation_compiles_into_one_graph_and_gives_what_it_gives_eagerly(
    rank_pool: Pool, device: str, compiler: str, world_size: int
) -> None:
    outcomes = rank_pool(world_size).run(compiled_as_eager, device, compiler, backend=None, timeout_s=170)
    assert all(one == two > 20 for one, two in outcomes)


def in_place(rank: int, world_size: int, compiler: str) -> tuple[list[float], list[float], int]:
    """The graph's inputs are changed, and the same graph serves calls with other values."""
    from hxcomm.torchcomms import ReduceOp

    comm = communicator()
    graphs = 0

    def step(tensor: Tensor, output: Tensor) -> Tensor:
        comm.all_reduce(tensor, ReduceOp.SUM, False)
        work = comm.all_gather_single(output, tensor * (comm.get_rank() + 1), True)
        doubled = tensor * 2
        work.wait()
        return doubled

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for turn in range(3):
        tensor, output = torch.full((2,), float(rank + turn)), torch.empty(2 * world_size)
        doubled = compiled(tensor, output)
        assert doubled.tolist() == [2 * each for each in tensor.tolist()]
    torch._dynamo.reset()
    comm.finalize()
    return tensor.tolist(), output.tolist(), graphs


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_graph_changes_its_inputs_as_the_eager_call_does(rank_pool: Pool, compiler: str) -> None:
    for tensor, output, graphs in rank_pool(2).run(in_place, compiler, backend=None, timeout_s=120):
        assert (tensor, output, graphs) == ([5.0, 5.0], [5.0, 5.0, 10.0, 10.0], 1)


def weigh(tensors: list[Tensor]) -> Tensor:
    """A loss in which each element has a weight of its own."""
    total = tensors[0].new_zeros(())
    for number, each in enumerate(tensors):
        total = total + (each * (torch.arange(float(each.numel())).view(each.shape) + number + 1)).sum()
    return total


def reduced(op: str) -> Callable[..., list[Tensor]]:
    def call(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
        from hxcomm.torchcomms import ReduceOp

        t = x * 2
        kind = ReduceOp.PREMUL_SUM(comm.get_rank() + 2.0) if op == "PREMUL_SUM" else getattr(ReduceOp, op)
        work = comm.all_reduce(t, kind, later)
        if later:
            work.wait()
        return [t * t]

    return call


def reduced_to_root(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    from hxcomm.torchcomms import ReduceOp

    t = x * 2
    work = comm.reduce(t, 1, ReduceOp.SUM, later)
    if later:
        work.wait()
    return [t * t]


def broadcast(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    t = x * 2
    work = comm.broadcast(t, 1, later)
    if later:
        work.wait()
    return [t * t]


def gathered(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    into = [torch.empty_like(x) for _ in range(comm.get_size())]
    one = x.new_empty(comm.get_size() * x.numel())
    works = [comm.all_gather(into, x * 2, later), comm.all_gather_single(one, x.flatten() * 3, later)]
    if later:
        for work in works:
            work.wait()
    return [*(each * each for each in into), one * one]


def gathered_unevenly(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    into = [x.new_empty(rank + 1) for rank in range(comm.get_size())]
    work = comm.all_gather_v(into, x.flatten()[: comm.get_rank() + 1] * 2, later)
    if later:
        work.wait()
    return [each * each for each in into]


def scattered_sums(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    from hxcomm.torchcomms import ReduceOp

    one, other = torch.empty_like(x), x.new_empty(x.size(0) // comm.get_size(), x.size(1))
    parts = [x * (rank + 1) for rank in range(comm.get_size())]
    works = [
        comm.reduce_scatter(one, parts, ReduceOp.SUM, later),
        comm.reduce_scatter_single(other, x * 2, ReduceOp.AVG, later),
    ]
    if later:
        for work in works:
            work.wait()
    return [one * one, other * other]


def scattered_sums_unevenly(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    from hxcomm.torchcomms import ReduceOp

    one = x.new_empty(comm.get_rank() + 1)
    parts = [x.flatten()[: rank + 1] * (rank + 2) for rank in range(comm.get_size())]
    work = comm.reduce_scatter_v(one, parts, ReduceOp.SUM, later)
    if later:
        work.wait()
    return [one * one]


def exchanged(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    size = comm.get_size()
    one, into = torch.empty_like(x), [torch.empty_like(x) for _ in range(size)]
    works = [
        comm.all_to_all_single(one, x * 2, later),
        comm.all_to_all(into, [x * (rank + 1) for rank in range(size)], later),
    ]
    if later:
        for work in works:
            work.wait()
    return [one * one, *(each * each for each in into)]


def exchanged_unevenly(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    """Rank r gives rank 0 one row and the last rank the rest."""
    size, rank, rows = comm.get_size(), comm.get_rank(), x.size(0)
    given = [1] + [0] * (size - 2) + [rows - 1]
    taken = [given[rank]] * size
    one = x.new_empty(sum(taken), x.size(1))
    work = comm.all_to_all_v_single(one, x * 2, taken, given, later)
    if later:
        work.wait()
    return [one * one]


def coalesced(comm: Any, x: Tensor, later: bool) -> list[Tensor]:
    from hxcomm.torchcomms import ReduceOp, coalescing

    t, one = x * 2, x.new_empty(comm.get_size() * x.numel())
    with coalescing.coalesce(comm) as block:
        comm.all_reduce(t, ReduceOp.SUM, later)
        comm.all_gather_single(one, x.flatten() * 3, later)
    block.wait()
    return [t * t, one * one]


FUNCTIONS: dict[str, Callable[..., list[Tensor]]] = {
    "sum": reduced("SUM"),
    "average": reduced("AVG"),
    "premul_sum": reduced("PREMUL_SUM"),
    "reduced_to_root": reduced_to_root,
    "broadcast": broadcast,
    "gathered": gathered,
    "gathered_unevenly": gathered_unevenly,
    "scattered_sums": scattered_sums,
    "scattered_sums_unevenly": scattered_sums_unevenly,
    "exchanged": exchanged,
    "exchanged_unevenly": exchanged_unevenly,
    "coalesced": coalesced,
}


def gradients(rank: int, world_size: int, compiler: str, name: str, later: bool) -> list[list[float]]:
    """This rank's gradient, and a numerical one of the sum of all ranks' losses (exact: losses are quadratic)."""
    torch.set_num_threads(1)
    comm = communicator()
    function = FUNCTIONS[name]

    def loss(x: Tensor) -> Tensor:
        return weigh(function(comm, x, later))

    if compiler == "patched":
        from hxcomm.torchcomms.functional import collectives  # noqa: F401

        run = loss
    else:
        run = torch.compile(loss, fullgraph=True, backend=compiler)
    x = (numbers(rank, 2 * world_size, 2) / 64).double().requires_grad_()
    with torch._inductor.config.patch(compile_threads=1):
        run(x).backward()
    torch._dynamo.reset()
    expected = torch.zeros_like(x)
    # Each rank's elements one after another; (f(x + 1) - f(x - 1)) / 2 is exact for what is quadratic.
    for mover in range(world_size):
        for i in range(x.numel()):
            difference = torch.zeros(1, dtype=torch.float64)
            for sign in (1.0, -1.0):
                moved = x.detach().clone()
                if rank == mover:
                    moved.view(-1)[i] += sign
                total = loss(moved).reshape(1) * sign / 2
                difference += total
            from hxcomm.torchcomms import ReduceOp

            comm.all_reduce(difference, ReduceOp.SUM, False)
            if rank == mover:
                expected.view(-1)[i] = difference.item()
    comm.finalize()
    assert x.grad is not None
    return [x.grad.flatten().tolist(), expected.flatten().tolist()]


@pytest.mark.parametrize(
    ("name", "later"), [*((name, True) for name in FUNCTIONS), ("sum", False), ("gathered", False)]
)
def test_gradients_of_compiled_functions_are_those_of_the_sum_of_all_ranks_losses(
    rank_pool: Pool, name: str, later: bool
) -> None:
    for found, expected in rank_pool(2).run(gradients, "aot_eager", name, later, backend=None, timeout_s=120):
        assert found == expected


@pytest.mark.parametrize("name", ["sum", "gathered", "coalesced"])
def test_gradients_of_generated_code_are_the_same(rank_pool: Pool, name: str) -> None:
    for found, expected in rank_pool(3).run(gradients, "inductor", name, True, backend=None, timeout_s=170):
        assert found == expected


@pytest.fixture
def fresh_ranks() -> Iterator[RankPool]:
    """Of their own: the import under test changes the class of communicators in the process."""
    pool = RankPool(2)
    yield pool
    pool.close()


def test_importing_collectives_gives_eager_calls_gradients(fresh_ranks: RankPool) -> None:
    for name in FUNCTIONS:
        for found, expected in fresh_ranks.run(gradients, "patched", name, name == "sum", backend=None):
            assert found == expected, name


def without_gradient(rank: int, world_size: int) -> list[str]:
    from hxcomm.torchcomms import ReduceOp

    comm = communicator()

    def maximum(x: Tensor) -> Tensor:
        t = x * 2
        comm.all_reduce(t, ReduceOp.MAX, False)
        return t.sum()

    def gather(x: Tensor) -> Tensor:
        into = [torch.empty_like(x) for _ in range(world_size)]
        comm.gather(into, x, rank, False)
        return into[0].sum()

    def scatter(x: Tensor) -> Tensor:
        one = torch.empty_like(x)
        comm.scatter(one, [x] * world_size, rank, False)
        return one.sum()

    messages = []
    for function in (maximum, gather, scatter):
        x = torch.ones(2, requires_grad=True)
        with pytest.raises(Exception, match="has no gradient") as caught:  # of the graph's compiler: nothing is sent
            torch.compile(function, fullgraph=True, backend="aot_eager")(x).backward()
        messages.append(str(caught.value))
    torch._dynamo.reset()
    comm.finalize()
    return messages


def test_operations_without_a_gradient_say_so(rank_pool: Pool) -> None:
    for maximum, gather, scatter in rank_pool(2).run(without_gradient, backend=None, timeout_s=120):
        assert "all_reduce with MAX has no gradient here: SUM, AVG and PREMUL_SUM have one" in maximum
        assert "gather has no gradient: ranks whose tensors are not read, or not written" in gather
        assert "scatter has no gradient" in scatter


def guarded(rank: int, world_size: int) -> list[int]:
    """One compiled function, two communicators of different sizes: sizes are constants of a graph."""
    from hxcomm.torchcomms import ReduceOp

    comm = communicator()
    part = comm.split([rank], f"part{rank}")

    def step(over: Any, x: Tensor) -> Tensor:
        over.all_reduce(x, ReduceOp.SUM, False)
        return x * over.get_size()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = [int(compiled(each, torch.ones(1)).item()) for each in (comm, part, comm)]
    torch._dynamo.reset()
    part.finalize()
    comm.finalize()
    return found


def test_another_communicator_gets_its_own_graph_where_its_size_differs(rank_pool: Pool) -> None:
    assert rank_pool(2).run(guarded, backend=None, timeout_s=120) == [[4, 1, 4]] * 2


def fails(rank: int, world_size: int) -> str:
    from hxcomm.torchcomms import ReduceOp, Timeout

    comm = communicator()

    def step(x: Tensor) -> Tensor:
        comm.all_reduce(x, ReduceOp.SUM, False, timeout=Timeout(seconds=0.3))
        return x + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    comm.barrier(False)
    try:
        if rank == 0:
            compiled(torch.ones(2))
        else:
            comm.recv(torch.empty(1), 0, False, timeout=timedelta(seconds=20))
    except Exception as error:
        return type(error).__name__
    return ""


def test_an_error_of_the_communicator_leaves_a_compiled_function_as_itself(rank_pool: Pool) -> None:
    assert rank_pool(2).run(fails, backend=None, timeout_s=120) == ["CommTimeoutError", "CommTimeoutError"]
