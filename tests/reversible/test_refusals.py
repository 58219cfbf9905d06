"""What a reversible stage cannot do ends in an error, never in a wrong gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import ReversibleError, rewire, set_reversible
from tests.reversible.toy_blocks import MlpBlock, PairBlock


def stack(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock() for _ in range(depth)))
    rewire(model)
    return model


def test_a_second_backward() -> None:
    model = stack()
    loss = model(torch.randn(2, 6)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ReversibleError, match=r"2 \(mlp\) was asked for a second backward"):
        loss.backward()


def test_a_second_backward_through_part_of_the_stage() -> None:
    model = stack()
    loss = model(torch.randn(2, 6)).sum()
    torch.autograd.grad(loss, list(model[2].parameters()), retain_graph=True)
    with pytest.raises(ReversibleError, match="second backward"):
        loss.backward()


def test_gradients_of_gradients() -> None:
    model, x = stack(), torch.randn(2, 6, requires_grad=True)
    with pytest.raises(ReversibleError, match="gradients of gradients"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    set_reversible(model, False)
    (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    assert gradient.requires_grad


def test_a_step_of_the_optimizer_between_forward_and_backward() -> None:
    model = stack()
    loss = model(torch.randn(2, 6)).sum()
    with torch.no_grad():
        model[1].get_parameter("two.bias").add_(1)
    with pytest.raises(ReversibleError, match=r"1 \(mlp\): a parameter .* was modified in place"):
        loss.backward()


def test_statistics_that_a_stage_in_eval_mode_used_and_that_changed_since() -> None:
    model = nn.Sequential(PairBlock(nn.BatchNorm1d(6), nn.Linear(6, 6)))
    rewire(model)
    loss = model.eval()(torch.randn(4, 6)).sum()
    model.train()(torch.randn(4, 6))
    with pytest.raises(ReversibleError, match=r"0 \(first\): the buffer .* was modified in place"):
        loss.backward()


def test_swapped_parameters() -> None:
    model, x = stack(), torch.randn(2, 6)
    values = {n: (p * 2).detach().requires_grad_() for n, p in model.named_parameters()}
    loss = torch.func.functional_call(model, values, (x,)).sum()
    with pytest.raises(ReversibleError, match="other parameters now than in its forward"):
        loss.backward()


def test_an_input_that_was_modified_after_the_forward() -> None:
    model, x = stack(1), torch.randn(2, 6)
    truth = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    loss = model(x).sum()
    x.zero_()  # the streams are on the grid: a copy
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    rewire(model, exact=False)
    x = torch.randn(2, 6)
    loss = model(x).sum()
    x.zero_()
    with pytest.raises(ReversibleError, match="input of the stage was modified in place"):
        loss.backward()


class Resize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:1]


class Counts(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("reversible", [True, False])
def test_a_branch_that_changes_the_shape(reversible: bool) -> None:
    model = nn.Sequential(PairBlock(nn.Linear(6, 6), Resize()))
    rewire(model)
    set_reversible(model, reversible)
    with pytest.raises(
        ReversibleError, match=r"0 \(second\) turns the shape \(4, 6\) into \(1, 6\)"
    ):
        model(torch.randn(4, 6))


@pytest.mark.parametrize("reversible", [True, False])
def test_a_branch_that_modifies_its_input(reversible: bool) -> None:
    model = nn.Sequential(PairBlock(nn.Linear(6, 6), nn.ReLU(inplace=True)))
    rewire(model)
    set_reversible(model, reversible)
    with pytest.raises(ReversibleError, match=r"0 \(second\) modifies its input in place"):
        model(torch.randn(4, 6))


class Borrows(nn.Module):
    def __init__(self, lent: Tensor) -> None:
        super().__init__()
        self._lent = [lent]

    def forward(self, x: Tensor) -> Tensor:
        return x * self._lent[0].exp()


def test_a_branch_with_a_tensor_from_elsewhere() -> None:
    lent = torch.zeros(6, requires_grad=True)
    model = nn.Sequential(PairBlock(nn.Linear(6, 6), Borrows(lent)))
    rewire(model)
    with pytest.raises(ReversibleError, match=r"0 \(second\) uses a tensor of shape \(6,\)"):
        model(torch.randn(4, 6))
    set_reversible(model, False)
    model(torch.randn(4, 6)).sum().backward()
    assert lent.grad is not None


def test_a_branch_with_a_state_of_its_own() -> None:
    model = nn.Sequential(PairBlock(nn.Linear(6, 6), Counts()))
    rewire(model)
    with pytest.raises(ReversibleError, match="changed the buffer 'calls' of Counts"):
        model(torch.randn(4, 6))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m[1].register_forward_hook(lambda *_: None), "hooks of its own"),
        (lambda m: m.__setitem__(1, nn.Linear(6, 6)), "no family is registered for Linear"),
    ],
)
def test_a_block_that_was_edited_after_rewiring(
    edit: Callable[[nn.Module], object], reason: str
) -> None:
    model = stack()
    edit(model)
    with pytest.raises(ReversibleError, match=f"Block 1 was rewired, but .*{reason}"):
        model(torch.randn(2, 6))
