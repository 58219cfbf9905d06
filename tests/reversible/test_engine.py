"""The reversible run against the run that stores its activations, and against plain equations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import ReversibleError, rewire, set_coupling, set_reversible
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    RectifiedBlock,
    StepResult,
    assert_reversible_is_stored,
    assert_same_step,
    one_step,
    tiny_swin,
)


def stack(depth: int = 4, *, exact: bool = True, **block: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock(**block) for _ in range(depth))).double()  # type: ignore[arg-type]
    rewire(model, exact=exact)
    return model


def points(requires_grad: bool = False) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, requires_grad=requires_grad)


def assert_follows_the_equations(
    model: nn.Sequential,
    x: Tensor,
    alpha: float,
    beta: float,
    increment: Callable[[nn.Module, Tensor], Tensor],
) -> StepResult:
    """A step of the rewired model against the equations and autograd."""
    set_coupling(model, alpha=alpha, beta=beta)
    found = one_step(model, x)
    previous, current = x, x
    for block in model:
        previous, current = current, increment(block, current) + beta * previous
    y = (current + beta * previous) / (1 + beta)
    torch.testing.assert_close(found.output, y)
    truth = torch.autograd.grad(y.float().pow(2).sum(), [x, *model.parameters()])
    # The float32 loss bounds what can be compared; a wrong equation is off by a whole gradient.
    for gradient, reference in zip(found.gradients.values(), truth, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-8)
    return found


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.3, 0.7), (1.0, 0.5), (0.0, 0.4)])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_gradients_are_those_of_the_equations(alpha: float, beta: float, depth: int) -> None:
    def increment(block: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(block, MlpBlock)
        return block.branch(x) + alpha * x

    model = stack(depth, exact=False)
    assert_follows_the_equations(model, points(requires_grad=True), alpha, beta, increment)


def test_an_activation_after_the_addition_moves_into_the_branch() -> None:
    """x_i = relu(F(x_{i-1}) + alpha x_{i-1}) + beta x_{i-2}: the block itself at (1, 0)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(RectifiedBlock() for _ in range(3))).double()
    x = points(requires_grad=True)
    before = model(x)
    rewire(model, exact=False)
    for alpha, beta in ((0.0, 1.0), (0.6, 0.3), (1.0, 1e-12)):

        def increment(block: nn.Module, x: Tensor, alpha: float = alpha) -> Tensor:
            assert isinstance(block, RectifiedBlock)
            return torch.relu(block.linear(x) + alpha * x)

        found = assert_follows_the_equations(model, x, alpha, beta, increment)
    torch.testing.assert_close(found.output, before)
    rewire(model, alpha=0.5)
    assert_reversible_is_stored(model, x)


def test_swin_with_drop_path_and_dropout() -> None:
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.3, dropout=0.2).double().train()
    rewire(model)
    x = torch.randn(3, 3, 4, 32, 32, dtype=torch.float64, requires_grad=True)
    result = assert_reversible_is_stored(model, x)
    assert all(g is not None for g in result.gradients.values())


def test_swin_on_float_streams_is_close() -> None:
    torch.manual_seed(0)
    model = tiny_swin((1, 4), drop_path=0.2).train()
    rewire(model, exact=False)
    assert_reversible_is_stored(model, torch.randn(2, 3, 4, 32, 32), tolerance=1e-4)


def test_an_input_without_gradient_still_trains_the_stage() -> None:
    result = assert_reversible_is_stored(stack(), points())
    assert result.gradients.pop("input 0") is None
    assert all(g is not None and g.abs().sum() > 0 for g in result.gradients.values())


def test_a_frozen_stem_still_trains_the_stage() -> None:
    model = tiny_swin((2, 2)).double()
    model.patch_embed.requires_grad_(False)
    rewire(model)
    x = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    result = assert_reversible_is_stored(model, x)
    for name, gradient in result.gradients.items():
        assert (gradient is None) == name.startswith(("patch_embed", "input")), name


@pytest.mark.parametrize("frozen", [(0,), (3,), (1, 2), (0, 1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("needs_input", [True, False])
def test_frozen_blocks_are_passed_through(frozen: tuple[int, ...], needs_input: bool) -> None:
    model, x = stack(), points(needs_input)
    for index in frozen:
        model[index].requires_grad_(False)
    if len(frozen) == 4 and not needs_input:
        assert not model(x).requires_grad
        return
    result = assert_reversible_is_stored(model, x)
    for name, gradient in result.gradients.items():
        if not name.startswith("input"):
            assert (gradient is None) == (int(name[0]) in frozen)


def test_partly_frozen_branches() -> None:
    model = stack()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("one" not in name)
    assert_reversible_is_stored(model, points())


def test_a_leaf_input_gets_its_gradient_once() -> None:
    x = points(requires_grad=True)
    model = nn.Sequential(PairBlock(nn.Identity(), nn.Identity()))
    rewire(model, exact=False)
    # x1 = x + x, x2 = x1 + x, output (x1 + x2) / 2 = 2.5 x
    result = one_step(model, x, loss=lambda y: y.sum())
    torch.testing.assert_close(result.gradients["input 0"], torch.full_like(x, 2.5))


def test_an_unused_output_costs_nothing_and_breaks_nothing() -> None:
    model, x = stack(), points(requires_grad=True)
    unused = model(x)
    (3 * x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))
    assert all(p.grad is None for p in model.parameters())
    del unused


def test_an_unused_parameter_gets_none() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = nn.Sequential(PairBlock(Spare(), Spare())).double()
    rewire(model)
    result = assert_reversible_is_stored(model, points())
    for name, gradient in result.gradients.items():
        assert (gradient is None) == ("spare" in name or "input" in name)


def test_a_block_used_twice_gets_the_sum_of_its_gradients() -> None:
    torch.manual_seed(0)
    block = MlpBlock()
    model = nn.Sequential(block, MlpBlock(), block).double()
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
    model = nn.Sequential(PairBlock(*inner), MlpBlock()).double()
    report = rewire(model)
    assert [s.container for s in report.stages] == ["", "0.first", "0.second"]
    assert_reversible_is_stored(model, points(requires_grad=True))


def test_gradients_of_some_parameters_only() -> None:
    model, x = stack(), points()
    names = ["1.one.weight", "3.two.bias"]
    found = [dict(model.named_parameters())[name] for name in names]
    rebuilt = torch.autograd.grad(model(x).pow(2).sum(), found)
    set_reversible(model, False)
    stored = torch.autograd.grad(model(x).pow(2).sum(), found)
    for a, b in zip(rebuilt, stored, strict=True):
        torch.testing.assert_close(a, b)


def test_parameter_hooks_run_once() -> None:
    model = stack()
    parameter = dict(model.named_parameters())["1.one.weight"]
    calls = []

    def halve(gradient: Tensor) -> Tensor:
        calls.append("hook")
        return gradient / 2

    parameter.register_hook(halve)
    parameter.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    assert_reversible_is_stored(model, points())
    assert calls == ["hook", "accumulated"] * 2


def test_module_hooks_inside_a_block_see_the_gradient() -> None:
    model = stack()
    seen: list[Tensor | None] = []
    module = model.get_submodule("2.one")
    module.register_full_backward_hook(lambda _m, _inputs, outputs: seen.extend(outputs))
    assert_reversible_is_stored(model, points())
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_gradients(mode: type[torch.no_grad]) -> None:
    model, x = stack(), points()
    truth = model(x)
    with mode():
        y = model(x)
    assert torch.equal(y, truth)
    assert not y.requires_grad


def test_eval_mode() -> None:
    model = stack(dropout=0.5).eval()
    assert_reversible_is_stored(model, points(requires_grad=True))
    assert torch.equal(model(points().zero_()), model(points().zero_()))


def test_a_low_precision_model_keeps_float32_streams() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock(16) for _ in range(6)))
    rewire(model)
    x = torch.randn(8, 16)
    truth = one_step(model, x)
    model.bfloat16()
    found = one_step(model, x.bfloat16())
    assert found.output.dtype == torch.bfloat16
    for name, gradient in found.gradients.items():
        reference = truth.gradients[name]
        if gradient is not None and reference is not None:
            assert (gradient - reference).norm() < 0.05 * reference.norm(), name


def test_an_in_place_operation_around_the_stage() -> None:
    torch.manual_seed(0)
    stage = nn.Sequential(MlpBlock())
    rewire(stage)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), stage, nn.ReLU(inplace=True))
    assert_reversible_is_stored(model.double(), points(requires_grad=True))


def test_a_float32_step_matches_the_step_of_the_same_seed() -> None:
    model = stack(dropout=0.4)
    x = points()
    assert_same_step(one_step(model, x, seed=3), one_step(model, x, seed=3))


@pytest.mark.parametrize("swin", [False, True])
def test_torch_func_works_on_stored_activations(swin: bool) -> None:
    model, x = stack(), points()
    if swin:
        model, x = tiny_swin((2,)).double(), torch.randn(1, 3, 4, 16, 16, dtype=torch.float64)
        rewire(model, slice_bytes=20_000, recompute=False)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (x,)).pow(2).sum()
        return result

    with pytest.raises(ReversibleError, match=r"torch\.func"):
        torch.func.grad(loss)(parameters)
    set_reversible(model, False)
    found = torch.func.grad(loss)(parameters)
    truth = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for a, b in zip(found.values(), truth, strict=True):
        torch.testing.assert_close(a, b)
