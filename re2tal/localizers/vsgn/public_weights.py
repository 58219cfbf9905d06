"""Weights of the authors' release of VSGN, for ours.

Both compute the same function of an unpadded window, see `tests/localizers/test_vsgn_weights.py`;
only names differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from re2tal.localizers.public_weights import fitted, read, without_prefix
from re2tal.localizers.vsgn.model import VSGN


def load_public_weights(model: VSGN, path: str | Path) -> None:
    """Loads a checkpoint of the authors' release.

    Args:
        model: what it is for, built with the same settings.
        path: `.safetensors`, or what the release's training wrote (`.pth.tar`), which is read
            without unpickling anything but tensors.

    Raises:
        ValueError: If it cannot be read, or lists every weight that is missing, unknown or has
            another shape.
    """
    path, config, needed = Path(path), model.config, model.state_dict()
    names = _names(config.levels, config.head_layers, graph=config.graph)
    wanted = {theirs: needed[ours] for theirs, ours in names.items()}
    given = fitted(without_prefix(read(path)), wanted, source=str(path), localizer="VSGN")
    model.load_state_dict({names[theirs]: value for theirs, value in given.items()})


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of the authors' release.

    Args:
        state: theirs, with or without the "module." that DataParallel puts before each name.

    Returns:
        All that `VSGN.load_state_dict` needs, for as many levels and layers as `state` has.

    Raises:
        ValueError: Lists every weight that is missing or unknown.
    """
    given = without_prefix(state)
    names = _names(
        max(1, _count(given, r"xGPN\.levels_enc\.(\d+)\.")),
        # In their towers every third module is a convolution, followed by its norm and a ReLU.
        -(-_count(given, r"head_dec\.cls_tower\.(\d+)\.") // 3),
        graph=not _count(given, r"xGPN\.levels_enc\.(\d+)\.0\."),
    )
    fitted(given, dict.fromkeys(names), source="the given state", localizer="VSGN")
    return {names[theirs]: value for theirs, value in given.items()}


def _names(levels: int, head_layers: int, *, graph: bool) -> dict[str, str]:
    """From their name of each weight to ours."""
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in _layers(levels, head_layers, graph=graph)
        for kind in ("weight", "bias")
    }


def _layers(levels: int, head_layers: int, *, graph: bool) -> Iterator[tuple[str, str]]:
    """Their name of each layer and ours."""
    yield "xGPN.conv0.0", "pyramid.stem"
    for i in range(levels):
        if graph:
            yield f"xGPN.levels_enc.{i}.tconv1", f"pyramid.encoder.{i}.conv"
            yield f"xGPN.levels_enc.{i}.nconv1.mlp", f"pyramid.encoder.{i}.edge"
        else:
            yield f"xGPN.levels_enc.{i}.0", f"pyramid.encoder.{i}.conv"
        yield f"xGPN.levels1.{i}.0", f"pyramid.outs.{i}"
    for i in range(levels - 1):
        yield f"xGPN.levels2.{i}.0", f"pyramid.laterals.{i}"
        yield f"xGPN.levels_dec.{i}.0", f"pyramid.ups.{i}"
    for tower, last, head in (
        ("cls_tower", "cls_logits", "class_head"),
        ("bbox_tower", "bbox_pred", "segment_head"),
    ):
        for i in range(head_layers):
            yield f"head_dec.{tower}.{3 * i}", f"{head}.convs.{i}"
            yield f"head_dec.{tower}.{3 * i + 1}", f"{head}.norms.{i}"
        yield f"head_dec.{last}", f"{head}.last"
    for side in ("start", "end"):
        yield f"bd_adjust.{side}_conv.0", f"adjustment.{side}.taps"
        yield f"bd_adjust.{side}_conv.2", f"adjustment.{side}.last"
    for theirs, name in (("startness", "start"), ("endness", "end"), ("actionness", "action")):
        yield f"head_{theirs}.0", f"supplementary.heads.{name}.conv"
        yield f"head_{theirs}.2", f"supplementary.heads.{name}.last"


def _count(given: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the greatest number that `pattern` finds at the start of a name."""
    found = (re.match(pattern, name) for name in given)
    return max((int(match[1]) + 1 for match in found if match), default=0)
