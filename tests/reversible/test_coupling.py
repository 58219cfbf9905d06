"""The equations of a coupling, the grid that makes them exact, and the schedule of couplings."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.reversible import (
    CouplingSchedule,
    reversible_stages,
    rewire,
    set_reversible,
    stage_modes,
)
from re2tal.reversible.coupling import FINEST, HEADROOM, Coupling, Grid, stream_dtype
from tests.reversible.toy_blocks import assert_same_step, one_step, tiny_swin


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.6, 0.0), (0.5, 0.25), (0.0, 1.0)])
def test_a_step_the_merge_and_its_gradient(alpha: float, beta: float) -> None:
    coupling = Coupling(alpha=alpha, beta=beta)
    assert coupling.invertible == (beta != 0)
    branch, current, previous = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    following = coupling.advance(coupling.increment(branch, current), previous)
    torch.testing.assert_close(following, branch + alpha * current + beta * previous)
    merged = coupling.merge(following, current)
    torch.testing.assert_close(merged, (following + beta * current) / (1 + beta))
    (share,) = torch.autograd.grad(merged.sum(), following)
    torch.testing.assert_close(share, torch.full_like(share, coupling.share))


@pytest.mark.parametrize(
    ("alpha", "beta"), [(math.nan, 1), (0, math.inf), (0, -0.5), (math.inf, 1)]
)
def test_impossible_coefficients_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Coupling(alpha=alpha, beta=beta)


def test_streams_are_at_least_float32() -> None:
    assert stream_dtype(torch.bfloat16) == stream_dtype(torch.float16) == torch.float32
    assert stream_dtype(torch.float32) == torch.float32
    assert stream_dtype(torch.float64) == torch.float64


# The grid


finite = st.floats(-100, 100, width=32)


@settings(deadline=None, max_examples=50)
@given(x=st.lists(finite, min_size=1, max_size=8), bits=st.integers(0, 20))
def test_rounding_is_to_the_nearest_multiple(x: list[float], bits: int) -> None:
    values = torch.tensor(x)
    found = Grid.of(bits, values).round(values).double()
    steps = found * 2**bits
    assert torch.equal(steps, steps.round())
    # Beyond 2^24 grid steps float32 has no finer numbers, so nothing is rounded.
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
    start = torch.tensor(x) + 8  # large enough that the grid of "auto" holds the sums
    grid = Grid.of(bits, start)  # type: ignore[arg-type]
    coupling = Coupling()
    first = previous = current = grid.round(start)
    steps = [grid.round(torch.full((3,), value)) for value in increments]
    for step in steps:
        current, previous = coupling.advance(step, previous), current
        if float(current.abs().max()) >= float(grid.limit):
            return  # a stage refuses such a stream
    for step in reversed(steps):
        current, previous = previous, current - step
    assert torch.equal(current, first)
    assert torch.equal(previous, first)


def test_the_gradient_is_the_identity() -> None:
    x = torch.randn(5, requires_grad=True)
    grid = Grid.of("auto", x)
    gradient = torch.randn(5)
    (found,) = torch.autograd.grad(grid.round(x), x, gradient)
    assert torch.equal(found, gradient)


# Dr2Net's schedule from the pretrained network to a reversible one


def test_a_straight_line_from_the_pretrained_network_to_re2tal() -> None:
    schedule = CouplingSchedule(steps=4)
    couplings = [schedule.at(step) for step in range(7)]
    assert [c.alpha for c in couplings] == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert [c.beta for c in couplings] == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_ends_of_ones_own() -> None:
    schedule = CouplingSchedule(
        steps=10, start=Coupling(alpha=1.0, beta=0.1), end=Coupling(alpha=0.3, beta=0.7)
    )
    assert schedule.at(0) == schedule.start
    assert schedule.at(99) == schedule.end
    assert schedule.at(5).alpha == pytest.approx(0.65)
    assert schedule.at(5).beta == pytest.approx(0.4)
    with pytest.raises(ValueError, match="at least 1 step"):
        CouplingSchedule(steps=0)


def test_a_model_under_the_schedule(caplog: pytest.LogCaptureFixture) -> None:
    """Starts as the pretrained network, ends reversible, and has right gradients at every step."""
    torch.manual_seed(0)
    model, x = tiny_swin((3, 2), drop_path=0.2), torch.randn(2, 3, 4, 32, 32)
    truth = one_step(model, x)
    rewire(model, exact=False)
    schedule = CouplingSchedule(steps=5)
    modes = []
    with caplog.at_level(logging.INFO, logger="re2tal"):
        for step in range(7):
            assert schedule.apply(model, step) == schedule.at(step)
            assert {s.settings.coupling for _, s in reversible_stages(model)} == {schedule.at(step)}
            found = one_step(model, x)
            modes.append(stage_modes(model)["features.0.0…2"])
            set_reversible(model, False)
            stored = one_step(model, x)
            set_reversible(model, True)
            assert_same_step(found, stored, tolerance=1e-2)
            if step == 0:
                assert torch.equal(found.output, truth.output)
    assert modes[0].startswith("stored")
    assert modes[-1] == "reversible"
    assert any("features.0.0…2: reversible" in message for message in caplog.messages)
