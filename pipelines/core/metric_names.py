"""Names of metrics that MLflow takes.

MLflow refuses a whole request when the name of one of its metrics has other characters than
letters, digits, `_`, `-`, `.`, `:`, spaces and slashes, or is long; and a slash makes a group.
"""

import re
from collections.abc import Sequence

MAP = "val/mAP"
VALIDATION_LOSS = "val/loss"
WATCHED_MAP = "train/mAP"  # on the fixed handful of training videos
BEST_MAP = "best.mAP"  # tag of a run: mAP of the checkpoint that is its model
MEMORY = "sweep/peak_memory_mb"  # of a sweep's trial
UNSCORED = -1.0  # score of a checkpoint that was not evaluated: any other is better

_MAX_LENGTH = 200  # MLflow's own limit is 250, with the groups in front


def safe_names(names: Sequence[str]) -> list[str]:
    """Turn different names, such as those of classes, into different parts of metrics' names.

    Characters that are refused become `_`; of names that are then equal, the later ones get a
    number. A name that is allowed stays as it is.
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
    """Turn a name such as `accuracy/plain, pretrained` into one that MLflow takes; slashes stay."""
    return "/".join(_safe(part) for part in name.split("/"))


def _safe(name: str) -> str:
    allowed = re.sub(r"[^\w.\- ]", "_", name)[:_MAX_LENGTH]
    return allowed if allowed.strip(". ") else "_"  # "." and ".." mean folders
