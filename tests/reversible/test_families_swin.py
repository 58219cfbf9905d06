"""Window attention from gathered windows, against torchvision's own module."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformerBlock
from torchvision.models.video.swin_transformer import (
    ShiftedWindowAttention3d,
    SwinTransformer3d,
)

from re2tal.reversible import Branch, rewire
from re2tal.reversible.branches import split
from re2tal.reversible.coupling import Budget, Settings
from re2tal.reversible.families.swin import RelativeBias, _attend
from re2tal.reversible.step import Step
from tests.reversible.toy_blocks import assert_reversible_is_stored, tiny_swin
from tests.reversible.zoo import scrambled

WIDTH, HEADS = 8, 2

SHAPES = {
    # size of the input, window, shift
    "one window": ((4, 4), (4, 4), (0, 0)),
    "windows": ((8, 12), (4, 4), (0, 0)),
    "shifted": ((8, 12), (4, 4), (2, 2)),
    "shifted by an odd number": ((9, 6), (3, 3), (1, 1)),
    "padded": ((7, 9), (4, 4), (0, 0)),
    "padded and shifted": ((7, 9), (4, 4), (2, 2)),
    "larger than the input": ((3, 3), (4, 4), (2, 2)),
    "larger than one side": ((3, 9), (4, 4), (2, 2)),
    "oblong": ((6, 10), (2, 5), (1, 2)),
    "video": ((4, 8, 8), (2, 4, 4), (0, 0, 0)),
    "video, shifted": ((4, 8, 8), (2, 4, 4), (1, 2, 2)),
    "video, padded": ((3, 7, 6), (2, 4, 4), (0, 0, 0)),
    "video, padded and shifted": ((3, 7, 6), (2, 4, 4), (1, 2, 2)),
    "video, few frames": ((2, 8, 8), (4, 4, 4), (2, 2, 2)),
    "video, few frames and padded": ((3, 6, 9), (8, 4, 4), (4, 2, 2)),
    "video, one frame": ((1, 8, 4), (2, 4, 4), (1, 2, 2)),
    "video, small": ((4, 3, 8), (2, 4, 4), (1, 2, 2)),
    "video, smaller than a window": ((1, 3, 2), (2, 4, 4), (1, 2, 2)),
    "video, oblong": ((6, 4, 9), (3, 2, 5), (1, 1, 2)),
}


def block(
    window: tuple[int, ...], shift: tuple[int, ...], *, bias: bool = True, drop: float = 0.0
) -> SwinTransformerBlock:
    """In float64, with no parameter at a value that would hide an omission."""
    torch.manual_seed(0)
    kind = ShiftedWindowAttention if len(window) == 2 else ShiftedWindowAttention3d
    made = SwinTransformerBlock(WIDTH, HEADS, list(window), list(shift), attn_layer=kind)
    options = {"qkv_bias": bias, "proj_bias": bias, "dropout": drop, "attention_dropout": drop}
    made.attn = kind(WIDTH, list(window), list(shift), HEADS, **options)
    scrambled(made).double().eval()
    return made


def attention(of: SwinTransformerBlock) -> Branch:
    (branch, _) = split(of)
    assert branch.name == "attention"
    return branch


def cut(branch: Branch, x: Tensor, budget: Budget) -> Tensor:
    """The branch in pieces, with gradients."""
    return Step(branch, "block", x.dtype, Settings(slice_bytes=budget)).increment(x)


def video(size: tuple[int, ...], batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, *size, WIDTH, dtype=torch.float64, requires_grad=True)


def everything(found: Tensor, x: Tensor, of: nn.Module) -> list[Tensor | None]:
    """The result and the gradients of the input and all parameters, by a random loss."""
    torch.manual_seed(2)
    inputs = [x, *of.parameters()]
    gradients = torch.autograd.grad(found, inputs, torch.randn_like(found), allow_unused=True)
    return [found, *gradients]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [1, 20_000, 60_000, "auto"])
def test_pieces_are_torchvisions_attention(shape: str, budget: Budget) -> None:
    size, window, shift = SHAPES[shape]
    made, x = block(window, shift), video(size)
    truth = everything(made.attn(made.norm1(x)), x, made)
    found = everything(cut(attention(made), x, budget), x, made)
    for a, b in zip(found, truth, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ["shifted", "video, padded and shifted"])
def test_without_biases(shape: str) -> None:
    size, window, shift = SHAPES[shape]
    made, x = block(window, shift, bias=False), video(size)
    truth = made.attn(made.norm1(x))
    torch.testing.assert_close(cut(attention(made), x, 1), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ["windows", "video, padded and shifted"])
def test_dropout_is_torchvisions_where_nothing_is_cut(shape: str) -> None:
    """The same draws in the same order, of the scores and of the projection."""
    size, window, shift = SHAPES[shape]
    made, x = block(window, shift, drop=0.3).train(), video(size)
    torch.manual_seed(3)
    truth = made.attn(made.norm1(x))
    torch.manual_seed(3)
    found = cut(attention(made), x, "auto")
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(truth, cut(attention(made.eval()), x, "auto"))


# The bias


BIASES = [
    ((3, 3), (3, 3)),
    ((2, 4), (2, 4)),
    ((2, 3, 2), (2, 3, 2)),
    ((3, 2, 2), (2, 2, 2)),
    ((4, 2, 3), (1, 2, 3)),
]


@pytest.mark.parametrize(("own", "window"), BIASES)
def test_the_bias_is_that_of_the_index(own: tuple[int, ...], window: tuple[int, ...]) -> None:
    module = block(own, (0,) * len(own)).attn
    table, index = module.relative_position_bias_table, module.relative_position_index
    sizes = [list(window)] if len(window) == 3 else []
    truth = module.get_relative_position_bias(*sizes).reshape(1, HEADS, *2 * [prod(window)])
    found = RelativeBias.apply(table, index, own, window)
    assert torch.equal(found, truth)
    gradient = torch.randn_like(found)
    (a,) = torch.autograd.grad(found, table, gradient)
    (b,) = torch.autograd.grad(truth, table, gradient)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# Modules that are not torchvision's own any more


def hooked(model: SwinTransformer3d, calls: list[str]) -> None:
    model.features[0][1].attn.register_forward_hook(lambda *_: calls.append("hook"))


def replaced(model: SwinTransformer3d, calls: list[str]) -> None:
    old = model.features[0][1].attn

    class Counting(ShiftedWindowAttention3d):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("subclass")
            result: Tensor = super().forward(x)
            return result

    new = Counting(8, list(old.window_size), list(old.shift_size), 2)
    new.load_state_dict(old.state_dict())
    model.features[0][1].attn = new


def compiled(model: SwinTransformer3d, calls: list[str]) -> None:
    def backend(graph: Any, _inputs: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            calls.append("compiled")
            return graph(*inputs)

        return run

    torch.compiler.reset()
    model.features[0][1].attn = torch.compile(model.features[0][1].attn, backend=backend)


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        replaced,
        pytest.param(compiled, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
    ],
)
def test_a_module_that_was_changed_is_called_itself(
    change: Callable[[SwinTransformer3d, list[str]], None],
) -> None:
    torch.manual_seed(0)
    model, calls = tiny_swin((2, 1)), list[str]()
    x = torch.randn(2, 3, 4, 32, 32, requires_grad=True)
    rewire(model, slice_bytes=1)
    with torch.no_grad():
        truth = model(x)
    change(model, calls)
    rewire(model, slice_bytes=1)
    torch.testing.assert_close(model(x), truth, rtol=1e-3, atol=1e-4)
    assert len(calls) == 1
    calls.clear()
    assert_reversible_is_stored(model, x)
    assert len(calls) == 3  # stored; forward and replay


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_of_a_softmax_takes_the_memory_of_the_one_it_gets(dropout: float) -> None:
    """The same to the bit as that of PyTorch's, also differentiated once more."""
    torch.manual_seed(0)
    shape = (3, 2, 12, 4)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 12, 12, dtype=torch.float64, requires_grad=True)

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)) + bias
        return torch.matmul(nn.functional.dropout(scores.softmax(-1), dropout), v)

    def gradients(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        y = attend(q, k, v, bias)
        return torch.autograd.grad(y, (q, k, v, bias), y.detach())

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return _attend(q, k, v, bias, dropout)

    scores: list[int] = []
    with Made(3 * 2 * 12 * 12 * 8, scores):
        found = gradients(ours)
    others: list[int] = []
    with Made(3 * 2 * 12 * 12 * 8, others):
        truth = gradients(plain)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    assert len(scores) == len(others) - 1
    if dropout == 0:
        small = tuple(t[:1, :1, :3, :3].detach().requires_grad_() for t in (q, k, v, bias))
        assert torch.autograd.gradgradcheck(ours, small)


class Made(TorchDispatchMode):
    """Sizes of the tensors of a size, or more, that operators make and do not write into others."""

    def __init__(self, size: int, made: list[int]) -> None:
        super().__init__()
        self.size, self.made = size, made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
            size = result.untyped_storage().nbytes()
            self.made += [size] if size >= self.size else []
        return result
