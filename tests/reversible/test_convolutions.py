"""Weight gradients of convolutions in bfloat16 are right, whatever the processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import convolutions
from re2tal.reversible.convolutions import correct_gradients, wrong_gradients

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-2  # of the largest value; bfloat16 by itself is off by 5e-3

VIDEOS = [(2, 4, 4), (4, 8, 8), (8, 14, 14)]
SHAPES = [
    *((nn.Conv3d, kernel, size) for kernel in [(3, 3, 3), (3, 1, 1), (1, 3, 3)] for size in VIDEOS),
    (nn.Conv3d, (5, 1, 1), (4, 4, 4)),
    (nn.Conv1d, (3,), (4,)),
    (nn.Conv2d, (3, 3), (4, 4)),
]


def relative_error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).abs().max() / right.abs().max())


def weight_gradient(convolution: nn.Module, x: Tensor, *, bf16: bool) -> Tensor:
    convolution.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = convolution(x)
    y.to(x.dtype).square().sum().backward()
    gradient = next(convolution.parameters()).grad
    assert gradient is not None
    return gradient.clone()


@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize(("kind", "kernel", "size"), SHAPES)
def test_weight_gradients_are_those_of_float32(
    kind: type[nn.Module], kernel: tuple[int, ...], size: tuple[int, ...], channels: int
) -> None:
    torch.manual_seed(0)
    padding = tuple(side // 2 for side in kernel)
    convolution = kind(channels, channels, kernel, padding=padding, bias=False)
    x = torch.randn(2, channels, *size)
    right = weight_gradient(convolution, x, bf16=False)
    found = [weight_gradient(convolution, x, bf16=True) for _ in range(2)]
    assert relative_error(found[0], right) < TOLERANCE
    assert torch.equal(*found)


def test_float32_is_right() -> None:
    """The float32 gradient is the reference of the other tests."""
    torch.manual_seed(0)
    convolution, x = nn.Conv3d(32, 32, 3, padding=1), torch.randn(2, 32, 2, 4, 4)
    found = weight_gradient(convolution, x, bf16=False)
    right = weight_gradient(convolution.double(), x.double(), bf16=False)
    assert relative_error(found, right) < 1e-5


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_replacement_computes_a_convolutions_gradients(
    wanted: tuple[bool, bool, bool], groups: int
) -> None:
    """On every processor, also where nothing is replaced; the reference is PyTorch's float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 6, 5, 5), torch.randn(4 * groups, 8 // groups, 3, 3, 3)
    settings = [weight.shape[0]], [2, 1, 1], [1, 0, 1], [1, 1, 2], False, [0, 0, 0], groups, wanted
    shape = torch.nn.functional.conv3d(x, weight, None, *settings[1:4], groups).shape
    gradient = torch.randn(shape)
    keys = torch.DispatchKeySet(torch.DispatchKey.CPU)
    bfloat16 = [t.bfloat16() for t in (gradient, x, weight)]
    found = convolutions._backward(keys, *bfloat16, *settings)
    right = torch.ops.aten.convolution_backward(*(t.double() for t in bfloat16), *settings)
    for wants, one, other in zip(wanted, found, right, strict=True):
        if wants:
            assert one is not None
            assert one.dtype == torch.bfloat16
            assert relative_error(one, other) < TOLERANCE


def test_the_trial_tells_a_wrong_kernel_from_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    correct_gradients()  # so that PyTorch's gradients are right from here on
    trial = wrong_gradients.__wrapped__
    assert not trial()
    right = torch.ops.aten.convolution_backward.default

    def wrong(gradient: Tensor, x: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, ...]:
        of_x, of_weight, of_bias = right(gradient, x, weight, *rest)
        if weight.dtype is torch.bfloat16:
            of_weight[0, 0, 0] += errors[-1] * of_weight.abs().max()
        return of_x, of_weight, of_bias

    monkeypatch.setattr(convolutions, "_OPERATOR", wrong)
    errors = []
    for error in (0.1, torch.inf, torch.nan):
        errors.append(error)
        assert trial()


_CORRECTED = """
import sys
from re2tal.reversible import convolutions
convolutions.wrong_gradients = lambda: True
convolutions.correct_gradients()
convolutions.correct_gradients()
assert len(convolutions._registration) == 1
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""

EXACT = ["-p", "no:cacheprovider", "tests/reversible/test_exact.py", "-k"]


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")),
    reason="this processor has one set of instructions",
)
def test_gradients_are_exact_with_other_instructions() -> None:
    """All networks in bfloat16, one of each kind in float32; the suite itself runs with AVX-512."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    chosen = "rewired_model and auto-0.0 and (bf16 or fp32-swin2d or fp32-r3d)"
    command = [sys.executable, "-m", "pytest", *EXACT, chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "PyTorch computes with AVX2" in done.stdout


@pytest.mark.slow
def test_gradients_are_exact_with_the_correction_whatever_the_processor() -> None:
    """Networks of convolutions, which the correction concerns."""
    chosen = "auto and bf16 and (r3d or mc3 or r2plus1d or slowfast)"
    command = [sys.executable, "-c", _CORRECTED, *EXACT, chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
