"""A replay meets the conditions of the first run, and leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import rewire, set_reversible
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    assert_reversible_is_stored,
    one_step,
    tiny_swin,
)


def noisy_stack(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock(dropout=0.5) for _ in range(depth)))
    rewire(model)
    return model.double()


def points() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64)


def test_dropout_is_replayed_and_the_generator_left_alone() -> None:
    model, x = noisy_stack(), points()
    assert_reversible_is_stored(model, x)  # compares the generator's state after the step as well
    loss = model(x).sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_between_forward_and_backward_do_not_matter() -> None:
    model, x = noisy_stack(), points()
    truth = one_step(model, x)

    def loss(y: Tensor) -> Tensor:
        torch.rand(100)
        return y.float().pow(2).sum()

    found = one_step(model, x, loss=loss)
    for name, gradient in truth.gradients.items():
        if gradient is not None:
            torch.testing.assert_close(found.gradients[name], gradient, msg=name)


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


def test_the_mode_of_the_forward_counts() -> None:
    model, x = noisy_stack(), points()
    truth = one_step(model, x)
    model[1].eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = None
    model.train()
    loss = model(x).float().pow(2).sum()
    model.eval()
    loss.backward()
    assert not any(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, truth.gradients[name])


class Witness(nn.Module):
    """A linear layer that notes what autocast made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.seen.append((y.dtype, torch.is_autocast_cache_enabled()))
        return y


@contextmanager
def autocast(enabled: bool = True) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        yield


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_autocast_is_that_of_the_forward(forward: bool, backward: bool) -> None:
    torch.manual_seed(0)
    witness = Witness()
    model = nn.Sequential(PairBlock(witness, nn.Tanh()))
    rewire(model)
    x = torch.randn(4, 6, requires_grad=True)
    with autocast(forward):
        y = model(x)
    with autocast(backward):
        y.sum().backward()
        assert torch.is_autocast_enabled("cpu") == backward
        assert torch.is_autocast_cache_enabled()
    assert y.dtype == torch.float32
    expected = torch.bfloat16 if forward else torch.float32
    # The cache of cast weights is off in both runs, and as it was outside of them.
    assert witness.seen == [(expected, False), (expected, False)]
    assert witness.linear.weight.grad is not None


def test_gradients_under_bf16_autocast() -> None:
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.3).train()
    rewire(model)

    class UnderAutocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with autocast():
                result: Tensor = self.inner(x)
            return result

    # bfloat16 turns a difference of 1e-7 in a rebuilt stream into one of its own steps, 2^-8.
    assert_reversible_is_stored(
        UnderAutocast(), torch.randn(2, 3, 4, 32, 32, requires_grad=True), tolerance=0.02
    )


def test_weights_cast_without_gradients_are_not_found_again() -> None:
    torch.manual_seed(0)
    block = MlpBlock()
    model = nn.Sequential(block)
    rewire(model)
    x = torch.randn(4, 6)
    with autocast():
        # All in one autocast region, the cache of which outlives the forward of the stage.
        model(x).sum().backward()
        assert all(p.grad is not None for p in block.parameters())
        (direct,) = torch.autograd.grad(block.branch(x).sum(), [block.one.weight])
    assert direct.abs().sum() > 0


def test_gradient_scaling() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MlpBlock(), MlpBlock())
    rewire(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 6)
    truth = one_step(model, x).gradients["0.one.weight"]
    optimizer.zero_grad()
    scaler.scale(model(x).pow(2).sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model[0].get_parameter("one.weight").grad, truth)


def normalised(norm: nn.Module) -> nn.Sequential:
    """A rewired stage on x (B, 4, L) whose branches have running statistics."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), norm)
    model = nn.Sequential(PairBlock(first, nn.Conv1d(4, 4, 1)), PairBlock(nn.Tanh(), nn.ReLU()))
    rewire(model)
    return model.double()


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm1d(4, momentum=None),
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
)
def test_running_statistics_are_counted_once(norm: type[nn.Module]) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64) + 2
    buffers = []
    for reversible in (True, False):
        model = normalised(norm())
        set_reversible(model, reversible)
        for seed in range(3):
            one_step(model, x, seed=seed)
        buffers.append(dict(model.named_buffers()))
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffer, buffers[1][name], msg=name)
    assert_reversible_is_stored(model, x)


def test_batch_norm_in_eval_mode_uses_its_statistics() -> None:
    model = normalised(nn.BatchNorm1d(4))
    x = torch.randn(3, 4, 5, dtype=torch.float64) + 2
    one_step(model, x)
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert_reversible_is_stored(model.eval(), x)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_two_training_forwards_before_one_backward_with_batch_norm() -> None:
    model = normalised(nn.BatchNorm1d(4))
    x, z = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    gradients = []
    for reversible in (True, False):
        set_reversible(model, reversible)
        loss = (model(x) * model(z)).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


class Attends(nn.Module):
    """Attention of the batch's tokens; its kernel is chosen by a context around the forward."""

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
        loss = model(torch.randn(16, 6)).sum()
    assert torch.backends.cuda.flash_sdp_enabled()
    loss.backward()
    assert attends.seen == [False, False]
    assert torch.backends.cuda.flash_sdp_enabled()
