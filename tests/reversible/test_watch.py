"""Checks of rebuilt streams, and the measurement that decides whether a stage is reversible."""

import logging
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import (
    Branch,
    Coupling,
    ReversibleError,
    branches,
    check,
    reconstruction_errors,
    rewire,
    set_coupling,
    set_reversible,
    stage_modes,
    watch,
)
from re2tal.reversible.branches import split
from re2tal.reversible.coupling import Settings
from re2tal.reversible.step import Step
from re2tal.reversible.watch import _bits, reconstruction_error
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    assert_equal_gradients,
    assert_reversible_is_stored,
    assert_same_step,
    one_step,
    points,
    stack,
)
from tests.reversible.zoo import ZOO, built, every_model, features, scrambled


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
    """Branch that adds values of size `size` which no replay can repeat."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.size = size

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x) + self.size * random.random()


@branches.register
def _dishonest(block: Dishonest) -> list[Branch]:
    return [Branch("mlp", (block.norm, block.one, block.two, block.drop), block.branch)]


class Shift(nn.Module):
    """A block with a constant branch, for streams of any size."""

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


def backward(model: nn.Module) -> None:
    model(points()).square().sum().backward()


# The grid


@pytest.mark.parametrize(
    ("shifts", "message"),
    [
        # x_3 = x_0 + 2 shift
        ([600.0] * 3, r"blocks\.0…2: .*reached 120\d, .*grid=11"),
        # only the middle of the stage is too large; its ends do not show it
        ([0.0, 1500.0, 0.0, -1500.0, 0.0], "beyond the 1024 that its grid"),
    ],
)
def test_a_stream_that_outgrows_the_grid(shifts: list[float], message: str) -> None:
    model = Stage(*(Shift(by) for by in shifts))
    rewire(model, grid=14)
    with pytest.raises(ReversibleError, match=message):
        backward(model)
    rewire(model, grid=11)
    backward(model)


def test_a_stream_that_outgrows_the_input_by_which_its_grid_was_chosen() -> None:
    model = Stage(*(Shift(300.0) for _ in range(3)))
    rewire(model)
    model(points().sign() * 10)
    with pytest.raises(ReversibleError, match=r"reached 60\d.*, beyond the 512 .*grid=12\)"):
        model(points().sign())


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
    """Gradient scaling expects infinities now and then, and skips the step."""
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


# Rebuilt streams


def assert_found(model: nn.Module, message: str, change: Callable[[], None] | None = None) -> None:
    """Rewire, and check that the backward raises an error."""
    rewire(model)
    random.seed(0)
    loss = model(points()).sum()
    if change is not None:
        change()
    with pytest.raises(ReversibleError, match=message):
        loss.backward()


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("size", [1.0, 2.0**-13])  # 2^-13 changes single bits
def test_a_branch_that_cannot_be_repeated_is_found_wherever_it_is(place: int, size: float) -> None:
    blocks = honest(5)
    blocks[place] = Dishonest(size)
    message = r"blocks\.0…4: the rebuilt input is not the one(.|\n)*not deterministic"
    assert_found(Stage(*blocks), message)


def test_only_the_stage_with_the_mistake_is_named() -> None:
    model = nn.Sequential(Stage(*honest()), Stage(*honest(2), Dishonest()), Stage(*honest()))
    assert_found(model, r"^1\.blocks\.0…2:")


def test_a_mistake_that_the_gradients_would_not_show() -> None:
    """Above a frozen part nothing but the check depends on the rebuilt streams."""
    model = Stage(Dishonest(), *honest(2))
    model.stem.requires_grad_(False)
    assert_found(model, "rebuilt input")


@pytest.mark.parametrize("frozen", range(1, 4))
def test_a_frozen_bottom_is_compared_where_the_tape_ends(frozen: int) -> None:
    """The frozen branches below are not replayed, so their difference is no error."""
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
    assert_found(model, "rebuilt input")


@pytest.mark.parametrize("last", [False, True])
def test_bits_are_summed_in_parts_and_none_is_left_out(
    last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's sum() would first copy all of them to int64."""
    kind = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=kind)
    whole = _bits(x)
    monkeypatch.setattr("re2tal.reversible.watch._AT_ONCE", 16)
    assert _bits(x) == whole
    for place in ((0, 0, 0, 0), (1, 2, 4, 6), (1, 0, 3, 2)):
        changed = x.clone()
        changed[place] = torch.nextafter(x[place], x[place] + 1)
        assert _bits(changed) != whole


@pytest.mark.parametrize("exact", [True, False])
def test_the_checks_change_no_gradient(exact: bool) -> None:
    model, steps = Stage(*honest()), []
    for verify in (True, False):
        rewire(model, verify=verify, exact=exact)
        steps.append(one_step(model, points()))
    assert_equal_gradients(*steps)


def test_a_change_since_the_forward_is_found_and_told_once() -> None:
    """Changes an attribute that has no version counter."""
    block = Dishonest(0.0)
    model = Stage(*honest(), block)
    assert_found(model, "changed since its forward", lambda: setattr(block, "size", 1.0))
    check(model)
    block.size = 0.0
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
    """Branch of a constant that differs by a known amount between forward and replay."""
    block = Shift(0.0)
    model = nn.Sequential(block)
    rewire(model, exact=False)
    x = points()
    loss = model(x).sum()
    block.by.data = torch.tensor(0.25)  # .data bypasses the version counter
    loss.backward()
    # At the bottom of the tape x_0 and x_{-1} are compared: x_0 is exact, x_{-1} off by the change.
    expected = 0.25 * x.numel() ** 0.5 / x.norm()
    assert max(reconstruction_errors(model).values()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("containers", [1, 2])
def test_every_stage_has_a_number_of_its_own(containers: int) -> None:
    names = {1: ("0…1", "3…4"), 2: ("0.blocks.0…3", "1.blocks.0…2")}
    if containers == 2:
        model = nn.Sequential(Stage(*honest()), Stage(*honest(2), Dishonest()))
    else:
        model = nn.Sequential(*honest(2), nn.Linear(6, 6), Dishonest(), *honest(1))
    rewire(model, exact=False)
    backward(model)
    good, bad = names[containers]
    errors = reconstruction_errors(model)
    assert errors[good] < 1e-6 < 0.01 < errors[bad]


def test_check_passes_where_nothing_ran_and_honest_branches_did() -> None:
    model = Stage(*honest())
    check(model)
    rewire(model)
    check(model)
    with torch.no_grad():
        model(points())
    check(model)
    assert reconstruction_errors(model) == {}
    backward(model)
    check(model)
    assert set(reconstruction_errors(model).values()) == {0.0}


@pytest.mark.parametrize("verify", [True, False])
def test_stored_activations_and_stages_without_checks_are_not_compared(verify: bool) -> None:
    model = Stage(*honest(2), Dishonest())
    rewire(model, verify=verify)
    set_reversible(model, not verify)
    backward(model)
    check(model)
    assert reconstruction_errors(model) == {}


def test_half_of_a_backward_is_not_compared() -> None:
    """With gradients of the last block only, the tape stays in the middle."""
    model = Stage(*honest(4))
    rewire(model)
    loss = model(points()).sum()
    torch.autograd.grad(loss, list(model.blocks[3].parameters()))
    check(model)
    assert_reversible_is_stored(model, points())


# The measurement of a coupling


def blocks(depth: int, dtype: torch.dtype = torch.float32, width: int = 16) -> list[MlpBlock]:
    torch.manual_seed(0)
    return [MlpBlock(width).to(dtype) for _ in range(depth)]


def stage(depth: int) -> nn.Sequential:
    """The same blocks on float streams."""
    return stack(depth, width=16, exact=False)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return points(32, 16).to(dtype)


def mode(model: nn.Module) -> str:
    (found,) = stage_modes(model).values()
    return found


# The measured error


def measured(chain: list[MlpBlock], x: Tensor, alpha: float, beta: float) -> float:
    settings = Settings(coupling=Coupling(alpha=alpha, beta=beta))
    steps = [Step(branch, "", x.dtype, settings) for b in chain for branch in split(b)]
    return reconstruction_error(steps, x)


@torch.no_grad()
def there_and_back(chain: list[MlpBlock], x: Tensor, alpha: float, beta: float) -> float:
    """Run the equations forward and backwards, one line each; return the error."""
    previous, current = x, x
    for block in chain:
        following = block.branch(current) + alpha * current + beta * previous
        previous, current = current, following
    for block in reversed(chain):
        before = (current - block.branch(previous) - alpha * previous) / beta
        previous, current = before, previous
    return float(max((current - x).norm(), (previous - x).norm()) / x.norm())


COUPLINGS = [(0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.0, 0.4), (0.9, 0.3)]


@pytest.mark.parametrize(("alpha", "beta"), COUPLINGS)
@pytest.mark.parametrize("depth", [4, 12])
def test_the_error_is_that_of_the_equations(alpha: float, beta: float, depth: int) -> None:
    """Rounding is chaotic, so only orders of magnitude are compared, over 15 of them."""
    for dtype in (torch.float32, torch.float64):
        chain, x = blocks(depth, dtype), tokens(dtype)
        found = measured(chain, x, alpha, beta)
        assert 1 / 4 < found / there_and_back(chain, x, alpha, beta) < 4


def test_an_error_beyond_all_numbers() -> None:
    assert measured(blocks(60), tokens(), 0.0, 0.01) == math.inf


def test_half_precision_inside_the_branches_is_measured_with_them() -> None:
    """Branches in bfloat16 repeat the same bits, but amplify a change of the last one."""
    chain, x = blocks(12), tokens()
    full = measured(chain, x, 0.3, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        half = measured(chain, x, 0.3, 0.7)
    assert half > 10 * full


# Consequences of the error


def test_a_stage_is_stored_while_the_error_is_too_large_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = stage(24), tokens()
    with caplog.at_level(logging.INFO, logger="re2tal"):
        for alpha, beta in [(0.9, 0.1), (0.9, 0.1), (0.02, 0.98), (0.02, 0.98), (0.0, 1.0)]:
            set_coupling(model, alpha=alpha, beta=beta)
            model(x)
            modes = mode(model)
            assert modes.startswith("stored: rebuilding would be off by") == (beta < 0.5), modes
            assert modes == "reversible" or modes.endswith("more than 1e-03")
            if beta < 0.5:
                assert f"{measured(blocks(24), x, alpha, beta):.1e}" in modes
    assert [r.levelno for r in caplog.records] == [logging.INFO] * 2
    stored, rebuilt = caplog.messages
    assert "0…23: stored: rebuilding would be off by" in stored
    assert stored.endswith("(alpha=0.9, beta=0.1)")
    assert rebuilt == "0…23: reversible (alpha=0.02, beta=0.98)"


@pytest.mark.parametrize(
    ("alpha", "beta", "rebuilds"),
    [(0.9, 0.1, False), (0.5, 0.5, False), (0.1, 0.9, True), (0.0, 1.0, True)],
)
def test_gradients_are_right_either_way(alpha: float, beta: float, rebuilds: bool) -> None:
    model, x = stage(24), tokens().requires_grad_()
    set_coupling(model, alpha=alpha, beta=beta)
    found = one_step(model, x)
    assert (mode(model) == "reversible") == rebuilds
    assert (reconstruction_errors(model) != {}) == rebuilds
    model.double()
    y = x.detach().double().requires_grad_()
    set_reversible(model, False)
    truth = one_step(model, y)
    assert_equal_gradients(found, truth, tolerance=2e-3)


def test_the_error_of_the_backward_is_the_one_that_was_foretold() -> None:
    model, x = stage(12), tokens()
    set_coupling(model, alpha=0.2, beta=0.8)
    one_step(model, x)
    foretold = measured(blocks(12), x, 0.2, 0.8)
    assert 1 / 4 < max(reconstruction_errors(model).values()) / foretold < 4


def test_exact_streams_are_stored_unless_beta_is_one() -> None:
    model, x = nn.Sequential(*blocks(2)), tokens()
    rewire(model, alpha=0.1, beta=0.9)
    model(x)
    assert mode(model) == "stored: exact streams need beta = 1"
    set_coupling(model, alpha=0.1, beta=1.0)
    model(x)
    assert mode(model) == "reversible"
    set_reversible(model, False)
    model(x)
    assert mode(model) == "stored: asked for by set_reversible"


# When the error is measured


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Coupling]:
    """The couplings that were measured."""
    tried: list[Coupling] = []
    real = watch.reconstruction_error

    def noting(steps: list[Step], stream: Tensor) -> float:
        tried.append(steps[0].coupling)
        return real(steps, stream)

    monkeypatch.setattr(watch, "reconstruction_error", noting)
    return tried


def test_the_error_is_measured_again_only_for_a_coupling_that_moved(
    measurements: list[Coupling],
) -> None:
    model, x = stage(4), tokens()
    moves = [(0.5, 0.5), (0.505, 0.495), (0.51, 0.5), (0.4, 0.5), (0.4, 0.6), (0.5, 0.5)]
    for alpha, beta in moves:
        set_coupling(model, alpha=alpha, beta=beta)
        model(x)
        model(x)
    tried = [(c.alpha, c.beta) for c in measurements]
    assert tried == [(0.5, 0.5), (0.4, 0.5), (0.4, 0.6)]


def test_a_small_beta_moves_in_proportion(measurements: list[Coupling]) -> None:
    """From 0.02 to 0.001 is a small step for beta, but every branch divides errors by it."""
    model, x = stage(2), tokens()
    set_coupling(model, alpha=0.0, beta=0.02)
    model(x)
    assert mode(model) == "reversible"
    set_coupling(model, alpha=0.0, beta=0.001)
    model(x)
    assert mode(model).startswith("stored: rebuilding would be off by")
    assert len(measurements) == 2


def test_precision_and_mode_are_measured_apart(measurements: list[Coupling]) -> None:
    model, x = stage(4), tokens()
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
    model, x = nn.Sequential(*blocks(2)), tokens()
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
    x = tokens().requires_grad_()
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


# The pretrained network itself: (alpha, beta) = (1, 0)


@every_model
def test_one_and_zero_is_the_network_as_it_was(name: str) -> None:
    model, inputs = built(name, bf16=False)
    scrambled(model)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    original = one_step(model, *inputs)
    counted = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model.load_state_dict(before, strict=False)
    rewire(model, alpha=1.0, beta=0.0)
    assert_same_step(one_step(model, *inputs), original)
    assert all(torch.equal(buffer, counted[key]) for key, buffer in model.named_buffers())


@every_model
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
    """The weights change while alpha and beta stay the same."""
    model, x = stage(12), tokens()
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
    assert modes[0] == "reversible"  # the error that the step before had measured
    assert modes[1].startswith("stored")


def test_an_input_of_zeros_says_nothing_against_a_coupling() -> None:
    model = stage(12)
    set_coupling(model, alpha=0.1, beta=0.9)
    model(torch.zeros_like(tokens()))
    assert mode(model) == "reversible"
