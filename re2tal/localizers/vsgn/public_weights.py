"""Weights of the authors' release of VSGN, for ours.

Both compute the same function of an unpadded window, see `tests/localizers/test_vsgn_weights.py`;
only names differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

_LISTED = 10


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of the authors' release.

    Args:
        state: theirs, with or without the "module." that DataParallel puts before each name.

    Returns:
        All that `VSGN.load_state_dict` needs, for as many levels and layers as `state` has.

    Raises:
        ValueError: Lists every weight that is missing or unknown.
    """
    given = {name.removeprefix("module."): value for name, value in state.items()}
    ours = {
        f"{theirs}.{kind}": f"{name}.{kind}"
        for theirs, name in _layers(given)
        for kind in ("weight", "bias")
    }
    problems = [f"{name} is missing" for name in sorted(ours.keys() - given.keys())]
    problems += [f"{name} is unknown" for name in sorted(given.keys() - ours.keys())]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:_LISTED])
        rest = len(problems) - _LISTED
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"These are not the weights of a VSGN: {len(problems)} do not fit. Give the "
            f"'state_dict' of a checkpoint.\n{listed}{more}"
        )
    return {ours[name]: value for name, value in given.items()}


def _layers(given: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Their name and ours of each layer, for a network as deep as that of `given`."""
    levels = max(1, _count(given, r"xGPN\.levels_enc\.(\d+)\."))
    # In their towers every third module is a convolution, followed by its norm and a ReLU.
    layers = -(-_count(given, r"head_dec\.cls_tower\.(\d+)\.") // 3)
    yield "xGPN.conv0.0", "pyramid.stem"
    for i in range(levels):
        if any(name.startswith(f"xGPN.levels_enc.{i}.0.") for name in given):
            yield f"xGPN.levels_enc.{i}.0", f"pyramid.encoder.{i}.conv"
        else:
            yield f"xGPN.levels_enc.{i}.tconv1", f"pyramid.encoder.{i}.conv"
            yield f"xGPN.levels_enc.{i}.nconv1.mlp", f"pyramid.encoder.{i}.edge"
        yield f"xGPN.levels1.{i}.0", f"pyramid.outs.{i}"
    for i in range(levels - 1):
        yield f"xGPN.levels2.{i}.0", f"pyramid.laterals.{i}"
        yield f"xGPN.levels_dec.{i}.0", f"pyramid.ups.{i}"
    for tower, last, head in (
        ("cls_tower", "cls_logits", "class_head"),
        ("bbox_tower", "bbox_pred", "segment_head"),
    ):
        for i in range(layers):
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
