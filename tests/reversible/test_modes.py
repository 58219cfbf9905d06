"""Evaluation, forwards without a backward and backwards too many, as a model is rewired by default.

A Swin in float32, with branches in pieces, a stem and a down-sampling layer that are recomputed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import ReversibleError, rewire, set_reversible
from tests.reversible.toy_blocks import assert_reversible_is_stored, one_step, tiny_swin


def swin(slice_bytes: int | None = 2**14) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.3)
    report = rewire(model, slice_bytes=slice_bytes)
    assert sum(left.recomputed for left in report.left_out) == 2
    return model


def frames(requires_grad: bool = False) -> Tensor:
    return torch.randn(2, 3, 4, 32, 32, requires_grad=requires_grad)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reversible", [True, False])
def test_outputs_without_gradients_are_those_with_them(
    without: Callable[[], AbstractContextManager[object]], training: bool, reversible: bool
) -> None:
    model, x = swin().train(training), frames()
    truth = one_step(model, x).output
    set_reversible(model, reversible)
    torch.manual_seed(0)
    with without():
        y = model(x)
    assert torch.equal(y, truth)
    assert not y.requires_grad


def test_evaluation() -> None:
    model, x = swin().eval(), frames(requires_grad=True)
    result = assert_reversible_is_stored(model, x)
    assert torch.equal(model(x), result.output)  # no drop path, whatever the seed


def test_an_evaluation_between_forward_and_backward() -> None:
    model, x = swin(), frames()
    truth = one_step(model, x)
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(x).float().pow(2).sum()
    with torch.inference_mode():
        model.eval()(frames())
    model.train()
    loss.backward()
    for name, parameter in model.named_parameters():
        gradient = truth.gradients[name]
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient), name


@pytest.mark.parametrize(("slice_bytes", "tolerance"), [(None, 0.0), (2**14, 1e-6)])
def test_two_forwards_before_one_backward(slice_bytes: int | None, tolerance: float) -> None:
    # Stored, a parameter's gradients of all pieces of both forwards are summed one by one; rebuilt,
    # those of each forward are summed first.
    model = swin(slice_bytes)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a) * self.inner(b)

    assert_reversible_is_stored(Twice(), frames(requires_grad=True), frames(), tolerance=tolerance)


def test_backwards_in_another_order_than_the_forwards() -> None:
    model, x, z = swin(), frames(), frames()
    gradients = []
    for reversible in (True, False):
        set_reversible(model, reversible)
        torch.manual_seed(0)
        first, second = model(x).sum(), model(z).pow(2).sum()
        parameters = list(model.parameters())
        gradients.append(
            [*torch.autograd.grad(first, parameters), *torch.autograd.grad(second, parameters)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_unused_output() -> None:
    model, x = swin(), frames(requires_grad=True)
    unused = model(x)
    truth = one_step(model, x)
    del unused
    again = one_step(model, x)
    for name, gradient in truth.gradients.items():
        other = again.gradients[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name


def test_a_second_backward() -> None:
    loss = swin()(frames()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ReversibleError, match="second backward of one forward"):
        loss.backward()


def test_gradients_of_gradients() -> None:
    model, x = swin(), frames(requires_grad=True)
    with pytest.raises(ReversibleError, match="gradients of gradients"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_gradients_of_gradients_of_what_is_recomputed_alone() -> None:
    model, x = swin(), frames(requires_grad=True)
    stem = model.get_submodule("patch_embed")
    with pytest.raises(ReversibleError, match="patch_embed: gradients of gradients"):
        torch.autograd.grad(stem(x).sum(), x, create_graph=True)
