"""What rebuilding activations does to gradients: nothing on the grid, drift in floating point."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipelines.experiments.benchmarking import Row, Tables
from re2tal.reversible import branches, reconstruction_errors, rewire, set_reversible
from pipelines.experiments.stacks import STACKS, stack

PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

COUPLINGS = ((0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1), (1.0, 0.1))
"""(alpha, beta): Re2TAL, and steps on Dr2Net's way from the pretrained network to it."""

DEPTHS = (12, 24, 96)


def measure() -> Tables:
    """The tables of the command ``drift``."""
    return {
        "Relative errors of what is rebuilt and of gradients": [
            drift(family, count, precision)
            for family in STACKS
            for count in DEPTHS
            for precision in PRECISIONS
        ],
        "Relative error of the rebuilt input of a stack, by coupling": [
            coupling_row(family, precision, alpha, beta, DEPTHS)
            for family in ("LayerNorm-MLP", "Video Swin")
            for precision in ("float32", "bfloat16")
            for alpha, beta in COUPLINGS
        ],
    }


def drift(family: str, count: int, precision: str, device: torch.device | str = "cpu") -> Row:
    """Errors of one stack whose branches compute in one precision; streams are float32.

    Args:
        family: a key of `STACKS`.
        count: residual branches.
        precision: a key of `PRECISIONS`.
        device: where the stack is.

    Returns:
        Norms of differences over norms. "grid" streams against those without one; "precision alone"
        is how far gradients of stored activations are from those of float32, to compare with.
    """
    model, x = stack(family, count)
    model, x = model.to(device), x.to(device)
    dtype = PRECISIONS[precision]
    rewire(model, exact=False)
    output, rebuilt = _gradients(model, x, dtype)
    rebuilt_error = max(reconstruction_errors(model).values())
    set_reversible(model, False)
    _, stored = _gradients(model, x, dtype)
    _, precise = _gradients(model, x, torch.float32)
    rewire(model)
    output_on_grid, rebuilt_on_grid = _gradients(model, x, dtype)
    set_reversible(model, False)
    _, stored_on_grid = _gradients(model, x, dtype)
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
    family: str, precision: str, alpha: float, beta: float, depths: Iterable[int]
) -> Row:
    """Errors of `rebuilt_error` for some depths."""
    row: Row = {"family": family, "precision": precision, "alpha": alpha, "beta": beta}
    for count in depths:
        model, x = stack(family, count)
        with autocast(x.device, PRECISIONS[precision]):
            error = rebuilt_error(model, x, alpha, beta)
        row[f"{count} branches"] = error if math.isfinite(error) else "overflow"
    return row


@torch.no_grad()
def rebuilt_error(model: nn.Sequential, x: Tensor, alpha: float, beta: float) -> float:
    """Run a stack forward and back by the equations in floating point, apart from the engine.

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


def _gradients(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output, and the gradients of all parameters one after another."""
    with autocast(x.device, dtype):
        output = model(x)
    found = torch.autograd.grad(output.float().pow(2).mean(), list(model.parameters()))
    return output.detach(), torch.cat([gradient.flatten() for gradient in found])


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Computes in a precision while the block runs."""
    # float32 is no precision that autocast knows
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if low else None, enabled=low)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((found - wanted).double().norm() / wanted.double().norm())
