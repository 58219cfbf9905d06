"""`torch.compile` on modules inside the blocks and around the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from re2tal.reversible import reconstruction_errors, rewire
from tests.reversible.toy_blocks import (
    MlpBlock,
    StepResult,
    assert_reversible_is_stored,
    assert_same_step,
    one_step,
    points,
    stack,
    tiny_swin,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> None:
    # Compilations of other tests count towards the limit beyond which modules run uncompiled.
    torch._dynamo.reset()


def counting(compiled: list[torch.fx.GraphModule], name: str = "eager") -> Callable[..., Any]:
    """The backend of this name; it appends the graphs that it compiles to a list."""
    inner = lookup_backend(name)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        result: Callable[..., Any] = inner(graph, inputs)
        return result

    return backend


def renamed(result: StepResult) -> StepResult:
    """Gradients under the parameter names of the module that is not compiled."""
    return StepResult(
        output=result.output,
        gradients={n.replace("_orig_mod.", ""): g for n, g in result.gradients.items()},
        generator=result.generator,
    )


@pytest.mark.parametrize("in_place", [True, False], ids=["module.compile", "torch.compile"])
def test_modules_inside_the_blocks_can_be_compiled(in_place: bool) -> None:
    model, x = stack(3, dropout=0.2), points(requires_grad=True)
    truth = one_step(model, x)
    compiled: list[torch.fx.GraphModule] = []
    for block in model:
        assert isinstance(block, MlpBlock)
        if in_place:
            block.two.compile(backend=counting(compiled))
        else:
            block.two = torch.compile(block.two, backend=counting(compiled))  # type: ignore[assignment]
    found = assert_reversible_is_stored(model, x)
    assert compiled
    assert_same_step(renamed(found), truth)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_branches_are_rebuilt_to_the_bit(backend: str) -> None:
    torch.manual_seed(0)
    model = tiny_swin((2,), drop_path=0.3)
    rewire(model)
    compiled: list[torch.fx.GraphModule] = []
    for name, module in model.named_modules():
        if name == "features.0.0.mlp":  # just one: the C++ compiler takes seconds for each
            module.compile(backend=counting(compiled, backend))
    x = torch.randn(2, 3, 4, 32, 32)
    found = assert_reversible_is_stored(model, x)
    assert compiled
    assert list(reconstruction_errors(model).values()) == [0]
    assert all(g is not None for n, g in found.gradients.items() if not n.startswith("input"))


def test_a_compiled_branch_under_autocast() -> None:
    model, x = stack(3, dropout=0.2), points(requires_grad=True)
    for block in model:
        assert isinstance(block, MlpBlock)
        block.two.compile(backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_reversible_is_stored(model, x)
    assert list(reconstruction_errors(model).values()) == [0]


class Surrounded(nn.Module):
    """A stage with a layer before it and a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = stack(3, dropout=0.2)
        self.before, self.behind = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self.stage(self.before(x)))
        return y


def test_a_compiled_model_runs_its_stages_as_they_are() -> None:
    model, x = Surrounded(), points(requires_grad=True)
    truth = one_step(model, x)
    compiled: list[torch.fx.GraphModule] = []
    model.compile(backend=counting(compiled))
    assert_same_step(one_step(model, x), truth)
    assert len(compiled) == 2  # two graphs: before the stage, and after it
    assert_reversible_is_stored(model, x)
