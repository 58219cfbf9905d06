"""Gradients of a stage against equations and stored activations, and refusals of wrong ones."""

import gc
import re
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import psutil
import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import ReversibleError, rewire, set_coupling, set_reversible
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    RectifiedBlock,
    assert_equal_gradients,
    assert_reversible_is_stored,
    one_step,
    points,
    squares,
    stack,
    tiny_swin,
)


def swin(slice_bytes: int | None = 2**14) -> nn.Module:
    """Branches in pieces, with a recomputed stem and a recomputed down-sampling layer."""
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.3)
    report = rewire(model, slice_bytes=slice_bytes)
    assert sum(left.recomputed for left in report.left_out) == 2
    return model


def frames(*, requires_grad: bool = False) -> Tensor:
    return torch.randn(2, 3, 4, 32, 32, requires_grad=requires_grad)


either_model = pytest.mark.parametrize(("build", "inputs"), [(stack, points), (swin, frames)])


# The equations


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.0, 1.0), (0.3, 0.7), (0.6, 0.3), (1.0, 0.5), (0.0, 0.4), (1.0, 1e-12)]
)
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("kind", [MlpBlock, RectifiedBlock])
def test_gradients_are_those_of_the_equations(
    alpha: float, beta: float, depth: int, kind: Callable[[], nn.Module]
) -> None:
    """x_i = a(F(x_{i-1}) + alpha x_{i-1}) + beta x_{i-2}."""

    def increment(block: nn.Module, x: Tensor) -> Tensor:
        if isinstance(block, RectifiedBlock):
            return torch.relu(block.linear(x) + alpha * x)
        assert isinstance(block, MlpBlock)
        return block.branch(x) + alpha * x

    torch.manual_seed(0)
    model = nn.Sequential(*(kind() for _ in range(depth))).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    original = model(x)
    rewire(model, exact=False)
    set_coupling(model, alpha=alpha, beta=beta)
    found = one_step(model, x)
    previous, current = x, x
    for block in model:
        previous, current = current, increment(block, current) + beta * previous
    y = (current + beta * previous) / (1 + beta)
    torch.testing.assert_close(found.output, y)
    truth = torch.autograd.grad(squares(y), [x, *model.parameters()])
    # The float32 loss limits the precision; a wrong equation is off by a whole gradient.
    for gradient, reference in zip(found.gradients.values(), truth, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-8)
    if (alpha, beta) == (1.0, 1e-12):
        torch.testing.assert_close(found.output, original)


def test_a_leaf_input_gets_its_gradient_once() -> None:
    x = points(requires_grad=True)
    model = nn.Sequential(PairBlock(nn.Identity(), nn.Identity()))
    rewire(model, exact=False)
    # x1 = x + x, x2 = x1 + x, output (x1 + x2) / 2 = 2.5 x
    result = one_step(model, x, loss=lambda y: y.sum())
    torch.testing.assert_close(result.gradients["input 0"], torch.full_like(x, 2.5))


# Stored activations


def test_an_activation_moves_into_an_exact_branch() -> None:
    model = nn.Sequential(*(RectifiedBlock() for _ in range(3)))
    rewire(model, alpha=0.5)
    assert_reversible_is_stored(model, points(requires_grad=True))


def test_swin_on_float_streams_is_close() -> None:
    torch.manual_seed(0)
    model = tiny_swin((1, 4), drop_path=0.2)
    rewire(model, exact=False)
    assert_reversible_is_stored(model, frames(), tolerance=1e-4)


def test_a_frozen_stem_still_trains_the_stage() -> None:
    model = swin()
    model.get_submodule("patch_embed").requires_grad_(False)
    result = assert_reversible_is_stored(model, frames())
    for name, gradient in result.gradients.items():
        assert (gradient is None) == name.startswith(("patch_embed", "input")), name


@pytest.mark.parametrize("frozen", ["one", "^0", "^3", "^[12]", "^[012]", ""])
@pytest.mark.parametrize("needs_input", [True, False])
def test_frozen_parameters_are_passed_through(frozen: str, needs_input: bool) -> None:
    model, x = stack(), points(requires_grad=needs_input)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not re.search(frozen, name))
    if not frozen and not needs_input:
        assert not model(x).requires_grad
        return
    for name, gradient in assert_reversible_is_stored(model, x).gradients.items():
        if not name.startswith("input"):
            assert (gradient is None) == bool(re.search(frozen, name))


def test_an_unused_parameter_gets_none() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = nn.Sequential(PairBlock(Spare(), Spare()))
    rewire(model)
    for name, gradient in assert_reversible_is_stored(model, points()).gradients.items():
        assert (gradient is None) == ("spare" in name or "input" in name)


def test_a_block_used_twice_gets_the_sum_of_its_gradients() -> None:
    torch.manual_seed(0)
    block = MlpBlock()
    model = nn.Sequential(block, MlpBlock(), block)
    assert rewire(model).stages[0].branches == 3
    assert_reversible_is_stored(model, points(requires_grad=True))


@pytest.mark.parametrize("exact", [True, False])
def test_an_empty_batch(exact: bool) -> None:
    model = tiny_swin((2,))
    rewire(model, exact=exact)
    y = model(torch.empty(0, 3, 4, 16, 16))
    y.sum().backward()
    assert y.shape == (0, 3)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_sequences_may_be_nested() -> None:
    torch.manual_seed(0)
    inner = [nn.Sequential(MlpBlock(dropout=0.2), MlpBlock()) for _ in range(2)]
    model = nn.Sequential(PairBlock(*inner), MlpBlock())
    report = rewire(model)
    assert [s.container for s in report.stages] == ["", "0.first", "0.second"]
    assert_reversible_is_stored(model, points(requires_grad=True))


def test_gradients_of_some_parameters_only() -> None:
    model, x = stack(), points()
    names = ["1.one.weight", "3.two.bias"]
    gradients = []
    for reversible in (True, False):
        set_reversible(model, reversible)
        wanted = [model.get_parameter(name) for name in names]
        gradients.append(torch.autograd.grad(squares(model(x)), wanted))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_hooks_of_parameters_and_of_modules_inside_a_block_run_once() -> None:
    model = stack()
    parameter, calls = model.get_parameter("1.one.weight"), list[str]()
    seen: list[Tensor] = []

    def halve(gradient: Tensor) -> Tensor:
        calls.append("hook")
        return gradient / 2

    parameter.register_hook(halve)
    parameter.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    module = model.get_submodule("2.one")
    module.register_full_backward_hook(lambda _m, _inputs, outputs: seen.extend(outputs))
    assert_reversible_is_stored(model, points())
    assert calls == ["hook", "accumulated"] * 2
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_an_in_place_operation_around_the_stage() -> None:
    stage = stack(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), stage, nn.ReLU(inplace=True))
    assert_reversible_is_stored(model, points(requires_grad=True))


# Forwards without a backward, and backwards in other orders


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
    assert torch.equal(model(x), result.output)  # drop path drops nothing, whatever the seed


def test_an_evaluation_between_forward_and_backward() -> None:
    model, x = swin(), frames()

    def evaluate(y: Tensor) -> Tensor:
        with torch.inference_mode():
            model.eval()(x)
        model.train()
        return squares(y)

    assert_equal_gradients(one_step(model, x, loss=evaluate), one_step(model, x))


@pytest.mark.parametrize(("slice_bytes", "tolerance"), [(None, 0.0), (2**14, 1e-6)])
def test_two_forwards_before_one_backward(slice_bytes: int | None, tolerance: float) -> None:
    # With stored activations a parameter's gradients of all pieces of both forwards are summed one
    # by one; rebuilt, those of each forward are summed first.
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


def test_an_unused_output_costs_nothing_and_breaks_nothing() -> None:
    model, x = swin(), frames(requires_grad=True)
    unused = model(x)
    (3 * x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3))
    assert all(p.grad is None for p in model.parameters())
    truth = one_step(model, x)
    del unused
    assert_equal_gradients(one_step(model, x), truth)


# Memory over steps


def live_tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_the_streams_are_freed_by_the_backward_itself() -> None:
    """Also if frozen blocks below keep the tape from being rewound to its start."""
    model = stack()
    model[0].requires_grad_(False)
    kept: list[weakref.ref[object]] = []
    model[3].get_submodule("two").register_forward_hook(
        lambda _m, _i, out: kept.append(weakref.ref(out.untyped_storage()))
    )
    loss = model(points()).sum()
    before = live_tensors()
    loss.backward()
    gradients = sum(p.grad is not None for p in model.parameters())
    # The two streams are freed. All that the graph still holds are the new gradients.
    assert live_tensors() == before + gradients - 2
    assert all(reference() is None for reference in kept)


@pytest.mark.slow
def test_memory_does_not_grow_over_60_steps() -> None:
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.2, dropout=0.1)
    rewire(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    process = psutil.Process()

    def steps(count: int) -> tuple[int, int]:
        for index in range(count):
            x = torch.randn(2, 3, 4, 32, 32)
            with torch.autocast("cpu", torch.bfloat16, enabled=index % 2 == 1):
                loss = model(x).float().square().sum()
            if index % 5:  # every fifth forward gets no backward
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        del loss
        return live_tensors(), process.memory_info().rss

    steps(30)
    gc.collect()
    gc.disable()  # memory that only the cycle collector would free counts as growth
    try:
        tensors, resident = steps(20)
        after, grown = steps(60)
    finally:
        gc.enable()
    assert after == tensors
    assert grown - resident < 4 * 2**20  # the streams alone of one step are 0.3 MB


# Refusals: an error, never a wrong gradient


@either_model
def test_a_second_backward(build: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> None:
    loss = build()(inputs()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ReversibleError, match=r"\(mlp\) was asked for a second backward of one fo"):
        loss.backward()


def test_a_second_backward_through_part_of_the_stage() -> None:
    model = stack()
    loss = model(points()).sum()
    torch.autograd.grad(loss, list(model[2].parameters()), retain_graph=True)
    with pytest.raises(ReversibleError, match="second backward"):
        loss.backward()


@either_model
def test_gradients_of_gradients(
    build: Callable[[], nn.Module], inputs: Callable[..., Tensor]
) -> None:
    model, x = build(), inputs(requires_grad=True)
    with pytest.raises(ReversibleError, match="gradients of gradients"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    if build is swin:
        stem = model.get_submodule("patch_embed")
        with pytest.raises(ReversibleError, match="patch_embed: gradients of gradients"):
            torch.autograd.grad(stem(x).sum(), x, create_graph=True)
    else:
        set_reversible(model, False)
        (gradient,) = torch.autograd.grad(squares(model(x)), x, create_graph=True)
        assert gradient.requires_grad


@either_model
def test_torch_func_works_on_stored_activations(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor]
) -> None:
    model, x = build().eval(), inputs()
    rewire(model, slice_bytes=20_000)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return squares(torch.func.functional_call(model, values, (x,)))

    with pytest.raises(ReversibleError, match=r"torch\.func"):
        torch.func.grad(loss)(parameters)
    set_reversible(model, False)
    found = torch.func.grad(loss)(parameters)
    truth = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for a, b in zip(found.values(), truth, strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_of_the_optimizer_between_forward_and_backward() -> None:
    model = stack()
    loss = model(points()).sum()
    with torch.no_grad():
        model[1].get_parameter("two.bias").add_(1)
    with pytest.raises(ReversibleError, match=r"1 \(mlp\): a parameter .* was modified in place"):
        loss.backward()


def test_statistics_that_a_stage_in_eval_mode_used_and_that_changed_since() -> None:
    model = nn.Sequential(PairBlock(nn.BatchNorm1d(6), nn.Linear(6, 6)))
    rewire(model)
    loss = model.eval()(points()).sum()
    model.train()(points())
    with pytest.raises(ReversibleError, match=r"0 \(first\): the buffer .* was modified in place"):
        loss.backward()


def test_swapped_parameters() -> None:
    model = stack()
    values = {n: (p * 2).detach().requires_grad_() for n, p in model.named_parameters()}
    loss = torch.func.functional_call(model, values, (points(),)).sum()
    with pytest.raises(ReversibleError, match="other parameters now than in its forward"):
        loss.backward()


def test_an_input_that_was_modified_after_the_forward() -> None:
    model, x = stack(1), points()  # of one block, the input is on the tape

    def zeroed(y: Tensor) -> Tensor:
        x.zero_()
        return squares(y)

    # On the grid the streams are copies of the input.
    assert_equal_gradients(one_step(model, x, loss=zeroed), one_step(model, points()))
    rewire(model, exact=False)
    with pytest.raises(ReversibleError, match="input of the stage was modified in place"):
        one_step(model, x, loss=zeroed)


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


class Borrows(nn.Module):
    def __init__(self, lent: Tensor) -> None:
        super().__init__()
        self._lent = [lent]

    def forward(self, x: Tensor) -> Tensor:
        return x * self._lent[0].exp()


LENT = torch.zeros(6, requires_grad=True)


@pytest.mark.parametrize(
    ("second", "message", "when_stored"),
    [
        (Resize(), r"0 \(second\) turns the shape \(5, 6\) into \(1, 6\)", True),
        (nn.ReLU(inplace=True), r"0 \(second\) modifies its input in place", True),
        (Borrows(LENT), r"0 \(second\) uses a tensor of shape \(6,\)", False),
        (Counts(), "changed the buffer 'calls' of Counts", False),
    ],
)
def test_a_branch_that_cannot_be_rebuilt(
    second: nn.Module, message: str, when_stored: bool
) -> None:
    model = nn.Sequential(PairBlock(nn.Linear(6, 6), second))
    rewire(model)
    with pytest.raises(ReversibleError, match=message):
        model(points())
    set_reversible(model, False)
    if when_stored:
        with pytest.raises(ReversibleError, match=message):
            model(points())
        return
    LENT.grad = None
    model(points()).sum().backward()
    assert (LENT.grad is not None) == isinstance(second, Borrows)
