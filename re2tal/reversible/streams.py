"""The coupling: how a stage's two streams go forward through a branch, and back again.

A stage with the residual branches ``F_1 ... F_n`` computes, from its input ``x``,

    x_{-1} = x_0 = x
    x_i    = F_i(x_{i-1}) + alpha x_{i-1} + beta x_{i-2}          i = 1 ... n
    output = (x_n + beta x_{n-1}) / (1 + beta)

``(alpha, beta) = (0, 1)`` is Re2TAL: the skip connection starts one branch earlier, and the output
is the mean of the two streams (Zhao et al., CVPR 2023, arXiv 2211.14053, section 3). The general
form is Dr2Net (Zhao et al., CVPR 2024, arXiv 2401.04105), whose second stream is
``y_i = beta x_{i-1}``; ``(1, 0)`` is the pretrained residual network itself, which is why the
output weighs the streams by 1 and beta. For ``beta != 0`` two neighbours determine the one before,

    x_{i-2} = (x_i - F_i(x_{i-1}) - alpha x_{i-1}) / beta,

so a stage can be run backwards from its last two streams. A gradient ``g`` of ``x_i`` reaches
``x_{i-1}`` as ``J_i^T g + alpha g`` and ``x_{i-2}`` as ``beta g``.

Everything here is a pure function of tensors of one shape.
"""

import math
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
    def invertible(self) -> bool:
        """Whether ``x_{i-2}`` follows from ``x_{i-1}`` and ``x_i``."""
        return self.beta != 0

    def advance(self, branch: Tensor, current: Tensor, previous: Tensor) -> Tensor:
        """``x_i`` from ``F_i(x_{i-1})``, ``x_{i-1}`` and ``x_{i-2}``."""
        following = branch
        if self.alpha != 0:
            following = torch.add(following, current, alpha=self.alpha)
        if self.beta != 0:
            following = torch.add(following, previous, alpha=self.beta)
        return following

    def rewind(self, branch: Tensor, current: Tensor, following: Tensor) -> Tensor:
        """``x_{i-2}`` from ``F_i(x_{i-1})``, ``x_{i-1}`` and ``x_i``."""
        previous = following - branch
        if self.alpha != 0:
            previous = torch.sub(previous, current, alpha=self.alpha)
        return previous if self.beta == 1 else previous / self.beta

    def skip_gradients(self, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the skip connections pass of the gradient of ``x_i`` to ``x_{i-1}`` and ``x_{i-2}``.

        None stands for zero.
        """
        return _scaled(gradient, self.alpha), _scaled(gradient, self.beta)

    def merge(self, last: Tensor, before: Tensor) -> Tensor:
        """The stage's output from ``x_n`` and ``x_{n-1}``; autograd stores nothing for it."""
        if self.beta == 0:
            return last
        return torch.add(last, before, alpha=self.beta) * (1 / (1 + self.beta))


def _scaled(gradient: Tensor, factor: float) -> Tensor | None:
    if factor == 0:
        return None
    return gradient if factor == 1 else gradient * factor
