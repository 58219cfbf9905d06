"""The grid: its points, what it holds exactly, and how it is chosen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.reversible.coupling import FINEST, HEADROOM, Coupling, Grid

finite = st.floats(-100, 100, width=32)


@settings(deadline=None, max_examples=50)
@given(x=st.lists(finite, min_size=1, max_size=8), bits=st.integers(0, 20))
def test_rounding_is_to_the_nearest_multiple(x: list[float], bits: int) -> None:
    values = torch.tensor(x)
    found = Grid.of(bits, values).round(values).double()
    steps = found * 2**bits
    assert torch.equal(steps, steps.round())
    # Beyond 2^24 steps float32 has no finer numbers, and nothing is rounded.
    assert (found - values.double()).abs().max() <= 2.0 ** -(bits + 1)


@pytest.mark.parametrize("size", [1e-12, 3e-3, 0.5, 0.999999, 1.0, 4.0, 1e4, 1e12])
def test_auto_leaves_room_and_holds_the_input(size: float) -> None:
    x = torch.linspace(-size, size / 2, 101)
    grid = Grid.of("auto", x)
    limit, spacing = float(grid.limit), float(grid.spacing)
    least = 2.0 ** (24 - FINEST)
    assert max(2**HEADROOM * size, least - 1) < limit <= max(2 ** (HEADROOM + 1) * size, least)
    assert limit / spacing == 2**24
    assert spacing * float(grid.scale) == 1
    assert float((grid.round(x) - x).abs().max()) <= max(size * 2.0**-16, 2.0 ** -(FINEST + 1))


def test_auto_of_nothing_and_of_what_is_not_finite() -> None:
    assert float(Grid.of("auto", torch.zeros(3)).limit) == 2.0 ** (24 - FINEST)
    for value in (float("inf"), float("nan")):
        x = torch.tensor([1.0, value])
        assert not Grid.of("auto", x).round(x)[1].isfinite()


@settings(deadline=None, max_examples=50)
@given(
    x=st.lists(finite, min_size=3, max_size=3),
    increments=st.lists(finite, min_size=1, max_size=20),
    bits=st.sampled_from(["auto", 10, 13]),
)
def test_the_way_back_is_exact(x: list[float], increments: list[float], bits: int | str) -> None:
    start = torch.tensor(x) + 8  # large enough for "auto" to hold what is added
    grid = Grid.of(bits, start)  # type: ignore[arg-type]
    coupling = Coupling()
    first = previous = current = grid.round(start)
    steps = [grid.round(torch.full((3,), value)) for value in increments]
    for step in steps:
        current, previous = coupling.advance(step, previous), current
        if float(current.abs().max()) >= float(grid.limit):
            return  # such a stream is refused
    for step in reversed(steps):
        current, previous = previous, coupling.rewind(step, current)
    assert torch.equal(current, first)
    assert torch.equal(previous, first)


def test_the_gradient_is_the_identity() -> None:
    x = torch.randn(5, requires_grad=True)
    grid = Grid.of("auto", x)
    gradient = torch.randn(5)
    (found,) = torch.autograd.grad(grid.round(x), x, gradient)
    assert torch.equal(found, gradient)
