"""The device hx, step by step. 5: random numbers are those of CPU, and can be repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

DRAWS: dict[str, Callable[[str], torch.Tensor]] = {
    "rand": lambda device: torch.rand(1000, device=device),
    "randn": lambda device: torch.randn(1000, device=device),
    "few of randn": lambda device: torch.randn(3, device=device),
    "randint": lambda device: torch.randint(100, (50,), device=device),
    "randperm": lambda device: torch.randperm(50, device=device),
    "bernoulli": lambda device: torch.bernoulli(torch.full((50,), 0.3, device=device)),
    "multinomial": lambda device: torch.multinomial(torch.ones(20, device=device), 5),
    "exponential_": lambda device: torch.empty(50, device=device).exponential_(),
    "dropout": lambda device: F.dropout(torch.ones(50, device=device), 0.4),
    "normal": lambda device: torch.normal(torch.zeros(50, device=device), 2.0),
    "rand_like": lambda device: torch.rand_like(torch.ones(50, device=device)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_seed_gives_the_numbers_of_cpu(name: str) -> None:
    draw = DRAWS[name]
    for seed in (1, 2):
        torch.manual_seed(seed)
        ours = [draw("hx"), draw("hx")]
        torch.manual_seed(seed)
        theirs = [draw("cpu"), draw("cpu")]
        assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


def test_drawing_on_hx_leaves_the_numbers_of_cpu_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    for draw in DRAWS.values():
        draw("hx")
    assert torch.rand(5).equal(expected)


@pytest.mark.parametrize("name", DRAWS)
def test_a_state_goes_back_to_where_it_was_taken(name: str) -> None:
    torch.manual_seed(4)
    DRAWS[name]("hx")
    state = torch.hx.get_rng_state()
    first = DRAWS[name]("hx")
    torch.hx.set_rng_state(state)
    assert DRAWS[name]("hx").equal(first)


def test_a_state_is_a_seed_and_an_offset_that_another_process_can_go_to() -> None:
    torch.manual_seed(5)
    torch.rand(5000, device="hx")
    state = torch.hx.get_rng_state()
    assert state.dtype == torch.uint8
    assert state.view(torch.int64).tolist() == [5, 5000]
    expected = torch.rand(10, device="hx")
    fresh = torch.Generator(device="hx")  # knows nothing of that state
    fresh.set_state(state)
    assert torch.rand(10, device="hx", generator=fresh).equal(expected)


def test_generators_are_independent_and_belong_to_their_chip() -> None:
    generator = torch.Generator(device="hx").manual_seed(6)
    torch.manual_seed(6)
    expected = torch.randn(20)
    torch.manual_seed(7)
    assert torch.randn(20, device="hx", generator=generator).cpu().equal(expected)
    with pytest.raises(RuntimeError, match="Expected a 'hx' device type for generator but found 'cpu'"):
        torch.randn(3, device="hx", generator=torch.Generator())
    torch.hx.manual_seed_all(8)
    assert torch.rand(3, device="hx:1").cpu().equal(torch.rand(3, device="hx:2").cpu())
    assert torch.hx.initial_seed(4) == 8


def test_fork_rng_gives_the_state_back() -> None:
    torch.manual_seed(9)
    with torch.random.fork_rng(devices=[0], device_type="hx"):
        inside = torch.rand(3, device="hx")
    assert torch.rand(3, device="hx").equal(inside)
