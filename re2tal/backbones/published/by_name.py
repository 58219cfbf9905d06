"""torchvision's weights by their names."""

import torch
from torch import Tensor
from torchvision.models import get_model_weights

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
