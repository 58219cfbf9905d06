"""Metric names that MLflow accepts.

MLflow refuses a whole request if one metric's name is too long, or has characters other than
letters, digits, `_`, `-`, `.`, `:`, spaces and slashes. A slash separates a group from the name.
"""

import re
from collections.abc import Sequence

MAP = "val/mAP"
EPOCH = "epoch"  # of an evaluation or checkpoint, counted from 1
VALIDATION_LOSS = "val/loss"
WATCHED_MAP = "train/mAP"  # on a few fixed training videos
BEST_MAP = "best.mAP"  # tag of a run: mAP of the checkpoint that is its model
MEMORY = "sweep/peak_memory_mb"  # of a trial of a sweep
UNSCORED = -1.0  # score of a checkpoint that was not evaluated: every mAP is better

_MAX_LENGTH = 200  # MLflow's limit is 250, groups included


def safe_names(names: Sequence[str]) -> list[str]:
    """Turn distinct names, such as those of classes, into distinct parts of metric names.

    Refused characters become `_`; if names become equal, the later ones get a number. Accepted
    names stay unchanged.
    """
    safe = [_safe(name) for name in names]
    taken = {name for name, made in zip(names, safe, strict=True) if name == made}
    result = []
    for name, made in zip(names, safe, strict=True):
        unique, number = made, 1
        while unique in taken and unique != name:
            number += 1
            unique = f"{made}_{number}"
        taken.add(unique)
        result.append(unique)
    return result


def safe_path(name: str) -> str:
    """Turn a name such as `accuracy/plain, pretrained` into an accepted one; slashes stay."""
    return "/".join(_safe(part) for part in name.split("/"))


def _safe(name: str) -> str:
    allowed = re.sub(r"[^\w.\- ]", "_", name)[:_MAX_LENGTH]
    return allowed if allowed.strip(". ") else "_"  # "." and ".." mean folders
