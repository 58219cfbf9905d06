"""The fixed-point grid on which a stream is rebuilt bit for bit.

Multiples of ``2**-k`` below ``2**(24 - k)`` are float32 numbers, since float32 has 24 significant
bits; sums and differences of two that stay below are exact. By default k follows from the stage's
input, by integer arithmetic on the device, so that nothing waits: large streams have room and
small ones a fine grid.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

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
    """

    scale: float | Tensor
    spacing: float | Tensor

    @classmethod
    def of(cls, bits: Bits, stream: Tensor) -> "Grid":
        """The grid of one forward of a stage.

        Args:
            bits: k, or "auto" for one that suits the stage's input.
            stream: that input.
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

    def round(self, x: Tensor) -> Tensor:
        """The nearest points, as a new tensor; differentiable as the identity."""
        if x.requires_grad and torch.is_grad_enabled():
            rounded: Tensor = _Round.apply(x, self.scale, self.spacing)
            return rounded
        return _rounded(x, self.scale, self.spacing)


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
    """``2**exponent`` as float32, exactly: the function pow() of a device may be off by a bit."""
    return ((exponent + _FLOAT32_BIAS) << _FLOAT32_FRACTION).view(torch.float32)
