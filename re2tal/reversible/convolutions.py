"""Weight gradients of 3-D convolutions on CPUs where PyTorch computes wrong ones in bfloat16.

oneDNN 3.13.3, which PyTorch 2.15 uses, reads uninitialised memory when it sums the weight gradient
of a 3-D convolution in bfloat16 with AVX-512 instructions and the kernel is longer than the video.
The gradient then differs from call to call, by up to 1e36 times its largest value, or is NaN.
Outputs and gradients of inputs are right, and so are 1-D and 2-D convolutions, float32 and float16.
A network trained with such gradients learns nothing, reversible or not.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

WRONG_GRADIENTS = (
    "PyTorch computes wrong weight gradients of 3-D convolutions in bfloat16 on this CPU; re2tal "
    "computes them in float32 instead."
)

# A correct bfloat16 gradient differs from float32's by 5e-3 of its largest value, by rounding.
_TOLERANCE = 2e-2

_OPERATOR = torch.ops.aten.convolution_backward.default

# PyTorch's own kernel, and the library object whose lifetime is that of our registration.
_original = torch.library.get_kernel(_OPERATOR, "CPU")
_registration: list[torch.library.Library] = []


@cache
def wrong_gradients() -> bool:
    """Tell whether this CPU's weight gradients are wrong; tested once a process, in few ms."""
    return any(_is_wrong(channels, frames) for channels in (16, 32) for frames in (2, 4))


def correct_gradients() -> None:
    """Make PyTorch compute correct weight gradients in this process.

    Nothing changes where PyTorch's own are correct, nor by further calls.
    """
    if not _registration and wrong_gradients():
        library = torch.library.Library("aten", "IMPL")
        library.impl("convolution_backward", _backward, "CPU", with_keyset=True)
        _registration.append(library)


def _backward(
    keys: torch.DispatchKeySet, gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """Compute `aten::convolution_backward`, with the gradient of the weight in float32.

    Args:
        keys: dispatch keys of the call.
        gradient: gradient of the output (B, C_out, T', H', W'), or of other dimensions.
        x: input (B, C_in, T, H, W).
        weight: weight (C_out, C_in / groups, k_t, k_h, k_w).
        rest: sizes of the bias, stride, padding, dilation, transposition, output padding, groups,
            and which gradients (input, weight, bias) are wanted.

    Returns:
        Gradients of input, weight and bias; None for those not wanted.
    """
    *settings, (of_input, of_weight, of_bias) = rest
    if weight.dtype is not torch.bfloat16 or weight.ndim != 5 or not of_weight:
        found: tuple[Tensor | None, ...] = _original.call_boxed(keys, gradient, x, weight, *rest)
        return found
    # The float32 kernel is correct, and its gradient more precise than bfloat16's would be.
    wide = (t.float() for t in (gradient, x, weight))
    _, in_float, _ = _original.call_boxed(keys, *wide, *settings, [False, True, False])
    others = [of_input, False, of_bias]
    in_x, _, in_bias = _original.call_boxed(keys, gradient, x, weight, *settings, others)
    return in_x, in_float.to(weight.dtype), in_bias


def _is_wrong(channels: int, frames: int) -> bool:
    """Compare the bfloat16 weight gradient of a kernel longer than its video with float32's."""
    source, kernel = torch.Generator().manual_seed(0), 2 * (frames // 2) + 1
    shape = (2, channels, frames, 4, 4)
    gradient, x = (torch.randn(shape, generator=source, device="cpu") for _ in range(2))
    weight = torch.zeros(channels, channels, kernel, 1, 1, device="cpu")
    settings = None, [1, 1, 1], [kernel // 2, 0, 0], [1, 1, 1], False, [0, 0, 0], 1
    found = []
    for precision in (torch.float32, torch.bfloat16):
        tensors = (t.to(precision) for t in (gradient, x, weight))
        # The kernel reads memory that it has not written. Fresh memory is zero and would hide that,
        # so the allocator gets blocks full of NaN to hand out.
        for size in range(8, 17):
            torch.full((2**size,), torch.nan, device="cpu")
        _, of_weight, _ = _OPERATOR(*tensors, *settings, [False, True, False])
        found.append(of_weight.float())
    right, tried = found
    return not bool((tried - right).abs().max() <= _TOLERANCE * right.abs().max())
