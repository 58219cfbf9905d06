"""Drift of gradients when activations are rebuilt: none on the grid, some in floating point.

Errors are norms of differences over norms, with random weights and streams in float32 under
autocast of the branches; "overflow" means that nothing finite was rebuilt.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.models import STACKS, stack
from re2tal.precision import Precision, autocast
from re2tal.reversible import branches, reconstruction_errors, rewire, set_reversible

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")

COUPLINGS = ((0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1), (1.0, 0.1))
"""(alpha, beta): Re2TAL, and steps on Dr2Net's way from the pretrained network to it."""

COARSE: tuple[Precision, ...] = ("float32", "bfloat16")


def measure(*, depths: Sequence[int] = (12, 24, 96)) -> Tables:
    """Measure the drift in stacks of several families, and by coupling.

    Args:
        depths: even numbers of residual branches.
    """
    return {
        "Relative errors of what is rebuilt and of gradients": [
            drift(family, count, precision)
            for family in STACKS
            for count in depths
            for precision in PRECISIONS
        ],
        "Relative error of the rebuilt input of a stack, by coupling": [
            coupling_row(family, precision, alpha, beta, depths)
            for family in ("LayerNorm-MLP", "Video Swin")
            for precision in COARSE
            for alpha, beta in COUPLINGS
        ],
    }


def drift(family: str, count: int, precision: Precision, device: torch.device | str = "cpu") -> Row:
    """Measure errors of one stack whose branches compute in one precision; streams are float32.

    Args:
        family: key of `STACKS`.
        count: number of residual branches.
        precision: number format of the branches.
        device: device that computes.

    Returns:
        Norms of differences over norms, for streams with the grid and without. For comparison,
        "precision alone" is the error of gradients with stored activations against float32.
    """
    model, x = stack(family, count)
    model, x = model.to(device), x.to(device)
    rewire(model, exact=False)
    output, rebuilt = _gradients(model, x, precision)
    rebuilt_error = max(reconstruction_errors(model).values())
    set_reversible(model, False)
    _, stored = _gradients(model, x, precision)
    _, precise = _gradients(model, x, "float32")
    rewire(model)
    output_on_grid, rebuilt_on_grid = _gradients(model, x, precision)
    set_reversible(model, False)
    _, stored_on_grid = _gradients(model, x, precision)
    return {
        "family": family,
        "branches": count,
        "precision": precision,
        "rebuilt input, float": rebuilt_error,
        "gradients, float": relative_error(rebuilt, stored),
        "gradients, grid": relative_error(rebuilt_on_grid, stored_on_grid),
        "gradients, precision alone": relative_error(stored, precise),
        "output, grid against float": relative_error(output_on_grid, output),
    }


def coupling_row(
    family: str, precision: Precision, alpha: float, beta: float, depths: Iterable[int]
) -> Row:
    """Tabulate `rebuilt_error` for some depths."""
    row: Row = {"family": family, "precision": precision, "alpha": alpha, "beta": beta}
    for count in depths:
        model, x = stack(family, count)
        with autocast(x.device.type, precision):
            error = rebuilt_error(model, x, alpha, beta)
        row[f"{count} branches"] = error if math.isfinite(error) else "overflow"
    return row


@torch.no_grad()
def rebuilt_error(model: nn.Sequential, x: Tensor, alpha: float, beta: float) -> float:
    """Run a stack forward and back by the equations in floating point, without the engine.

    Returns:
        The larger relative error of the two rebuilt streams; NaN or infinity after an overflow.
    """
    functions = [branch for block in model for branch in branches(block)]
    current = previous = x
    for function in functions:
        current, previous = function(current) + alpha * current + beta * previous, current
    for function in reversed(functions):
        before = (current - function(previous) - alpha * previous) / beta
        current, previous = previous, before
    return max(relative_error(current, x), relative_error(previous, x))


def _gradients(model: nn.Module, x: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Compute the output, and the gradients of all parameters in one vector."""
    with autocast(x.device.type, precision):
        output = model(x)
    found = torch.autograd.grad(output.float().pow(2).mean(), list(model.parameters()))
    return output.detach(), torch.cat([gradient.flatten() for gradient in found])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Compute the norm of the difference over the norm of `wanted`."""
    return float((found - wanted).double().norm() / wanted.double().norm())
