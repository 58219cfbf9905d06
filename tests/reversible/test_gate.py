"""Whether a coupling can be run backwards is measured, and the stage acts on it."""

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import (
    Coupling,
    reconstruction_errors,
    rewire,
    set_coupling,
    set_reversible,
    stage_modes,
    watch,
)
from re2tal.reversible.branches import split
from re2tal.reversible.coupling import TOLERANCE, Settings
from re2tal.reversible.step import Step
from re2tal.reversible.watch import reconstruction_error
from tests.reversible.test_families import scrambled
from tests.reversible.toy_blocks import MlpBlock, PairBlock, one_step
from tests.reversible.zoo import ZOO, features


def blocks(depth: int, dtype: torch.dtype = torch.float32, width: int = 16) -> list[MlpBlock]:
    torch.manual_seed(0)
    return [MlpBlock(width).to(dtype) for _ in range(depth)]


def stage(depth: int) -> nn.Sequential:
    """On float streams."""
    model = nn.Sequential(*blocks(depth))
    rewire(model, exact=False)
    return model


def points(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(32, 16, dtype=dtype)


def mode(model: nn.Module) -> str:
    (found,) = stage_modes(model).values()
    return found


# The number


def measured(chain: list[MlpBlock], x: Tensor, alpha: float, beta: float) -> float:
    settings = Settings(coupling=Coupling(alpha=alpha, beta=beta))
    steps = [Step(branch, "", x.dtype, settings) for b in chain for branch in split(b)]
    return reconstruction_error(steps, x, settings)


@torch.no_grad()
def there_and_back(
    chain: list[MlpBlock], x: Tensor, alpha: float, beta: float, *, noise: float = 0.0
) -> float:
    """The equations, one line each; the error of what comes back."""
    previous, current = x, x
    for block in chain:
        following = block.branch(current) + alpha * current + beta * previous
        previous, current = current, following
    current = current * (1 + noise * torch.randn_like(current))
    previous = previous * (1 + noise * torch.randn_like(previous))
    for block in reversed(chain):
        before = (current - block.branch(previous) - alpha * previous) / beta
        previous, current = before, previous
    return float(max((current - x).norm(), (previous - x).norm()) / x.norm())


COUPLINGS = [(0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.0, 0.4), (0.9, 0.3)]


@pytest.mark.parametrize(("alpha", "beta"), COUPLINGS)
@pytest.mark.parametrize("depth", [4, 12])
def test_the_error_is_that_of_the_equations(alpha: float, beta: float, depth: int) -> None:
    """Rounding is chaotic, so that only its size can be compared: over 15 orders of magnitude."""
    for dtype in (torch.float32, torch.float64):
        chain, x = blocks(depth, dtype), points(dtype)
        found = measured(chain, x, alpha, beta)
        assert 1 / 4 < found / there_and_back(chain, x, alpha, beta) < 4


@pytest.mark.parametrize(("alpha", "beta"), COUPLINGS)
@pytest.mark.parametrize("depth", [4, 12])
def test_the_error_of_float32_is_a_relative_rounding_amplified(
    alpha: float, beta: float, depth: int
) -> None:
    """In float64 with noise of the size of float32's rounding put in by hand, at the end only."""
    found = measured(blocks(depth), points(), alpha, beta)
    expected = there_and_back(
        blocks(depth, torch.float64), points(torch.float64), alpha, beta, noise=2.0**-25
    )
    assert 1 / 8 < found / expected < 8


def test_an_error_beyond_all_numbers() -> None:
    assert measured(blocks(60), points(), 0.0, 0.01) == math.inf


def test_half_precision_inside_the_branches_is_measured_with_them() -> None:
    """Branches that compute in bfloat16 repeat the same bits, but react to the last one."""
    chain, x = blocks(12), points()
    full = measured(chain, x, 0.3, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        half = measured(chain, x, 0.3, 0.7)
    assert half > 10 * full


# What follows from it


def test_a_stage_is_stored_while_the_error_is_too_large_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = stage(24), points()
    with caplog.at_level(logging.INFO, logger="re2tal"):
        for alpha, beta in [(0.9, 0.1), (0.9, 0.1), (0.02, 0.98), (0.02, 0.98), (0.0, 1.0)]:
            set_coupling(model, alpha=alpha, beta=beta)
            model(x)
            modes = mode(model)
            assert modes.startswith("stored: rebuilding would be off by") == (beta < 0.5), modes
            assert modes == "reversible" or modes.endswith("more than 1e-03")
    assert [r.levelno for r in caplog.records] == [logging.INFO] * 2
    stored, rebuilt = caplog.messages
    assert "0…23: stored: rebuilding would be off by" in stored
    assert stored.endswith("(alpha=0.9, beta=0.1)")
    assert rebuilt == "0…23: reversible (alpha=0.02, beta=0.98)"


def test_the_number_is_the_error() -> None:
    model, x = stage(24), points()
    set_coupling(model, alpha=0.5, beta=0.5)
    model(x)
    found = measured(blocks(24), x, 0.5, 0.5)
    assert found > TOLERANCE
    assert f"{found:.1e}" in mode(model)


@pytest.mark.parametrize(
    ("alpha", "beta", "rebuilds"),
    [(0.9, 0.1, False), (0.5, 0.5, False), (0.1, 0.9, True), (0.0, 1.0, True)],
)
def test_gradients_are_right_either_way(alpha: float, beta: float, rebuilds: bool) -> None:
    model, x = stage(24), points().requires_grad_()
    set_coupling(model, alpha=alpha, beta=beta)
    found = one_step(model, x)
    assert (mode(model) == "reversible") == rebuilds
    assert (reconstruction_errors(model) != {}) == rebuilds
    model.double()
    y = x.detach().double().requires_grad_()
    set_reversible(model, False)
    truth = one_step(model, y)
    for name, gradient in found.gradients.items():
        other = truth.gradients[name]
        assert gradient is not None
        assert other is not None
        assert (gradient.double() - other).norm() < 2e-3 * other.norm(), name


def test_the_error_of_the_backward_is_the_one_that_was_foretold() -> None:
    model, x = stage(12), points()
    set_coupling(model, alpha=0.2, beta=0.8)
    one_step(model, x)
    foretold = measured(blocks(12), x, 0.2, 0.8)
    assert 1 / 4 < max(reconstruction_errors(model).values()) / foretold < 4


def test_exact_streams_are_stored_unless_beta_is_one() -> None:
    model, x = nn.Sequential(*blocks(2)), points()
    rewire(model, alpha=0.1, beta=0.9)
    model(x)
    assert mode(model) == "stored: exact streams need beta = 1"
    set_coupling(model, alpha=0.1, beta=1.0)
    model(x)
    assert mode(model) == "reversible"
    set_reversible(model, False)
    model(x)
    assert mode(model) == "stored: asked for by set_reversible"


# When it is measured


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Coupling]:
    """The couplings that were tried out."""
    tried: list[Coupling] = []
    real = watch.reconstruction_error

    def noting(steps: list[Step], stream: Tensor, settings: Settings) -> float:
        tried.append(settings.coupling)
        return real(steps, stream, settings)

    monkeypatch.setattr(watch, "reconstruction_error", noting)
    return tried


def test_the_error_is_measured_again_only_for_a_coupling_that_moved(
    measurements: list[Coupling],
) -> None:
    model, x = stage(4), points()
    moves = [(0.5, 0.5), (0.505, 0.495), (0.51, 0.5), (0.4, 0.5), (0.4, 0.6), (0.5, 0.5)]
    for alpha, beta in moves:
        set_coupling(model, alpha=alpha, beta=beta)
        model(x)
        model(x)
    tried = [(c.alpha, c.beta) for c in measurements]
    assert tried == [(0.5, 0.5), (0.4, 0.5), (0.4, 0.6)]


def test_a_small_beta_moves_in_proportion(measurements: list[Coupling]) -> None:
    """From 0.02 to 0.001 is little on the way to 1, but every branch divides errors by beta."""
    model, x = stage(2), points()
    set_coupling(model, alpha=0.0, beta=0.02)
    model(x)
    assert mode(model) == "reversible"
    set_coupling(model, alpha=0.0, beta=0.001)
    model(x)
    assert mode(model).startswith("stored: rebuilding would be off by")
    assert len(measurements) == 2


def test_precision_and_mode_are_measured_apart(measurements: list[Coupling]) -> None:
    model, x = stage(4), points()
    set_coupling(model, alpha=0.2, beta=0.8)
    for _ in range(2):
        model.train()(x)
        model.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    assert len(measurements) == 3


def test_nothing_is_measured_for_what_is_exact_or_needs_no_gradient(
    measurements: list[Coupling],
) -> None:
    model, x = nn.Sequential(*blocks(2)), points()
    for alpha, beta, exact in [(0, 1, True), (0.4, 1, True), (0, 1, False), (1, 0, False)]:
        rewire(model, alpha=alpha, beta=beta, exact=exact)
        model(x)
    rewire(model, alpha=0.5, beta=0.5, exact=False)
    with torch.no_grad():
        model(x)
    assert not measurements


def test_the_measurement_leaves_no_trace(measurements: list[Coupling]) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
    model = nn.Sequential(PairBlock(first, nn.Linear(16, 16)))
    rewire(model, alpha=0.2, beta=0.8, exact=False)
    x = points().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def forward() -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        for name, buffer in model.named_buffers():
            buffer.fill_(1 if name.endswith("var") else 0)
        y = model(x).detach()
        return y, torch.get_rng_state(), *(b.clone() for b in model.buffers())

    with_it, without = forward(), forward()
    assert len(measurements) == 1
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert all(
        torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None
    )
    assert x.grad is None


# The pretrained network itself


@pytest.mark.parametrize("name", ZOO)
def test_one_and_zero_is_the_network_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name](drop=0.2)
    scrambled(model).train()
    inputs = tuple(x.requires_grad_() for x in inputs)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}

    class Tensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *given: Tensor) -> Tensor:
            return features(self.inner(*given))

    outer = Tensors()
    original = one_step(outer, *inputs)
    counted = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model.load_state_dict(before, strict=False)
    rewire(outer, alpha=1.0, beta=0.0)
    found = one_step(outer, *inputs)
    assert torch.equal(found.output, original.output)
    assert torch.equal(found.generator, original.generator)
    assert all(torch.equal(buffer, counted[key]) for key, buffer in model.named_buffers())
    for key, gradient in found.gradients.items():
        other = original.gradients[key]
        assert (gradient is None and other is None) or torch.equal(gradient, other), key  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ZOO)
def test_close_to_one_and_zero_is_close_to_the_network(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    scrambled(model).eval()
    with torch.no_grad():
        original = features(model(*inputs))
        rewire(model, alpha=1.0, beta=1e-4, exact=False)
        near = features(model(*inputs))
        rewire(model, alpha=0.0, beta=1.0, exact=False)
        far = features(model(*inputs))
    near, far, size = (y.double().norm() for y in (near - original, far - original, original))
    assert near < 2e-3 * size < size < math.inf
    assert far > 2e-2 * size


def test_a_coupling_is_tried_out_again_when_its_stage_gets_worse() -> None:
    """The weights move on while alpha and beta stay."""
    model, x = stage(12), points()
    set_coupling(model, alpha=0.3, beta=0.7)
    one_step(model, x)
    assert mode(model) == "reversible"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    modes = []
    for _ in range(2):
        one_step(model, x)
        modes.append(mode(model))
    assert max(reconstruction_errors(model).values()) > 1e-3
    assert modes[0] == "reversible"  # what the step before had measured
    assert modes[1].startswith("stored")


def test_an_input_of_zeros_says_nothing_against_a_coupling() -> None:
    model = stage(12)
    set_coupling(model, alpha=0.1, beta=0.9)
    model(torch.zeros_like(points()))
    assert mode(model) == "reversible"
