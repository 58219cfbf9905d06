"""Coupling: the equations of the two streams of a stage, forward and backward.

A stage with the residual branches ``F_1 ... F_n`` computes from its input ``x``

    x_{-1} = x_0 = x
    x_i    = a_i(F_i(x_{i-1}) + alpha x_{i-1}) + beta x_{i-2}     i = 1 ... n
    output = (x_n + beta x_{n-1}) / (1 + beta)

where ``a_i`` is the activation after the block's addition: the ReLU of a ResNet, or the identity.

- ``(alpha, beta) = (0, 1)`` is Re2TAL, ``x_i = F_i(x_{i-1}) + x_{i-2}``: the skip connection starts
  one branch earlier, a ReLU is moved into the branch, and the output is the mean of the two streams
  (Zhao et al., CVPR 2023, arXiv 2211.14053, section 3).
- The general form is Dr2Net (Zhao et al., CVPR 2024, arXiv 2401.04105). Its second stream is
  ``y_i = beta x_{i-1}``.
- ``(1, 0)`` is the pretrained residual network. The output must then be ``x_n`` alone; hence it
  weighs the two streams by 1 and beta.

For ``beta != 0`` two neighbouring streams determine the one before them,

    x_{i-2} = (x_i - a_i(F_i(x_{i-1}) + alpha x_{i-1})) / beta,

so the last two streams suffice to run a stage backwards. The gradient ``g_i`` of ``x_i`` flows to
both of its inputs,

    g_{i-2} += beta g_i,    g_{i-1} += J_i^T g_i,    J_i = d a_i(F_i(x) + alpha x) / dx at x_{i-1}.

In floating point the inversion is exact only up to rounding. On a fixed-point grid with beta = 1 it
is exact to the bit. With ``[.]`` for rounding to multiples of 2^-k,

    x_i = [a_i(...)] + x_{i-2},    x_{i-2} = x_i - [a_i(...)],

and the stage's input is rounded too. float32 has 24 bits of significand, so it holds every such sum
and difference exactly as long as streams stay below 2^(24-k). The gradient of the rounding is taken
to be the identity (straight-through). See `Grid`.

All functions of this file work element by element on tensors of one shape.
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
    """Choose the dtype of a stage's streams from the dtype of its input: at least float32.

    Streams are rebuilt by one subtraction a branch. After 12 branches the rounding errors add up to
    1 % in bfloat16, but only 3e-7 in float32 (measured).
    """
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """Coefficients alpha and beta of a stage, with the equations above.

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
        """Tell whether the stage is the pretrained residual network itself."""
        return self.alpha == 1 and self.beta == 0

    @property
    def invertible(self) -> bool:
        """Tell whether ``x_{i-2}`` can be computed from ``x_{i-1}`` and ``x_i``."""
        return self.beta != 0

    def increment(
        self,
        branch: Tensor,
        current: Tensor,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute ``a_i(F_i(x_{i-1}) + alpha x_{i-1})`` from the result of the branch ``F_i``."""
        if self.alpha != 0:
            branch = torch.add(branch, current, alpha=self.alpha)
        return branch if activation is None else activation(branch)

    def advance(self, increment: Tensor, previous: Tensor) -> Tensor:
        """Compute ``x_i = increment + beta x_{i-2}``."""
        if self.beta == 0:
            return increment
        return torch.add(increment, previous, alpha=self.beta)

    def merge(self, last: Tensor, before: Tensor) -> Tensor:
        """Compute the stage's output ``(x_n + beta x_{n-1}) / (1 + beta)``.

        Autograd stores nothing for it: a sum and a product with a number are linear.
        """
        if self.beta == 0:
            return last
        return torch.add(last, before, alpha=self.beta).mul_(self.share)

    @property
    def share(self) -> float:
        """Derivative of the output with respect to ``x_n``; for ``x_{n-1}``, beta times that."""
        return 1 / (1 + self.beta)


Bits = int | Literal["auto"]

HEADROOM = 8
"""Bits that "auto" leaves above the stage's input: streams may grow to 2^8 = 256 times the input.
The other 16 of the 24 bits hold the input, whose rounding error is then below 2^-17 of its largest
value. (bfloat16 rounds by 2^-9.)"""

FINEST = 16
"""Most fractional bits that "auto" chooses. Streams may thus reach 2^(24-16) = 256 at least."""

_FLOAT32_BIAS, _FLOAT32_FRACTION = 127, 23


@dataclass(frozen=True, slots=True)
class Grid:
    """Fixed-point grid: the multiples of ``2**-k``.

    Attributes:
        scale: ``2**k``, a number or a float32 tensor without dimensions.
        spacing: ``2**-k``, likewise.
        negative: ``-2**-k``, computed once a forward.
    """

    scale: float | Tensor
    spacing: float | Tensor
    negative: float | Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "negative", -self.spacing)

    @classmethod
    def of(cls, bits: Bits, stream: Tensor) -> "Grid":
        """Choose the grid of one forward of a stage.

        "auto" takes ``k = 23 - HEADROOM - e`` where the largest magnitude of the input lies in
        ``[2^e, 2^(e+1))``, at most `FINEST`.

        Args:
            bits: k, or "auto" to derive k from the stage's input.
            stream: the stage's input.
        """
        if bits != "auto":
            return cls(2.0**bits, 2.0**-bits)
        largest = torch.stack(torch.aminmax(stream.detach())).abs().amax().float()
        # e of 2^e <= largest < 2^(e + 1), read from the exponent bits of float32: exact, and on the
        # device, so that nothing waits for the host.
        exponent = (largest.view(torch.int32) >> _FLOAT32_FRACTION) - _FLOAT32_BIAS
        # At most FINEST: a small input does not mean small increments, because most branches
        # normalize their input first.
        k = (23 - HEADROOM - exponent).clamp(-64, FINEST)
        return cls(_power_of_two(k), _power_of_two(-k))

    @property
    def limit(self) -> float | Tensor:
        """Magnitude ``2**(24 - k)``, below which float32 holds every grid point exactly."""
        return 2.0**24 * self.spacing

    def round(self, x: Tensor, sign: int = 1) -> Tensor:
        """Round to the nearest grid points, in a new tensor; the gradient is the identity.

        Args:
            x: values.
            sign: 1, or -1 to return the negated points.
        """
        spacing = self.spacing if sign > 0 else self.negative
        if torch.compiler.is_exporting():
            # An exported program differentiates its operators, not a custom Function, so the
            # straight-through gradient is spelled out. The difference is exact, and so is the sum.
            return x + (_rounded(x, self.scale, spacing) - x).detach()
        if x.requires_grad and torch.is_grad_enabled():
            rounded: Tensor = _Round.apply(x, self.scale, spacing)
            return rounded
        return _rounded(x, self.scale, spacing)

    def add(self, out: Tensor, x: Tensor, sign: int = 1) -> None:
        """Round values to the grid and add them to a tensor in place.

        Args:
            out: grid points.
            x: values.
            sign: 1, or -1 to subtract.
        """
        whole = torch.mul(x, self.scale).round_()
        # A product with a power of two is exact, so fusing it with the sum changes no bit.
        if isinstance(self.spacing, Tensor):
            out.addcmul_(whole, self.spacing, value=sign)
        else:
            out.add_(whole, alpha=sign * self.spacing)


def accumulate(out: Tensor, x: Tensor, grid: Grid | None = None, sign: int = 1) -> None:
    """Add values to a tensor in place, rounded to the grid if there is one.

    Args:
        out: the target; grid points if there is a grid.
        x: values.
        grid: the grid; None adds the values themselves.
        sign: 1, or -1 to subtract.
    """
    if grid is None:
        out.add_(x, alpha=sign)
        return
    kernels = fused(out, x)
    # The kernel walks both memories in one order, without strides.
    alike = kernels is not None and out.shape == x.shape and out.stride() == x.stride()
    if kernels is not None and alike and torch.ops.aten.is_non_overlapping_and_dense(out):
        kernels.add(out, x, grid, sign)
    else:
        grid.add(out, x, sign)


def fused(*tensors: Tensor) -> Any:
    """Return the module of Triton kernels if these are float32 CUDA tensors and it works there."""
    if any(type(t) is not Tensor or t.dtype != torch.float32 or not t.is_cuda for t in tensors):
        return None
    return kernels_on(tensors[0].device)


@cache
def kernels_on(device: torch.device) -> Any:
    """Import the module of Triton kernels and test it on a device.

    Returns:
        The module, or None, with a warning, if it cannot be used.

    Some builds of PyTorch come without Triton, and on some systems Triton finds no compiler.
    """
    try:
        kernels = import_module("re2tal.reversible.kernels")
        reason = "" if _agrees(kernels, device) else "it does not compute what PyTorch does"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        _LOG.warning(
            "PyTorch's kernels add the pieces, because Triton's cannot be used: %s", reason
        )
        return None
    return kernels


def _agrees(kernels: Any, device: torch.device) -> bool:
    """Compare a module of kernels with PyTorch's operators on a device, to the bit."""
    # Ties (odd multiples of half the spacing 2^-14), subnormal numbers, -0.0, and large values.
    halves = torch.arange(-60, 60, device=device) / 2.0**15
    sizes = torch.tensor([1e-40, -1e-39, -0.0, 0.7, 2.0**7 + 2.0**-15, 2.0**8, 3e5], device=device)
    x = torch.cat([halves, sizes, torch.linspace(-3, 3, 129, device=device)]).view(-1, 2)
    index = torch.arange(len(x), device=device).flip(0)
    tried = []
    for grid in (None, Grid.of("auto", x), Grid.of(14, x)):
        for sign in (1, -1):
            out = 1e-39 * x if grid is None else grid.round(x.flip(0))
            plain = out + (sign * x if grid is None else grid.round(x, sign))
            kernels.add(lying := out.clone(), x, grid, sign)
            kernels.add(moved := out.clone(), x[index], grid, sign, index)
            tried += [torch.equal(plain, lying), torch.equal(plain, moved)]
    return all(tried)


class _Round(torch.autograd.Function):
    """Rounding as a part of a differentiable network: its gradient is the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float | Tensor, spacing: float | Tensor) -> Tensor:
        return _rounded(x, scale, spacing)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: the backward needs no values."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return gradients[0], None, None


def _rounded(x: Tensor, scale: float | Tensor, spacing: float | Tensor) -> Tensor:
    # Products with powers of two are exact, so round() is the only rounding (half to even).
    return torch.mul(x, scale).round_().mul_(spacing)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Compute ``2**exponent`` exactly in float32; a device's pow() may be off by one bit."""
    return ((exponent + _FLOAT32_BIAS) << _FLOAT32_FRACTION).view(torch.float32)


@dataclass(frozen=True, slots=True)
class AtLeast:
    """Budget of a piece: the size of one stream of the stage, but not less than a minimum.

    A backward holds four tensors of the size of a stream, so a piece of that size adds a quarter.

    Attributes:
        bytes: smallest budget, however small the stream.
        for_weights: limit of a second minimum, three times the bytes of the branch's parameters.
            Each piece adds the gradients of all these parameters to their sums.
    """

    bytes: int
    for_weights: int = 0


Budget = int | AtLeast | Literal["auto"] | None
"""Bytes of a piece of a branch. "auto" takes `SMALLEST_PIECE` of the device; None does not cut."""

SMALLEST_PIECE = {
    "cpu": AtLeast(8 * 2**20, for_weights=32 * 2**20),
    "cuda": AtLeast(2 * 2**30),
}
"""Default budgets by type of device. With small pieces a GPU waits for kernel launches: on an H200
Swin-T's step on 768 frames took 2.2 s in pieces of 128 MiB, 0.4 s in pieces of 2 GiB, and 0.3 s
with stored activations."""


def bytes_of_piece(
    budget: int | AtLeast | Literal["auto"], stream: Tensor, weights: int = 0
) -> int:
    """Compute the bytes of a piece of a branch.

    Args:
        budget: the budget.
        stream: one of the stage's streams.
        weights: bytes of the branch's parameters.
    """
    if budget == "auto":
        budget = SMALLEST_PIECE.get(stream.device.type, SMALLEST_PIECE["cpu"])
    if isinstance(budget, AtLeast):
        more = min(3 * weights, budget.for_weights)
        return max(budget.bytes, more, stream.numel() * stream.element_size())
    return budget


TOLERANCE = 1e-3
"""Largest relative error (root mean square) of a rebuilt input; above it the stage stores its
activations. For comparison, a bfloat16 branch rounds each value of its input by up to 4e-3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the stages of a container, from the arguments of `rewire`.

    Attributes:
        coupling: alpha and beta.
        reversible: rebuild activations (True) or store them (False). The function computed is the
            same.
        grid: fractional bits of the fixed-point grid, or "auto"; None is plain floating point.
        slice_bytes: budget of a piece of a branch; None runs branches whole, by the block's code.
        verify: compare the rebuilt inputs of the stages with those of the forward.
    """

    coupling: Coupling = field(default_factory=Coupling)
    reversible: bool = True
    grid: Bits | None = None
    slice_bytes: Budget = "auto"
    verify: bool = True

    @property
    def exact(self) -> bool:
        """Tell whether streams are rebuilt exactly, to the bit."""
        return self.grid is not None and self.coupling.beta == 1

    def stored_because(self) -> str | None:
        """Return the reason why activations must be stored; None if they may be rebuilt."""
        if not self.reversible:
            return "asked for by set_reversible"
        if torch.compiler.is_exporting():
            return "an exported program keeps no state to rebuild from"
        if not self.coupling.invertible:
            return "beta = 0 is not invertible"
        if self.grid is not None and not self.exact:
            return "exact streams need beta = 1"
        return None
