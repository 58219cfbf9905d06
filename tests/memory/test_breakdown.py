"""Where a peak is and what it is made of, against steps whose every tensor is known."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from re2tal.memory import Breakdown, explain_peak, predict_peak
from re2tal.reversible import rewire
from tests.reversible.toy_blocks import MlpBlock, tiny_swin

CLIP = (1, 3, 4, 32, 32)


def made(found: Breakdown) -> dict[tuple[str, str, str], int]:
    """Bytes of activations by phase, module and operator."""
    return {
        (o.phase, o.module, o.operator): size for o, size in found.parts if o.kind == "activations"
    }


def test_every_tensor_of_a_chain_is_named() -> None:
    """y = tanh(tanh(x w)): at the peak live both tanh and the new gradient, and what was there."""
    model = nn.Sequential(nn.Linear(50, 100, bias=False), nn.Tanh(), nn.Tanh())
    found = explain_peak(model, torch.randn(200, 50))
    layer, weight = 200 * 100 * 4, 50 * 100 * 4
    parts = made(found)
    assert parts.pop(("forward", "1", "tanh")) == layer
    assert parts.pop(("forward", "2", "tanh")) == layer
    assert parts.pop(("backward", "2", "tanh_backward")) == layer
    assert sum(parts.values()) < 100  # the scalars of the loss
    assert (found.peak.phase, found.peak.module, found.peak.operator) == (
        "backward",
        "2",
        "tanh_backward",
    )
    kinds = {o.kind: size for o, size in found.parts if o.kind != "activations"}
    assert kinds == {"parameters": weight, "inputs": 200 * 50 * 4}
    assert [size for _, size in found.parts] == sorted((s for _, s in found.parts), reverse=True)


def test_gradients_are_counted_as_such_at_a_late_peak() -> None:
    """The first layer's gradient is by far the largest tensor: the peak is where it is made."""
    model = nn.Sequential(nn.Linear(500, 100, bias=False), nn.Linear(100, 7, bias=False))
    found = explain_peak(model, torch.randn(2, 500))
    assert found.peak.phase == "backward"
    assert found.peak.module == "0"
    gradients = sum(size for o, size in found.parts if o.kind == "gradients")
    assert gradients == 100 * 7 * 4


@pytest.mark.parametrize("way", ["plain", "checkpointed", "rewired"])
def test_the_parts_are_the_peak_and_the_peak_is_the_prediction(way: str) -> None:
    model = tiny_swin((2, 2), drop_path=0.1)
    if way == "rewired":
        rewire(model)
    if way == "checkpointed":
        for block in (*model.features[0], *model.features[2]):
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    x = torch.randn(CLIP)
    found = explain_peak(model, x)
    assert found.memory == predict_peak(model, x)
    assert sum(size for _, size in found.parts) == found.memory.peak
    assert all(size > 0 for _, size in found.parts)


@pytest.mark.parametrize("way", ["rewired", "checkpointed"])
def test_what_is_repeated_in_the_backward_is_named_by_its_module(way: str) -> None:
    """One block in the middle of three is a hundred times wider: the peak is in it."""
    widths = (8, 800, 8)
    blocks = nn.Sequential(*(MlpBlock(16) for _ in widths))
    for block, width in zip(blocks, widths, strict=True):
        block.one, block.two = nn.Linear(16, width), nn.Linear(width, 16)
    model = nn.ModuleDict({"stage": blocks})

    def step(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = model.get_submodule("stage")(x)
        return result

    if way == "rewired":
        rewire(model, slice_bytes=None)
    else:
        for block in blocks:
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    found = explain_peak(model, torch.randn(64, 16, requires_grad=True), step=step)
    wide = 64 * 800 * 4
    assert found.peak.phase == "backward"
    assert found.peak.module.startswith("stage.1")
    large = [key for key, size in made(found).items() if size >= wide]
    assert large
    assert all(phase == "backward" and module.startswith("stage.1") for phase, module, _ in large)


def test_a_record_leaves_no_hooks_behind_after_an_error() -> None:
    class Broken(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            raise ZeroDivisionError

    before = copy.copy(nn.modules.module._global_forward_hooks)
    with pytest.raises(ZeroDivisionError):
        explain_peak(nn.Sequential(Broken(2, 2)), torch.ones(1, 2))
    assert nn.modules.module._global_forward_hooks == before
    assert explain_peak(nn.Linear(2, 2), torch.ones(1, 2)).memory.parameters == 24
