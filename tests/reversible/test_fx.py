"""Rewired models under torch.fx, as torchvision's feature extraction traces them."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.video import swin3d_t

from re2tal.reversible import rewire


def vit() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    return model


@pytest.mark.parametrize(
    ("build", "node", "reader", "shape"),
    [
        (swin3d_t, "features.1", "features.2", (1, 3, 2, 32, 32)),  # a stage is an nn.Sequential
        (vit, "blocks.2", "norm", (1, 3, 32, 32)),  # the model calls its blocks one by one
    ],
)
def test_feature_extraction_sees_a_stage_as_one_operation(
    build: Callable[[], nn.Module], node: str, reader: str, shape: tuple[int, ...]
) -> None:
    model = build()
    rewire(model)
    extractor = create_feature_extractor(model.eval(), [node])
    seen: list[Tensor] = []
    next_module = model.get_submodule(reader)
    hook = next_module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    frames = torch.randn(shape)
    model(frames)
    hook.remove()
    found = extractor(frames)[node]
    assert torch.equal(found, seen[0])
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.get_submodule(node).parameters())
