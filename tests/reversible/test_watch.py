"""Nothing trains silently on wrong activations: what the checks find, and what they leave alone."""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import (
    Branch,
    ReversibleError,
    branches,
    check,
    reconstruction_errors,
    reversible_stages,
    rewire,
    set_coupling,
    set_reversible,
)
from tests.reversible.toy_blocks import MlpBlock, assert_reversible_is_stored, one_step


class Stage(nn.Module):
    """A stage inside a model, so that it has a name, and a last layer that always trains."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.stem(x)))
        return result


class Dishonest(MlpBlock):
    """Adds what no replay can repeat, as large as `size`."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.size = size

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x) + self.size * random.random()


@branches.register
def _dishonest(block: Dishonest) -> list[Branch]:
    return [Branch("mlp", (block.norm, block.one, block.two, block.drop), block.branch)]


class Shift(nn.Module):
    """A block with a constant branch, for streams as large as wanted."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def branch(self, x: Tensor) -> Tensor:
        return self.by.expand_as(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


@branches.register
def _shift(block: Shift) -> list[Branch]:
    return [Branch("shift", (block,), block.branch)]


def honest(depth: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [MlpBlock() for _ in range(depth)]


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 6)


def backward(model: nn.Module) -> None:
    model(points()).square().sum().backward()


# The grid


def test_a_stream_that_outgrows_the_grid() -> None:
    model = Stage(*(Shift(600.0) for _ in range(3)))  # x_3 is x_0 and twice the shift
    rewire(model, grid=14)
    with pytest.raises(ReversibleError, match=r"blocks\.0…2: .*reached 120\d, .*grid=11"):
        backward(model)
    rewire(model, grid=11)
    backward(model)


def test_a_stream_that_outgrows_the_input_by_which_its_grid_was_chosen() -> None:
    model = Stage(*(Shift(300.0) for _ in range(3)))
    rewire(model)
    model(points().sign() * 10)
    with pytest.raises(ReversibleError, match=r"reached 60\d.*, beyond the 512 .*grid=12\)"):
        model(points().sign())


def test_a_stream_that_comes_back_before_the_end() -> None:
    """Only the middle of the stage is too large, which the ends do not show."""
    model = Stage(*(Shift(s) for s in (0.0, 1500.0, 0.0, -1500.0, 0.0)))
    rewire(model, grid=14)
    with pytest.raises(ReversibleError, match="beyond the 1024 that its grid"):
        model(points())


def test_an_input_that_is_too_large_already() -> None:
    model = nn.Sequential(*honest())
    rewire(model, grid=14)
    with pytest.raises(ReversibleError, match=r"^0…3: a stream reached 5000"):
        model(torch.full((2, 6), 5000.0))
    rewire(model)
    backward(model)
    model(torch.full((2, 6), 5000.0)).sum().backward()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_no_matter_of_the_grid(value: float) -> None:
    """Loss scaling expects them now and then, and skips the step."""
    model = Stage(*honest())
    rewire(model)
    x = points()
    x[0, 0] = value
    loss = model(x).sum()
    loss.backward()
    check(model)
    assert not loss.isfinite()


def test_float_streams_have_no_such_limit() -> None:
    model = Stage(Shift(6000.0), Shift(6000.0))
    rewire(model, exact=False)
    backward(model)
    check(model)


# What was rebuilt


def test_honest_branches_pass() -> None:
    model = Stage(*honest())
    rewire(model)
    backward(model)
    check(model)
    assert set(reconstruction_errors(model).values()) == {0.0}


@pytest.mark.parametrize("place", range(5))
def test_a_branch_that_cannot_be_repeated_is_found_wherever_it_is(place: int) -> None:
    blocks = honest(5)
    blocks[place] = Dishonest()
    model = Stage(*blocks)
    rewire(model)
    loss = model(points()).sum()
    with pytest.raises(ReversibleError, match=r"blocks\.0…4: the rebuilt input is not the one"):
        loss.backward()


def test_a_single_bit_is_found() -> None:
    blocks = honest(3)
    blocks[1] = Dishonest(2.0**-13)
    model = Stage(*blocks)
    rewire(model)
    random.seed(0)
    x = points()[:1]
    loss = model(x).sum()
    with pytest.raises(ReversibleError, match="not deterministic"):
        loss.backward()


def test_only_the_stage_with_the_mistake_is_named() -> None:
    model = nn.Sequential(Stage(*honest()), Stage(*honest(2), Dishonest()), Stage(*honest()))
    rewire(model)
    loss = model(points()).sum()
    with pytest.raises(ReversibleError, match=r"^1\.blocks\.0…2:"):
        loss.backward()


def test_a_mistake_that_the_gradients_would_not_show() -> None:
    """Above a frozen part nothing else depends on the rebuilt streams."""
    model = Stage(Dishonest(), *honest(2))
    model.stem.requires_grad_(False)
    rewire(model)
    loss = model(points()).sum()
    with pytest.raises(ReversibleError, match="rebuilt input"):
        loss.backward()


@pytest.mark.parametrize("frozen", range(1, 4))
def test_a_frozen_bottom_is_compared_where_the_tape_ends(frozen: int) -> None:
    """The frozen branches below are not rebuilt, and theirs is no mistake."""
    blocks = honest(4)
    blocks[0] = Dishonest()
    model = Stage(*blocks)
    model.stem.requires_grad_(False)
    for block in blocks[:frozen]:
        block.requires_grad_(False)
    rewire(model)
    backward(model)
    check(model)
    assert set(reconstruction_errors(model).values()) == {0.0}
    model.blocks[frozen] = Dishonest()
    rewire(model)
    loss = model(points()).sum()
    with pytest.raises(ReversibleError, match="rebuilt input"):
        loss.backward()


def test_without_checks() -> None:
    model = Stage(*honest(2), Dishonest())
    rewire(model, verify=False)
    backward(model)
    check(model)
    assert reconstruction_errors(model) == {}


@pytest.mark.parametrize("exact", [True, False])
def test_the_checks_change_no_gradient(exact: bool) -> None:
    model, steps = Stage(*honest()), []
    for verify in (True, False):
        rewire(model, verify=verify, exact=exact)
        steps.append(one_step(model, points()))
    first, second = steps
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        assert (gradient is None and other is None) or torch.equal(gradient, other)  # type: ignore[arg-type]


def test_what_changed_since_the_forward() -> None:
    """An attribute that no version counter watches."""
    model = Stage(*honest(), Shift(1.0))
    block = Dishonest(0.0)
    model.blocks.append(block)
    rewire(model)
    loss = model(points()).sum()
    block.size = 1.0
    with pytest.raises(ReversibleError, match="changed since its forward"):
        loss.backward()


def test_a_mistake_is_told_once() -> None:
    model = Stage(*honest(2), Dishonest())
    rewire(model)
    loss = model(points()).sum()
    with pytest.raises(ReversibleError):
        loss.backward()
    check(model)
    model.blocks[2] = MlpBlock()
    rewire(model)
    backward(model)
    check(model)


# Floating-point streams


@pytest.mark.parametrize(("block", "low", "high"), [(MlpBlock, 0.0, 1e-6), (Dishonest, 0.05, 10.0)])
def test_in_floating_point_the_error_is_a_number(
    block: Callable[[], nn.Module], low: float, high: float
) -> None:
    model = Stage(*honest(3), block(), *honest(3))
    rewire(model, exact=False)
    assert reconstruction_errors(model) == {}
    random.seed(0)
    backward(model)
    check(model)
    assert low <= max(reconstruction_errors(model).values()) <= high


def test_the_error_is_that_of_the_input() -> None:
    """A constant that differs by a known amount from run to replay."""
    block = Shift(0.0)
    model = nn.Sequential(block)
    rewire(model, exact=False)
    x = points()
    loss = model(x).sum()
    block.by.data = torch.tensor(0.25)  # .data goes around the version counter
    loss.backward()
    # x_1 and x_0 are compared at the bottom of the tape: x_0 is at hand, x_{-1} off by the change.
    expected = 0.25 * x.numel() ** 0.5 / x.norm()
    assert max(reconstruction_errors(model).values()) == pytest.approx(float(expected), rel=1e-5)


def test_the_stages_of_every_container_have_a_number() -> None:
    model = nn.Sequential(Stage(*honest()), Stage(*honest(2), Dishonest()))
    rewire(model, exact=False)
    backward(model)
    errors = reconstruction_errors(model)
    assert errors["0.blocks.0…3"] < 1e-6 < 0.01 < errors["1.blocks.0…2"]


def test_every_stage_of_a_container_has_a_number_of_its_own() -> None:
    model = nn.Sequential(*honest(2), nn.Linear(6, 6), Dishonest(), *honest(1))
    rewire(model, exact=False)
    backward(model)
    errors = reconstruction_errors(model)
    assert errors["0…1"] < 1e-6 < 0.01 < errors["3…4"]


# Copies and modes


def test_check_passes_where_nothing_ran() -> None:
    model = Stage(*honest())
    check(model)
    rewire(model)
    check(model)
    with torch.no_grad():
        model(points())
    check(model)
    assert reconstruction_errors(model) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_starts_without_verdicts(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Stage(*honest())
    rewire(model, exact=False)
    backward(model)
    twin = copied(model)
    assert reconstruction_errors(model)
    assert not reconstruction_errors(twin)
    for _, stage in reversible_stages(twin):
        assert not stage.watch.modes
    set_coupling(twin, alpha=0.1, beta=1.0)
    backward(twin)
    assert reconstruction_errors(twin)
    # A graph that is still alive belongs to the original.
    loss = model(points()).sum()
    copied(model)
    loss.backward()


def test_stored_activations_are_not_compared() -> None:
    model = Stage(*honest(2), Dishonest())
    rewire(model)
    set_reversible(model, False)
    backward(model)
    check(model)
    assert reconstruction_errors(model) == {}


def test_half_of_a_backward_is_not_compared() -> None:
    """Gradients of the last block only: the tape stays in the middle."""
    model = Stage(*honest(4))
    rewire(model)
    loss = model(points()).sum()
    torch.autograd.grad(loss, list(model.blocks[3].parameters()))
    check(model)
    assert_reversible_is_stored(model, points())
