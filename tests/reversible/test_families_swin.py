"""Window attention on gathered windows, compared with torchvision's own module."""

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
from re2tal.reversible.families import swin, window_attention
from re2tal.reversible.families.window_attention import RelativeBias
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
    """Attention in float64, with no parameter at a value that would hide an omission."""
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
    """Run the branch in pieces, with gradients."""
    return Step(branch, "block", x.dtype, Settings(slice_bytes=budget)).increment(x)


def video(size: tuple[int, ...], batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, *size, WIDTH, dtype=torch.float64, requires_grad=True)


def everything(found: Tensor, x: Tensor, of: nn.Module) -> list[Tensor | None]:
    """Result, and gradients of the input and all parameters for a random loss."""
    torch.manual_seed(2)
    inputs = [x, *of.parameters()]
    gradients = torch.autograd.grad(found, inputs, torch.randn_like(found), allow_unused=True)
    return [found, *gradients]


def grouped(monkeypatch: pytest.MonkeyPatch, *, kept: bool) -> None:
    """Have heads computed one by one, and masks made for each piece."""
    monkeypatch.setattr(window_attention, "_LARGE", 1)
    monkeypatch.setattr(window_attention, "_GROUP", 1)
    monkeypatch.setattr(window_attention, "_KEPT", 2**20 if kept else 0)
    monkeypatch.setattr(swin, "_LARGE_MASKS", 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [1, 20_000, 60_000, "auto", "groups", "groups, kept"])
def test_pieces_are_torchvisions_attention(
    shape: str, budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, window, shift = SHAPES[shape]
    if str(budget).startswith("groups"):
        grouped(monkeypatch, kept="kept" in budget)
        budget = 20_000
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
    """Both draw the same numbers in the same order, for the scores and for the projection."""
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


# Modules that are no longer torchvision's own


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
    assert len(calls) == 3  # once stored; once each in forward and replay


@pytest.mark.parametrize("groups", [None, "computed again", "kept"])
def test_attention_holds_few_matrices_of_scores(
    groups: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, and gradients of gradients, are those of PyTorch's operators."""
    made = block((2, 4, 4), (1, 2, 2))
    branch, x = attention(made), video((4, 8, 8), batch=1)

    def found() -> tuple[list[Tensor | None], list[int]]:
        sizes: list[int] = []
        with Made(32 * 32 * 8, sizes):
            return everything(cut(branch, x, "auto"), x, made.attn), sizes

    with monkeypatch.context() as patched:
        patched.setattr(swin, "WindowAttention", None)  # must not be called
        patched.setattr("re2tal.reversible.families.swin._WindowLayout._plain", lambda _: True)
        truth, others = found()
    if groups is not None:
        grouped(monkeypatch, kept=groups == "kept")
    ours, sizes = found()
    for a, b in zip(ours, truth, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert max(sizes) <= max(others) // (1 if groups is None else 2)
    assert len([size for size in sizes if size == max(others)]) < len(others) // 2

    y = cut(branch, x, "auto").square().sum()
    parameters = [x, *made.attn.parameters()]
    first = torch.autograd.grad(y, parameters, retain_graph=True)
    again = torch.autograd.grad(y, parameters, create_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    second = torch.autograd.grad(again[0].square().sum(), parameters)
    monkeypatch.setattr("re2tal.reversible.families.swin._WindowLayout._plain", lambda _: True)
    (to_x,) = torch.autograd.grad(cut(branch, x, "auto").square().sum(), x, create_graph=True)
    for a, b in zip(second, torch.autograd.grad(to_x.square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [False, True])
def test_heads_in_groups_are_rebuilt_to_the_bit(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped(monkeypatch, kept=kept)
    torch.manual_seed(0)
    model = tiny_swin((2, 1))
    x = torch.randn(2, 3, 4, 32, 32, requires_grad=True)
    rewire(model, slice_bytes=2**14)
    assert_reversible_is_stored(model, x)


class Made(TorchDispatchMode):
    """Record of the sizes, from a given one on, of tensors that operators allocate."""

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
