"""Weights of ActionFormer's public implementation, for ours.

Both compute the same function, see `tests/localizers/test_actionformer_weights.py`; only names
and axes of length one differ. To get what their evaluation gets, pad each video as it does: to the
length of the training's windows, or when it is longer to the next multiple of the largest
`2^level * (attention window - 1)` (`2^level` where attention is global); see `TransformerPyramid`.
Trained with a drop path of 0, theirs has no residual scales; such weights do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from re2tal.localizers.actionformer import ActionFormer, ActionFormerConfig
from re2tal.localizers.public_weights import fitted, read, without_prefix

# From our names to theirs; each rule changes another part of a name.
_RENAMED = (
    (r"^pyramid\.embed\.streams\.(\d+)\.", r"backbone.proj.\1.conv."),
    (r"^pyramid\.embed\.convs\.(\d+)\.", r"backbone.embd.\1.conv."),
    (r"^pyramid\.embed\.norms\.", "backbone.embd_norm."),
    (r"^pyramid\.(stem|branch)\.", r"backbone.\1."),
    (r"^pyramid\.norms\.", "neck.fpn_norms."),
    (r"\.(query|key|value)_conv\.", r".\1_conv.conv."),
    (r"\.scale_(attn|mlp)\.", r".drop_path_\1."),
    (r"^class_head\.last\.", "cls_head.cls_head.conv."),
    (r"^class_head\.norms\.", "cls_head.norm."),
    (r"^class_head\.convs\.(\d+)\.", r"cls_head.head.\1.conv."),
    (r"^offset_head\.last\.", "reg_head.offset_head.conv."),
    (r"^offset_head\.norms\.", "reg_head.norm."),
    (r"^offset_head\.convs\.(\d+)\.", r"reg_head.head.\1.conv."),
)
_OFFSET_SCALE = "offset_scale.scale"  # theirs is a scalar for each level
_NORMALIZER = "normalizer.mean"  # theirs is not saved
# Tables that follow from the configuration; we make them ourselves.
_TABLES = ("point_generator.", "backbone.pos_embd")


def load_public_weights(model: ActionFormer, path: str | Path) -> None:
    """Loads a checkpoint of the public implementation.

    Args:
        model: what it is for, built with the same settings.
        path: `.safetensors`, or what the public training wrote (`.pth.tar`), which is read without
            unpickling anything but tensors. Of a whole checkpoint the moving average of the
            weights is taken, as their evaluation does.

    Raises:
        ValueError: If it cannot be read, or lists every weight that is missing, unknown or has
            another shape.
    """
    path = Path(path)
    model.load_state_dict(_translate(read(path), model.state_dict(), model.config, str(path)))


def convert(state: Mapping[str, Tensor], config: ActionFormerConfig) -> dict[str, Tensor]:
    """Renames the weights of the public implementation.

    Args:
        state: theirs, with or without the "module." that DataParallel puts before each name.
        config: the settings that they were trained with.

    Returns:
        All that `ActionFormer.load_state_dict` needs, for as many channels and classes as `state`
        has. The running mean of positive points, which theirs does not save, starts anew.

    Raises:
        ValueError: Lists every weight that is missing, unknown or has another shape.
    """
    state = without_prefix(state)
    in_streams = sum(channels for channels, _ in config.streams)
    channels = in_streams or _size(state, "backbone.embd.0.conv.weight", 1)
    with torch.device("meta"):
        model = config.build(channels, _size(state, "cls_head.cls_head.conv.bias", 0))
    return _translate(state, model.state_dict(), config, "the given state")


def _size(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Of a weight that may be missing, which is found out later."""
    return state[name].shape[axis] if name in state else 1


def _translate(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    config: ActionFormerConfig,
    source: str,
) -> dict[str, Tensor]:
    """`state` by the names and in the shapes of `wanted`, plus the normaliser's start."""
    given = {
        name: value for name, value in without_prefix(state).items() if not name.startswith(_TABLES)
    }
    theirs = fitted(given, dict(_public(wanted)), source=source, localizer="ActionFormer")
    scales = [theirs[f"reg_head.scale.{level}.scale"] for level in range(config.levels)]
    special = {
        _OFFSET_SCALE: torch.stack(scales),
        _NORMALIZER: torch.tensor(config.initial_normalizer),
    }
    return special | {name: theirs[_renamed(name)] for name in wanted if name not in special}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _public(wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their names of our weights, with tensors of our shapes."""
    for name, value in wanted.items():
        if name == _OFFSET_SCALE:
            yield from ((f"reg_head.scale.{i}.scale", scale) for i, scale in enumerate(value))
        elif name != _NORMALIZER:
            yield _renamed(name), value
