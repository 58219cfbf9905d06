"""Errors of gradients against those of stored activations: the work of `exactness`."""

import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.experiments.device import device
from pipelines.experiments.peers import PEERS, stored
from pipelines.experiments.benchmarking import Row, name_of
from pipelines.experiments.drift import PRECISIONS, autocast, drift, relative_error
from pipelines.experiments.stacks import MlpBlock, stack

OURS, FLOAT = "ours", "ours, float"

ERROR = "relative error of gradients"
NOT_INSTALLED = "not installed"

_FAMILY = "LayerNorm-MLP"  # streams of its stacks are (B, C), which all libraries can split


def our_errors(*, depths: Sequence[int], precisions: Sequence[str]) -> dict[str, Any]:
    """Errors of this project, on the grid and in floating point.

    Args:
        depths: numbers of branches.
        precisions: what the branches compute in, keys of `PRECISIONS`.

    Returns:
        The device, and in "rows" one for each depth and precision.
    """
    here = device()
    rows = []
    for depth, precision in product(depths, precisions):
        errors = drift(_FAMILY, depth, precision, here)
        for library, column in ((OURS, "gradients, grid"), (FLOAT, "gradients, float")):
            rows.append(_row(library, "this one", depth, precision, errors[column]))
    return {"device": name_of(here), "rows": rows}


def errors_of(*, library: str, depths: Sequence[int], precisions: Sequence[str]) -> dict[str, Any]:
    """Errors of another implementation.

    Args:
        library: one of `PEERS`.
        depths: as in `our_errors`.
        precisions: likewise.

    Returns:
        As `our_errors`. If the library is not there, or does not run, rows say so.
    """
    package = PEERS[library].package
    try:
        version = metadata.version(package) if package else "this one"
    except metadata.PackageNotFoundError:
        rows = [_row(library, NOT_INSTALLED, "", "", NOT_INSTALLED)]
    else:
        rows = [
            _row(library, version, depth, precision, _error(library, depth, precision))
            for depth, precision in product(depths, precisions)
        ]
    return {"device": name_of(device()), "rows": rows}


def _row(library: str, version: str, depth: int | str, precision: str, error: float | str) -> Row:
    # A norm of differences is 0 if all of them are, and only then.
    equal = "" if isinstance(error, str) else "yes" if error == 0 else "no"
    return {
        "library": library,
        "version": version,
        "branches": depth,
        "precision": precision,
        ERROR: error,
        "bit for bit": equal,
    }


def _error(library: str, depth: int, precision: str) -> float | str:
    """Against the same branches with stored activations; a failure in a line."""
    blocks, x = stack(_FAMILY, depth)
    blocks, x = blocks.to(device()), x.to(device())
    branches = [_Branch(block, PRECISIONS[precision]) for block in blocks]
    wanted = _gradients(branches, lambda streams: stored(streams, branches), x)
    try:
        # What these libraries use of PyTorch that is going out of use is not the question here.
        with warnings.catch_warnings(action="ignore"):
            found = _gradients(branches, PEERS[library].build(branches), x)
    except Exception as problem:  # whatever it is, it goes into the report
        return f"{type(problem).__name__}: {problem}".splitlines()[0]
    return relative_error(found, wanted)


class _Branch(nn.Module):
    """What a block adds to its skip connection.

    Autocast is entered inside, because not every library enters it again in the backward.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(block, MlpBlock)
        self.block = block
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with autocast(x.device, self.dtype):
            return self.block.branch(x).to(x.dtype)


def _gradients(
    branches: Sequence[nn.Module], network: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """Gradients of all parameters one after another, where both streams begin with x."""
    parameters = [p for branch in branches for p in branch.parameters()]
    for parameter in parameters:
        parameter.grad = None
    streams = torch.cat([x, x], dim=1).requires_grad_()
    # A copy, for a library may give away the memory of its input.
    first, second = network(streams.clone()).chunk(2, dim=1)
    ((first + second) / 2).pow(2).mean().backward()
    found = [p.grad for p in parameters if p.grad is not None]
    if len(found) < len(parameters):
        raise RuntimeError(f"{len(parameters) - len(found)} parameters have no gradient")
    return torch.cat([gradient.flatten() for gradient in found])
