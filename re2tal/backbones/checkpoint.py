"""Reading and writing the weights of a backbone: strict, and with a reason when they do not fit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from re2tal.atomic import replacing

# A classifier's weights are no part of a backbone; torchvision calls them so.
_CLASSIFIER = "head."
_LISTED = 10


def load_backbone_weights(backbone: nn.Module, path: str | Path) -> None:
    """Loads weights into a backbone, rewired or not: rewiring keeps every name.

    Args:
        backbone: what they are for.
        path: `.safetensors`, or a file that `torch.save` wrote, which is read without unpickling
            anything but tensors. torchvision's weights fit; their classifier is left out.

    Raises:
        ValueError: if it cannot be read, or lists every weight that is missing, unknown or has
            another shape.
    """
    path = Path(path)
    state = {name: value for name, value in _read(path).items() if not name.startswith(_CLASSIFIER)}
    problems = list(_mismatches(backbone.state_dict(), state))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:_LISTED])
        rest = len(problems) - _LISTED
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"The weights in {path} are not those of this {type(backbone).__name__}: "
            f"{len(problems)} do not fit. Is it another size?\n{listed}{more}"
        )
    backbone.load_state_dict(state)


def save_backbone_weights(
    backbone: nn.Module, path: str | Path, metadata: Mapping[str, str]
) -> None:
    """Writes a backbone's weights as safetensors, under another name until the file is whole.

    Args:
        backbone: whose weights.
        path: the file; it is replaced.
        metadata: facts to keep with them, such as the command and what it reached.
    """
    state = {name: v.detach().cpu().contiguous() for name, v in backbone.state_dict().items()}
    with replacing(path) as partial:
        save_file(state, partial, metadata=dict(metadata))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own message advises to switch the check off
        raise ValueError(
            f"The weights in {path} cannot be read: the file is damaged, or holds more than "
            "tensors, which is not loaded because it could run code."
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"The weights in {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no weights: a dictionary of tensors is needed.")
    return content


def _mismatches(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is unknown"
        elif wanted[name].shape != given[name].shape:
            yield (
                f"{name} has shape {tuple(given[name].shape)} "
                f"instead of {tuple(wanted[name].shape)}"
            )
