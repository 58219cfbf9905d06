"""A replay restores the conditions of the forward, and has no side effects."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import rewire, set_reversible
from re2tal.reversible.replay import Draws
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    assert_equal_gradients,
    assert_reversible_is_stored,
    one_step,
    points,
    squares,
    stack,
    stems_and_stages,
    tiny_swin,
)

Builder = Callable[[], nn.Module]
NOISY: list[Builder] = [partial(stack, dropout=0.5), stems_and_stages]
either_model = pytest.mark.parametrize("build", NOISY, ids=["branches", "recomputed layers"])


@either_model
def test_dropout_is_replayed_whatever_is_drawn_and_the_generator_left_alone(
    build: Builder,
) -> None:
    model, x = build(), points()
    states = []

    def draw(y: Tensor) -> Tensor:
        torch.rand(100)
        states.append(torch.get_rng_state())
        return squares(y)

    found = one_step(model, x, loss=draw)
    assert torch.equal(found.generator, states[0])
    model = build()
    set_reversible(model, False)
    assert_equal_gradients(found, one_step(model, x))


@either_model
def test_the_mode_of_the_forward_counts(build: Builder) -> None:
    model, x = build(), points()

    def evaluated(y: Tensor) -> Tensor:
        model.eval()
        return squares(y)

    found = one_step(model, x, loss=evaluated)
    assert not any(m.training for m in model.modules())
    assert_equal_gradients(found, one_step(build(), x))


def test_states_of_generators_are_kept_once_and_restored_where_something_was_drawn() -> None:
    draws, x = Draws(), torch.ones(1)
    states = []
    for part in range(4):
        draws.mark(x, {x.device})
        states.append(torch.get_rng_state())
        if part == 2:
            drawn = torch.rand(1)
    draws.settle()
    assert len({id(mark) for mark in draws._marks}) == 2
    for part in range(4):
        torch.rand(1)
        before = torch.get_rng_state()
        with draws.replayed(part):
            found = torch.get_rng_state()
            assert torch.equal(found, states[part] if part == 2 else before)
            assert part != 2 or torch.equal(torch.rand(1), drawn)
        assert torch.equal(torch.get_rng_state(), before)


def test_masks_change_from_step_to_step_and_follow_the_seed() -> None:
    torch.manual_seed(0)
    model = tiny_swin((2,), drop_path=0.5).train()
    rewire(model)
    x = torch.randn(6, 3, 4, 16, 16)

    def three_steps(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        outputs = []
        for _ in range(3):
            y = model(x)
            y.sum().backward()
            outputs.append(y.detach())
        return outputs

    first, again, other = three_steps(1), three_steps(1), three_steps(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], other[0])


class Witness(nn.Module):
    """Linear layer that records the dtype and the caching that autocast gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.seen.append((y.dtype, torch.is_autocast_cache_enabled()))
        return y


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_autocast_is_that_of_the_forward(forward: bool, backward: bool) -> None:
    torch.manual_seed(0)
    witness = Witness()
    model = nn.Sequential(PairBlock(witness, nn.Tanh()))
    rewire(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        y = model(points(requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        y.sum().backward()
        assert torch.is_autocast_enabled("cpu") == backward
        assert torch.is_autocast_cache_enabled()
    assert y.dtype == torch.float32
    expected = torch.bfloat16 if forward else torch.float32
    # The cache of cast weights is off in both runs, and unchanged outside of them.
    assert witness.seen == [(expected, False), (expected, False)]
    assert witness.linear.weight.grad is not None


def test_weights_cast_without_gradients_are_not_found_again() -> None:
    model, x = stack(1), points()
    block = model[0]
    assert isinstance(block, MlpBlock)
    with torch.autocast("cpu", torch.bfloat16):
        # All in one autocast region, whose cache outlives the forward of the stage.
        model(x).sum().backward()
        assert all(p.grad is not None for p in block.parameters())
        (direct,) = torch.autograd.grad(block.branch(x).sum(), [block.one.weight])
    assert direct.abs().sum() > 0


def normalised(norm: nn.Module) -> nn.Sequential:
    """A rewired stage for x (B, 4, L) whose branches have running statistics."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), norm)
    model = nn.Sequential(PairBlock(first, nn.Conv1d(4, 4, 1)), PairBlock(nn.Tanh(), nn.ReLU()))
    rewire(model)
    return model.double()


def signals(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, 5, dtype=torch.float64) + 2


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm1d(4, momentum=None),
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
)
def test_running_statistics_are_counted_once(norm: Callable[[], nn.Module]) -> None:
    x, buffers = signals(), []
    for reversible in (True, False):
        model = normalised(norm())
        set_reversible(model, reversible)
        for seed in range(3):
            one_step(model, x, seed=seed)
        buffers.append([b.clone() for b in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    assert_reversible_is_stored(model, x)
    before = [b.clone() for b in model.buffers()]
    assert_reversible_is_stored(model.eval(), x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_two_training_forwards_before_one_backward_with_batch_norm() -> None:
    model, gradients = normalised(nn.BatchNorm1d(4)), []
    x, z = signals(), signals()
    for reversible in (True, False):
        set_reversible(model, reversible)
        loss = (model(x) * model(z)).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


class Attends(nn.Module):
    """Attention among the batch's tokens; a context around the forward chooses its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cuda.flash_sdp_enabled())
        q = x.unsqueeze(0).unsqueeze(0)
        return nn.functional.scaled_dot_product_attention(q, q, q)[0, 0]


def test_the_attention_kernels_of_the_forward_are_allowed_again() -> None:
    torch.manual_seed(0)
    attends = Attends()
    model = nn.Sequential(PairBlock(nn.Linear(6, 6), attends), MlpBlock())
    rewire(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(points(16)).sum()
    assert torch.backends.cuda.flash_sdp_enabled()
    loss.backward()
    assert attends.seen == [False, False]
    assert torch.backends.cuda.flash_sdp_enabled()
