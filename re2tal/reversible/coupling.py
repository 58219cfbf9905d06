"""The coupling: equations by which the two streams of a stage go forward, and back again.

A stage with the residual branches ``F_1 ... F_n`` computes, from its input ``x``,

    x_{-1} = x_0 = x
    x_i    = a_i(F_i(x_{i-1}) + alpha x_{i-1}) + beta x_{i-2}     i = 1 ... n
    output = (x_n + beta x_{n-1}) / (1 + beta)

where ``a_i`` is what the block applies after its addition: nothing, or the ReLU of a ResNet.
``(alpha, beta) = (0, 1)`` is Re2TAL: the skip connection starts one branch earlier, a ReLU is moved
into the branch, and the output is the mean of the two streams (Zhao et al., CVPR 2023, arXiv
2211.14053, section 3). The general form is Dr2Net (Zhao et al., CVPR 2024, arXiv 2401.04105), whose
second stream is ``y_i = beta x_{i-1}``; ``(1, 0)`` is the pretrained residual network itself, which
is why the output weighs the streams by 1 and beta. For ``beta != 0`` two neighbours determine the
one before,

    x_{i-2} = (x_i - a_i(F_i(x_{i-1}) + alpha x_{i-1})) / beta,

so a stage can be run backwards from its last two streams. A gradient ``g`` of ``x_i`` reaches
``x_{i-2}`` as ``beta g``, and ``x_{i-1}`` through the increment ``a_i(...)``.

In floating point the way back is exact only up to rounding. It is exact to the bit on a grid: if
the stage's input and every increment are rounded to multiples of 2^-k, and beta is 1, then each
``x_i`` is a sum of two grid points, which float32 holds exactly below 2^(24-k), and so is each
difference on the way back. Rounding passes gradients on unchanged. See `Grid`.

Everything here is a pure function of tensors of one shape.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype of the streams of a stage for its input's dtype: at least float32.

    A stream is rebuilt by subtraction, branch after branch; in bfloat16 the rounding of 12 branches
    already changes it by one percent, in float32 by 3e-7 (measured).
    """
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """The two coefficients of a stage, and the equations above with them.

    Attributes:
        alpha: weight of the pretrained skip connection, from ``x_{i-1}``.
        beta: weight of the reversible skip connection, from ``x_{i-2}``; not negative.

    Raises:
        ValueError: if a coefficient is not finite or beta is negative.
    """

    alpha: float = 0.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)) or self.beta < 0:
            raise ValueError(
                f"A coupling needs a finite alpha and a finite beta >= 0, but got "
                f"alpha={self.alpha}, beta={self.beta}. Re2TAL is (0, 1), the plain network (1, 0)."
            )

    @property
    def plain(self) -> bool:
        """Whether this is the pretrained residual network itself."""
        return self.alpha == 1 and self.beta == 0

    @property
    def invertible(self) -> bool:
        """Whether ``x_{i-2}`` follows from ``x_{i-1}`` and ``x_i``."""
        return self.beta != 0

    def increment(
        self,
        branch: Tensor,
        current: Tensor,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute ``a(F_i(x_{i-1}) + alpha x_{i-1})`` from the branch's result."""
        if self.alpha != 0:
            branch = torch.add(branch, current, alpha=self.alpha)
        return branch if activation is None else activation(branch)

    def advance(self, increment: Tensor, previous: Tensor) -> Tensor:
        """Compute ``x_i`` from its increment and ``x_{i-2}``."""
        if self.beta == 0:
            return increment
        return torch.add(increment, previous, alpha=self.beta)

    def merge(self, last: Tensor, before: Tensor) -> Tensor:
        """Compute the stage's output from ``x_n`` and ``x_{n-1}``; autograd stores nothing."""
        if self.beta == 0:
            return last
        return torch.add(last, before, alpha=self.beta).mul_(self.share)

    @property
    def share(self) -> float:
        """Derivative of the output by ``x_n``; that by ``x_{n-1}`` is beta times as large."""
        return 1 / (1 + self.beta)


Bits = int | Literal["auto"]

HEADROOM = 8
"""Bits by which "auto" lets a stream outgrow its stage's input: 256 times. The other 16 hold the
input: it is rounded by less than 2^-17 of its largest value, and bfloat16 rounds by 2^-9."""

FINEST = 16
"""Most bits that "auto" chooses: streams of any input may reach 256."""

_FLOAT32_BIAS, _FLOAT32_FRACTION = 127, 23


@dataclass(frozen=True, slots=True)
class Grid:
    """Multiples of a power of two.

    Attributes:
        scale: ``2**k``, a number or a float32 tensor of no dimensions.
        spacing: ``2**-k``, likewise.
        negative: ``-2**-k``.
    """

    scale: float | Tensor
    spacing: float | Tensor
    negative: float | Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "negative", -self.spacing)

    @classmethod
    def of(cls, bits: Bits, stream: Tensor) -> "Grid":
        """Choose the grid of one forward of a stage.

        Args:
            bits: k, or "auto" for one that suits the stage's input.
            stream: the stage's input.
        """
        if bits != "auto":
            return cls(2.0**bits, 2.0**-bits)
        largest = torch.stack(torch.aminmax(stream.detach())).abs().amax().float()
        # The exponent stands in the bits: largest < 2^(exponent + 1).
        exponent = (largest.view(torch.int32) >> _FLOAT32_FRACTION) - _FLOAT32_BIAS
        # A small input does not mean small increments, for most branches normalize it first.
        k = (23 - HEADROOM - exponent).clamp(-64, FINEST)
        return cls(_power_of_two(k), _power_of_two(-k))

    @property
    def limit(self) -> float | Tensor:
        """Streams below this are held exactly."""
        return 2.0**24 * self.spacing

    def round(self, x: Tensor, sign: int = 1) -> Tensor:
        """Round to the nearest points, in a new tensor; differentiable as the identity.

        Args:
            x: values.
            sign: 1, or -1 for the negative of the points.
        """
        spacing = self.spacing if sign > 0 else self.negative
        if torch.compiler.is_exporting():
            # A program has no gradients but those of its operations; the difference, and hence the
            # sum, are exact.
            return x + (_rounded(x, self.scale, spacing) - x).detach()
        if x.requires_grad and torch.is_grad_enabled():
            rounded: Tensor = _Round.apply(x, self.scale, spacing)
            return rounded
        return _rounded(x, self.scale, spacing)

    def add(self, out: Tensor, x: Tensor, sign: int = 1) -> None:
        """Add the points nearest to values to points, in place.

        Args:
            out: points.
            x: values.
            sign: 1, or -1 to subtract.
        """
        whole = torch.mul(x, self.scale).round_()
        # A product with a power of two is exact, so that it may be fused with the sum.
        if isinstance(self.spacing, Tensor):
            out.addcmul_(whole, self.spacing, value=sign)
        else:
            out.add_(whole, alpha=sign * self.spacing)


def accumulate(out: Tensor, x: Tensor, grid: Grid | None = None, sign: int = 1) -> None:
    """Add values to a tensor in place, or with a grid the points nearest to them.

    Args:
        out: the tensor; points, with a grid.
        x: values.
        grid: the grid.
        sign: 1, or -1 to subtract.
    """
    if grid is None:
        out.add_(x, alpha=sign)
        return
    kernels = fused(out, x)
    alike = kernels is not None and out.shape == x.shape and out.stride() == x.stride()
    if kernels is not None and alike and torch.ops.aten.is_non_overlapping_and_dense(out):
        kernels.add(out, x, grid, sign)
    else:
        grid.add(out, x, sign)


def fused(*tensors: Tensor) -> Any:
    """Return the module of kernels of a GPU if it has these tensors and can be used; else None."""
    if any(type(t) is not Tensor or t.dtype != torch.float32 or not t.is_cuda for t in tensors):
        return None
    return kernels_on(tensors[0].device)


@cache
def kernels_on(device: torch.device) -> Any:
    """Import the module of kernels and try it on a device; None, with a warning, if it fails.

    PyTorch for some systems comes without Triton, and Triton finds no compiler on some.
    """
    try:
        kernels = import_module("re2tal.reversible.kernels")
        reason = "" if kernels.agrees(device) else "it does not compute what PyTorch does"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        _LOG.warning(
            "Pieces are added by PyTorch's kernels, for Triton's cannot be used: %s", reason
        )
        return None
    return kernels


class _Round(torch.autograd.Function):
    """Rounding as a part of a differentiable network: its gradient is the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float | Tensor, spacing: float | Tensor) -> Tensor:
        return _rounded(x, scale, spacing)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed in the backward."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return gradients[0], None, None


def _rounded(x: Tensor, scale: float | Tensor, spacing: float | Tensor) -> Tensor:
    # Powers of two scale without rounding, so that round() alone decides.
    return torch.mul(x, scale).round_().mul_(spacing)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Compute ``2**exponent`` in float32, exactly: a device's pow() may be off by a bit."""
    return ((exponent + _FLOAT32_BIAS) << _FLOAT32_FRACTION).view(torch.float32)


@dataclass(frozen=True, slots=True)
class AtLeast:
    """Pieces as large as one of the stage's streams; a backward holds four tensors of that size.

    Attributes:
        bytes: bytes of the smallest piece, however small the stream.
        for_weights: bytes up to which a piece takes three times those of the branch's parameters:
            each piece adds their gradients to a sum.
    """

    bytes: int
    for_weights: int = 0


Budget = int | AtLeast | Literal["auto"] | None
"""Bytes of a piece of a branch; "auto" is the device's `SMALLEST_PIECE`, None does not cut."""

SMALLEST_PIECE = {
    "cpu": AtLeast(8 * 2**20, for_weights=32 * 2**20),
    "cuda": AtLeast(2 * 2**30),
}
"""Default budgets by kind of device. Small pieces leave a GPU waiting for the next: on an H200,
Swin-T's step on 768 frames took 2.2 s in pieces of 128 MiB, 0.4 s of 2 GiB, and 0.3 s stored."""


def bytes_of_piece(
    budget: int | AtLeast | Literal["auto"], stream: Tensor, weights: int = 0
) -> int:
    """Compute the bytes of a piece of a stage with these streams.

    Args:
        budget: the budget.
        stream: one of the streams.
        weights: bytes of the branch's parameters.
    """
    if budget == "auto":
        budget = SMALLEST_PIECE.get(stream.device.type, SMALLEST_PIECE["cpu"])
    if isinstance(budget, AtLeast):
        more = min(3 * weights, budget.for_weights)
        return max(budget.bytes, more, stream.numel() * stream.element_size())
    return budget


TOLERANCE = 1e-3
"""Largest relative error (root mean square) of a rebuilt input that a coupling may have; above it
activations are stored. In bfloat16 a branch rounds its input by up to 4e-3 of each value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the stages of a container, as `rewire` was given them.

    Attributes:
        coupling: alpha and beta.
        reversible: rebuild activations (True) or store them (False); the function is the same.
        grid: fractional bits of the fixed-point grid, or "auto"; None is plain floating point.
        slice_bytes: budget of a piece of a branch; None runs branches whole, by their own code.
        verify: compare the rebuilt inputs of the stages with those of the forward.
    """

    coupling: Coupling = field(default_factory=Coupling)
    reversible: bool = True
    grid: Bits | None = None
    slice_bytes: Budget = "auto"
    verify: bool = True

    @property
    def exact(self) -> bool:
        """Whether the way back is exact to the bit."""
        return self.grid is not None and self.coupling.beta == 1

    def stored_because(self) -> str | None:
        """Name the reason why activations have to be stored; None if they may be rebuilt."""
        if not self.reversible:
            return "asked for by set_reversible"
        if torch.compiler.is_exporting():
            return "an exported program keeps no state to rebuild from"
        if not self.coupling.invertible:
            return "beta = 0 is not invertible"
        if self.grid is not None and not self.exact:
            return "exact streams need beta = 1"
        return None
