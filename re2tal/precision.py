"""Number formats in which a model computes."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device_type: str, precision: Precision) -> AbstractContextManager[Any]:
    """Compute in a precision while the block runs; parameters stay float32.

    Args:
        device_type: "cuda" or "cpu".
        precision: number format of matrix products and convolutions.
    """
    computed = _TYPES[precision]
    return torch.autocast(device_type, computed, enabled=computed is not torch.float32)
