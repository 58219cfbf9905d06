"""Bit for bit: what is rebuilt, and the gradients, against the same network storing activations."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import rewire, set_reversible
from re2tal.reversible.settings import Budget
from re2tal.reversible.watch import Witness
from tests.reversible.toy_blocks import assert_same_step, one_step
from tests.reversible.zoo import ZOO, Built, features

every_model = pytest.mark.parametrize("name", ZOO)
both_precisions = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])

RESNETS = ("r3d", "mc3", "r2plus1d")
DEPTHS = {"timesformer_divided": 32, **dict.fromkeys(RESNETS, 48)}
"""Of a stage of 96 branches or more; a ResNet's blocks have one branch, and two stages together."""


class Precision(nn.Module):
    """A model called in float32 or under autocast, and the tensor to take a loss of."""

    def __init__(self, inner: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self.inner = inner
        self.bf16 = bf16

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            return features(self.inner(*inputs))


def built(name: str, *, bf16: bool, depth: int = 2, drop: float = 0.2) -> Built:
    """A model of the zoo in training mode, and its inputs, which need gradients."""
    torch.manual_seed(0)
    model, inputs = ZOO[name](depth=depth, drop=drop)
    # Running the model once would draw other weights for nothing; its own are not zero anywhere
    # but in biases, which is where gradients begin, not where they end.
    return Precision(model.train(), bf16=bf16), tuple(x.requires_grad_() for x in inputs)


class Rebuilt:
    """Counts the stages whose two input streams were rebuilt, and whether each bit was."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stages: list[str] = []
        remember, compare = Witness.__init__, Witness.compare
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def remembering(
            witness: Witness, watch: Any, current: Tensor, previous: Tensor, *rest: Any
        ) -> None:
            remember(witness, watch, current, previous, *rest)
            kept[id(witness)] = current.detach().clone(), previous.detach().clone()

        def comparing(witness: Witness, current: Tensor, previous: Tensor) -> None:
            before = kept.pop(id(witness))
            assert torch.equal(current, before[0])
            assert torch.equal(previous, before[1])
            self.stages.append(witness._where)
            compare(witness, current, previous)

        patch.setattr(Witness, "__init__", remembering)
        patch.setattr(Witness, "compare", comparing)


def assert_bit_equal(
    model: nn.Module, inputs: tuple[Tensor, ...], stages: int, patch: pytest.MonkeyPatch
) -> None:
    """Output, gradients of all parameters and inputs, and the input of every stage."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    set_reversible(model, False)
    stored = one_step(model, *inputs)
    after = {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(buffers, strict=False)
    set_reversible(model, True)
    with patch.context() as context:
        rebuilt = Rebuilt(context)
        found = one_step(model, *inputs)
    assert_same_step(found, stored)
    assert len(set(rebuilt.stages)) == len(rebuilt.stages) == stages
    assert all(torch.equal(b, after[name]) for name, b in model.named_buffers())
    assert found.output.isfinite().all()
    missing = [n for n, g in found.gradients.items() if g is None or not g.isfinite().all()]
    assert missing == [name for name in missing if name.endswith(UNUSED)]


UNUSED = ("mask_token", "position_embeddings")
"""Parameters that a model holds without using them here."""


@every_model
@both_precisions
@pytest.mark.parametrize("budget", ["auto", 1])
def test_a_step_of_a_rewired_model(
    name: str, bf16: bool, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = built(name, bf16=bf16)
    report = rewire(model, slice_bytes=budget)
    assert_bit_equal(model, inputs, len(report.stages), monkeypatch)


@every_model
@both_precisions
def test_a_step_with_the_pretrained_skip_connection_as_well(
    name: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = built(name, bf16=bf16)
    report = rewire(model, alpha=0.4, beta=1.0)
    assert_bit_equal(model, inputs, len(report.stages), monkeypatch)
