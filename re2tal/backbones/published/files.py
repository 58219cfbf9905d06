"""Tensors from files of others: nothing that could run code is unpickled."""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# Where the libraries keep the weights, the first that is there: OpenTAD evaluates with the averaged
# ones, mmaction2 and PyTorchVideo have one kind.
_NESTED = ("state_dict_ema", "state_dict", "model_state")

# Checkpoints of mmcv keep the best score so far as a NumPy number. These make numbers out of bytes,
# under the names of NumPy 1 and 2.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMBERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the weights in a file.

    Args:
        path: `.safetensors`, or a file that `torch.save` wrote: a dictionary of tensors, or a
            checkpoint of mmaction2, PyTorchVideo or OpenTAD that holds one.

    Raises:
        ValueError: if it cannot be read, or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own message advises to switch the check off
        raise ValueError(
            f"The weights in {path} cannot be read: the file is damaged, or holds more than "
            f"tensors and plain values{_refused(path)}, which is not loaded because it could run "
            "code. If you trust it, write its tensors alone to another file where it was made: "
            'torch.save(checkpoint["state_dict"], file).'
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"The weights in {path} cannot be read: {error}") from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no weights: a dictionary of tensors is needed.")
    return dict(content)


def _refused(path: Path) -> str:
    try:
        with safe_globals(_NUMBERS):
            names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, UnpicklingError):  # of a form that torch cannot look into
        return ""
    return f" ({', '.join(sorted(names))})" if names else ""
