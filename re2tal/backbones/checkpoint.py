"""Reading and writing the weights of a backbone: strict, and with a reason when they do not fit."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from re2tal.atomic import replacing
from re2tal.backbones.published import LAYOUTS, Layout, WeightsReport
from re2tal.backbones.published.layout import convert, read_tensors, recognise

PREFIX = "torchvision:"


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """Returns weights of torchvision, downloaded the first time into the cache of `torch.hub`.

    Args:
        name: `torchvision:MODEL/WEIGHTS`, such as `torchvision:swin3d_t/KINETICS400_V1`.

    Raises:
        ValueError: if there are none of this name, listing those that there are, or they cannot be
            downloaded.
    """
    model, _, wanted = name.removeprefix(PREFIX).partition("/")
    try:
        known = get_model_weights(model)
    except ValueError as error:
        raise ValueError(
            f"torchvision has no model {model!r}, which {name} names. Video Swins are called "
            "swin3d_t, swin3d_s and swin3d_b."
        ) from error
    if wanted not in known.__members__:
        listed = ", ".join(f"{PREFIX}{model}/{key}" for key in known.__members__)
        raise ValueError(f"torchvision has no weights {name}, but {listed}.")
    weights = known[wanted]
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network, or not the file that was promised
        raise ValueError(
            f"{name} cannot be downloaded from {weights.url}: {error}. Without a network, copy the "
            f"file to {torch.hub.get_dir()}/checkpoints, or give its path instead of its name."
        ) from error
    return state


_OWN = Layout(
    title="names of this backbone",
    mark=re.compile(r"(?!)"),  # what has no mark is ours
    rename=lambda name: name,
    classifier=re.compile(r"head\."),  # torchvision's
)


def load_backbone_weights(backbone: nn.Module, source: str | Path) -> WeightsReport:
    """Loads weights into a backbone, rewired or not: rewiring keeps every name.

    Args:
        backbone: what they are for.
        source: `.safetensors`, or a file that `torch.save` wrote, which is read without unpickling
            anything but tensors and plain values; or the name of weights of torchvision, as in
            `torchvision:swin3d_t/KINETICS400_V1`. Besides our own and torchvision's, files in the
            layouts of `re2tal.backbones.published` are recognised.

    Returns:
        What became of every weight of the file.

    Raises:
        ValueError: if it cannot be read, or lists every weight that is missing, unknown or has
            another shape (`WeightsMismatchError`). Nothing is loaded then.
    """
    named = str(source).startswith(PREFIX)
    published = torchvision_weights(str(source)) if named else read_tensors(Path(source))
    try:
        layout, prefix = recognise(tuple(published), LAYOUTS, _OWN)
    except ValueError as error:
        raise ValueError(f"The weights in {source} cannot be used: {error}.") from error
    shown = "" if layout is _OWN else f" (recognised as: {layout.title})"
    state, report = convert(
        published, layout, prefix, backbone, what=f"The weights in {source}{shown}"
    )
    backbone.load_state_dict(state)
    return report


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
