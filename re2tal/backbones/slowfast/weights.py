"""Published weights of SlowFasts, under the names of ours.

Two libraries publish weights trained on Kinetics: mmaction2, whose names are ours, and
PyTorchVideo. The latter's networks have a norm after each lateral convolution, `fusion_norm=True`
in the configuration, and the one with 101 layers has `fusion_kernel=5`. (They were also fed slow
frames that are evenly spaced from the first to the last, where mmaction2, Re2TAL and ours take
every fourth.)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file
from torch import Tensor

from re2tal.atomic import replacing

_CLASSIFIERS = ("cls_head.", "blocks.6.proj.")
_PATHWAYS = ("slow_path", "fast_path")
_CONVOLUTIONS = {"a": "conv1", "b": "conv2", "c": "conv3"}
_PARTS = {"conv": "conv", "norm": "bn"}
_LISTED = 10

_STEM = re.compile(r"blocks\.0\.multipathway_blocks\.([01])\.(conv|norm)\.(\w+)")
_FUSION = re.compile(r"blocks\.(\d)\.multipathway_fusion\.(conv|norm)(?:_fast_to_slow)?\.(\w+)")
_BRANCH = re.compile(
    r"blocks\.([1-9])\.multipathway_blocks\.([01])\.res_blocks\.(\d+)"
    r"\.branch2\.(conv|norm)_([abc])\.(\w+)"
)
_SKIP = re.compile(
    r"blocks\.([1-9])\.multipathway_blocks\.([01])\.res_blocks\.(\d+)"
    r"\.branch1_(conv|norm)\.(\w+)"
)


def convert_weights(source: str | Path, target: str | Path) -> None:
    """Writes published weights in the form that `load_backbone_weights` reads.

    Args:
        source: a checkpoint of mmaction2 or PyTorchVideo, read without unpickling anything but
            tensors and plain values. The classifier is left out.
        target: `.safetensors`; replaced.

    Raises:
        ValueError: if the source cannot be read, or holds weights of something else.
    """
    state = published_weights(_read(Path(source)))
    with replacing(target) as partial:
        save_file({name: value.contiguous() for name, value in state.items()}, partial)


def published_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the weights of a published SlowFast the names of ours.

    Args:
        published: weights under the names of mmaction2 or PyTorchVideo.

    Returns:
        The backbone's weights. Counters of BatchNorms, which some versions did not write, are zero
        where they are missing.

    Raises:
        ValueError: listing the names that neither library uses.
    """
    state: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in published.items():
        if name.startswith(_CLASSIFIERS):
            continue
        ours = _name(name)
        if ours is None:
            unknown.append(name)
        else:
            state[ours] = value
    if unknown or not state:
        listed = ", ".join(unknown[:_LISTED]) or "nothing"
        raise ValueError(
            f"These are not the weights of a SlowFast of mmaction2 or PyTorchVideo: they hold "
            f"{listed}{' and more' if len(unknown) > _LISTED else ''}."
        )
    for name in [name for name in state if name.endswith(".running_mean")]:
        counter = name.replace("running_mean", "num_batches_tracked")
        state.setdefault(counter, torch.zeros((), dtype=torch.long))
    return state


def _name(published: str) -> str | None:
    """Our name of a weight, or None if it is no part of a published SlowFast."""
    name = published.removeprefix("backbone.")
    if name.startswith(tuple(f"{pathway}." for pathway in _PATHWAYS)):
        return name
    if match := _STEM.fullmatch(name):
        pathway, part, leaf = match.groups()
        return f"{_PATHWAYS[int(pathway)]}.conv1.{_PARTS[part]}.{leaf}"
    if match := _FUSION.fullmatch(name):
        stage, part, leaf = match.groups()
        before = "conv1" if stage == "0" else f"layer{stage}"
        return f"slow_path.{before}_lateral.{_PARTS[part]}.{leaf}"
    if match := _BRANCH.fullmatch(name):
        stage, pathway, block, part, letter, leaf = match.groups()
        place = f"{_PATHWAYS[int(pathway)]}.layer{stage}.{block}"
        return f"{place}.{_CONVOLUTIONS[letter]}.{_PARTS[part]}.{leaf}"
    if match := _SKIP.fullmatch(name):
        stage, pathway, block, part, leaf = match.groups()
        place = f"{_PATHWAYS[int(pathway)]}.layer{stage}.{block}"
        return f"{place}.downsample.{_PARTS[part]}.{leaf}"
    return None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own message advises to switch the check off
        raise ValueError(
            f"The weights in {path} cannot be read: the file is damaged, or holds more than "
            "tensors and plain values, which is not loaded because it could run code."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"The weights in {path} cannot be read: {error}") from error
    for key in ("state_dict", "model_state"):  # mmaction2 and PyTorchVideo
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no weights: a dictionary of tensors is needed.")
    return dict(content)
