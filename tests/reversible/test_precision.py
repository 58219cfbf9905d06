"""Low precision: gradient scaling, models in half precision, and the drift of float streams."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import reconstruction_errors, rewire, set_reversible
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    assert_reversible_is_stored,
)

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def network() -> nn.Sequential:
    """A stem, a stage and a head, for x (B, 8)."""
    torch.manual_seed(0)
    stage = nn.Sequential(*(MlpBlock(16, dropout=0.2) for _ in range(4)))
    model = nn.Sequential(nn.Linear(8, 16), stage, nn.Linear(16, 4))
    rewire(model)
    return model


def train(
    model: nn.Module, batches: list[Tensor], dtype: torch.dtype, scale: float
) -> tuple[list[bool], list[float], list[Tensor]]:
    """Train under autocast with gradient scaling.

    Returns:
        Whether the scaler let the optimizer make each step, its scale after each, and all
        gradients and parameters.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    made, scales, tensors = [], [], []
    for seed, x in enumerate(batches):
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(seed)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(x).float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = [p.detach().clone() for p in model.parameters()]
        made.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        scales.append(scaler.get_scale())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(after)
        tensors += [*(g.clone() for g in gradients), *after]
    return made, scales, tensors


def assert_trains_as_stored(
    build: Callable[[], nn.Module], batches: list[Tensor], dtype: torch.dtype, scale: float
) -> tuple[list[bool], list[float]]:
    """Train with rebuilt and with stored activations; return the steps made and the scales."""
    stored = build()
    set_reversible(stored, False)
    made, scales, tensors = train(build(), batches, dtype, scale)
    others = train(stored, batches, dtype, scale)
    assert (made, scales) == others[:2]
    for a, b in zip(tensors, others[2], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    return made, scales


@HALVES
def test_scaled_training_is_that_with_stored_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    made, _ = assert_trains_as_stored(network, list(torch.randn(6, 5, 8)), dtype, 2.0**10)
    assert all(made)


def test_a_step_whose_gradients_overflow_is_skipped() -> None:
    torch.manual_seed(1)
    batches = list(torch.randn(16, 5, 8))
    made, scales = assert_trains_as_stored(network, batches, torch.float16, 2.0**24)
    assert 0 < made.index(True) < len(made) - 1
    assert scales[-1] < 2.0**24


def test_a_step_whose_forward_overflows_is_skipped_and_training_goes_on() -> None:
    def steep() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(*(PairBlock(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        model.get_parameter("0.first.weight").data.fill_(60.0)
        model.get_parameter("1.first.weight").data.mul_(0.01)
        rewire(model)
        return model

    torch.manual_seed(1)
    batches = list(torch.randn(4, 5, 8))
    batches[1] = torch.full((5, 8), 900.0)  # fits the grid, but 900 * 60 * 8 is beyond float16
    made, _ = assert_trains_as_stored(steep, batches, torch.float16, 8.0)
    assert made == [True, False, True, True]


def assert_rounded_streams(
    dtype: torch.dtype, found: Tensor, model: nn.Sequential, x: Tensor
) -> None:
    """Compute the equations with float32 streams and branches in `dtype`."""

    def rounded(stream: Tensor) -> Tensor:
        return (stream.float() * 2**14).round() / 2**14

    previous = current = rounded(x)
    for block in model:
        assert isinstance(block, MlpBlock)
        result = block.branch(current.to(dtype))
        assert result.dtype == dtype
        previous, current = current, rounded(result) + previous
    assert torch.equal(found, ((current + previous) / 2).to(dtype))


@HALVES
def test_a_model_in_half_precision_has_float32_streams(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock(16) for _ in range(6)))
    rewire(model, grid=14)
    model.to(dtype)
    x = torch.randn(4, 16).to(dtype).requires_grad_()
    result = assert_reversible_is_stored(model, x)
    for name, gradient in result.gradients.items():
        assert gradient is not None, name
        assert gradient.dtype == dtype
        assert gradient.any()
    assert_rounded_streams(dtype, result.output, model, x.detach())


DEPTHS = (12, 24, 96)
DRIFT = {
    # Worst of four seeds: errors of the rebuilt input and of the gradients, for the depths above.
    torch.float32: ((1.4e-7, 2.2e-7, 7.0e-7), (1.6e-7, 1.9e-7, 2.9e-7)),
    torch.float16: ((2.9e-5, 4.0e-5, 2.4e-4), (9.8e-5, 7.1e-5, 1.9e-4)),
    torch.bfloat16: ((1.2e-4, 1.8e-4, 5.6e-4), (3.4e-4, 4.8e-4, 6.4e-4)),
}


@contextmanager
def first_inputs(model: nn.Sequential) -> Iterator[list[Tensor]]:
    """Inputs of the first branch in the forward and in the replay."""
    seen: list[Tensor] = []
    first = model.get_submodule("0.norm")
    handle = first.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    yield seen
    handle.remove()


def drift(depth: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[float, float]:
    """Relative errors (norms) of the rebuilt input of a stack and of all its gradients.

    Args:
        depth: number of branches, each of a LayerNorm and an MLP of width 32, on 64 tokens.
        dtype: precision inside the branches; streams are float32.
        seed: seed of parameters and input.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(*(MlpBlock(32) for _ in range(depth)))
    rewire(model, exact=False)
    x = torch.randn(64, 32)
    gradients = []
    for reversible in (False, True):
        set_reversible(model, reversible)
        context = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
        with first_inputs(model) as seen:
            with context:
                loss = model(x).pow(2).mean()
            found = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    before, rebuilt = seen
    of_input = float((rebuilt - before).norm() / before.norm())
    # `reconstruction_errors` reports the larger of the two streams' errors.
    assert of_input <= max(reconstruction_errors(model).values()) * (1 + 1e-6)
    stored, found_again = gradients
    return of_input, float((found_again - stored).norm() / stored.norm())


@pytest.mark.parametrize("dtype", DRIFT, ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_float_streams_drift_as_measured(depth: int, dtype: torch.dtype) -> None:
    found = drift(depth, dtype)
    at = DEPTHS.index(depth)
    for error, measured in zip(found, DRIFT[dtype], strict=True):
        # Rounding of sums depends on the machine's kernels.
        assert error < 4 * measured[at]
