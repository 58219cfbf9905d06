"""`torch.compile` on modules inside the blocks and around the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from re2tal.reversible import rewire
from tests.reversible.toy_blocks import MlpBlock, assert_reversible_is_stored, one_step

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock(dropout=0.2) for _ in range(3))).double()
    rewire(model)
    return model


def test_modules_inside_the_blocks_can_be_compiled() -> None:
    model, x = stack(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    truth = one_step(model, x)
    compiled = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    for block in model:
        assert isinstance(block, MlpBlock)
        block.two = torch.compile(block.two, backend=backend)  # type: ignore[assignment]
    found = assert_reversible_is_stored(model, x)
    torch.testing.assert_close(found.output, truth.output)
    torch.testing.assert_close(
        found.gradients["1.two._orig_mod.weight"], truth.gradients["1.two.weight"]
    )
    assert compiled


def test_a_compiled_model_runs_its_stages_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 6), stack(), nn.Linear(6, 6)).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    truth = one_step(model, x)
    model.compile(backend="aot_eager")
    found = one_step(model, x)
    torch.testing.assert_close(found.output, truth.output)
    for name, gradient in truth.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)
