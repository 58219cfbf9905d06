"""The coupling: how a stage's two streams go forward through a branch, and back again.

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
difference on the way back. Rounding passes gradients on unchanged. See `grid`.

Everything here is a pure function of tensors of one shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the streams of a stage whose input has this dtype: at least float32.

    A stream is rebuilt by subtraction, branch after branch; in bfloat16 the rounding of 12 branches
    already changes it by one percent, in float32 by 3e-7 (measured).
    """
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """The two coefficients of a stage, and the equations above.

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
        """``a(F_i(x_{i-1}) + alpha x_{i-1})``."""
        if self.alpha != 0:
            branch = torch.add(branch, current, alpha=self.alpha)
        return branch if activation is None else activation(branch)

    def advance(self, increment: Tensor, previous: Tensor) -> Tensor:
        """``x_i`` from its increment and ``x_{i-2}``."""
        if self.beta == 0:
            return increment
        return torch.add(increment, previous, alpha=self.beta)

    def rewind(self, increment: Tensor, following: Tensor, *, overwrite: bool = False) -> Tensor:
        """``x_{i-2}`` from ``x_i`` and its increment, whose memory may be reused."""
        out = increment if overwrite else None
        previous = torch.sub(following, increment, out=out)
        if self.beta == 1:
            return previous
        return previous.div_(self.beta)

    def skip_gradient(self, gradient: Tensor) -> Tensor | None:
        """What the skip connection passes of the gradient of ``x_i`` to ``x_{i-2}``.

        None stands for zero.
        """
        if self.beta == 0:
            return None
        return gradient if self.beta == 1 else gradient * self.beta

    def merge(self, last: Tensor, before: Tensor) -> Tensor:
        """The stage's output from ``x_n`` and ``x_{n-1}``; autograd stores nothing for it."""
        if self.beta == 0:
            return last
        return torch.add(last, before, alpha=self.beta).mul(1 / (1 + self.beta))
