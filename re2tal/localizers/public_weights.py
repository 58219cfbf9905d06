"""Weights that others published: read from a file, and compared with those that are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from re2tal.errors import shortened

# What DataParallel puts before each name.
_PREFIX = "module."
_LISTED = 10


def read(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by the names that they have there.

    Args:
        path: `.safetensors`, or what `torch.save` wrote (`.pth`, `.pth.tar`), which is read without
            unpickling anything but tensors. Of a whole checkpoint the moving average of the
            weights is taken, or the weights where it has none.

    Raises:
        ValueError: If it cannot be read or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own message advises to switch the check off
        raise ValueError(
            f"The weights in {path} cannot be read: the file is damaged, or holds more than "
            "tensors and numbers, which is not loaded because it could run code. If you trust "
            "where it comes from, save its 'state_dict_ema' or 'state_dict' alone to a file of "
            "its own."
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"The weights in {path} cannot be read: {error}") from error
    if isinstance(content, dict):
        content = content.get("state_dict_ema", content.get("state_dict", content))
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"{path} holds no weights: a dictionary of tensors is needed, by itself or as the "
            "'state_dict_ema' or 'state_dict' of a checkpoint."
        )
    return content


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the "module." that DataParallel puts before each name."""
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}


def fitted(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor | None],
    *,
    source: str,
    localizer: str,
) -> dict[str, Tensor]:
    """`given` in the shapes of `wanted`, from which axes of length one may differ.

    Args:
        given: weights by their published names.
        wanted: by the same names tensors of the shapes that are needed, None for any shape.
        source: what `given` was read from, for the message.
        localizer: what they are for, for the message.

    Raises:
        ValueError: Lists every weight that is missing, unknown or has another shape.
    """
    problems = list(_problems(wanted, given))
    if problems:
        listed = "\n".join(f"  {line}" for line in shortened(problems, _LISTED))
        raise ValueError(
            f"The weights in {source} are not those of this {localizer}: {len(problems)} do not "
            f"fit. Was it trained with other settings?\n{listed}"
        )
    return {
        name: given[name] if value is None else given[name].reshape(value.shape)
        for name, value in wanted.items()
    }


def _problems(wanted: Mapping[str, Tensor | None], given: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is unknown"
        elif (value := wanted[name]) is not None and _shape(value) != _shape(given[name]):
            yield (
                f"{name} has shape {tuple(given[name].shape)} "
                f"instead of {tuple(value.shape)} (axes of length 1 aside)"
            )


def _shape(x: Tensor) -> list[int]:
    """Without axes of length one: some write a matrix as a convolution of kernel 1."""
    return [size for size in x.shape if size != 1]
