"""Reading of weight files, the report or error about their contents, and models without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from re2tal.errors import shortened

ModelT = TypeVar("ModelT")


def without_weights(build: Callable[[], ModelT]) -> ModelT:
    """Build a model on the "meta" device, where its weights take no memory.

    Some constructors read values: many compute rates of stochastic depth with `Tensor.item`. They
    cannot run there, so their model is built on the CPU.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError):
        with torch.random.fork_rng(devices=[]):  # like the other way, draw nothing
            return build()


Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsReport:
    """Report on the weights of a file.

    Attributes:
        layout: title of the recognised layout.
        placed: name in the file -> our name.
        left_out: name in the file -> reason why it was not used.
        kept: weights that the file lacks, for which the network keeps its own values.
        note: further facts needed to use the weights.
        mean: mean of the frames in training, if known to differ from ImageNet's.
        std: standard deviation of these frames, likewise.
    """

    layout: str
    placed: Mapping[str, str]
    left_out: Mapping[str, str]
    kept: Sequence[str]
    note: str = ""
    mean: Colour | None = None
    std: Colour | None = None

    def require_normalization(self, mean: Colour, std: Colour, *, option: str) -> None:
        """Check that frames are normalized as in the training of the weights.

        Args:
            mean: mean with which the network's frames are normalized.
            std: standard deviation of these frames.
            option: prefix of `mean` and `std` on the command line, such as `--model.`.

        Raises:
            ValueError: they are normalized by other values; the message names the options to set.
        """
        wanted = ((self.mean, mean, "mean"), (self.std, std, "std"))
        if all(own is None or own == given for own, given, _ in wanted):
            return
        needed = [f"{option}{n} {' '.join(map(str, own))}" for own, _, n in wanted if own]
        raise ValueError(
            f"{self.layout} was trained on frames that were normalized by other values than "
            f"{mean} and {std}: add {' '.join(needed)}."
        )

    @property
    def summary(self) -> str:
        """Layout, and numbers of weights that were placed, left out and kept."""
        counts = f"{len(self.placed)} placed, {len(self.left_out)} left out"
        return f"{self.layout}: {counts}, {len(self.kept)} kept"

    def __str__(self) -> str:
        """List every name on a separate line."""
        lines = [self.summary]
        lines += [f"  {theirs} -> {ours}" for theirs, ours in self.placed.items()]
        lines += [f"  {theirs} left out: {reason}" for theirs, reason in self.left_out.items()]
        lines += [f"  {ours} kept: the file has none" for ours in self.kept]
        return "\n".join([*lines, *([self.note] if self.note else [])])


class WeightsMismatchError(ValueError):
    """Error of weights that do not fit a network.

    Attributes:
        problems: all problems; the message lists the first few.
    """

    def __init__(self, what: str, network: object, problems: Sequence[str]) -> None:
        listed = "".join(f"\n  {line}" for line in shortened(problems, most=10))
        super().__init__(
            f"{what} are not those of this {type(network).__name__}: {len(problems)} do not fit. "
            f"Is the network of another size, or were they trained with other settings?{listed}"
        )
        self.problems = tuple(problems)


# Keys of the weights in the libraries' checkpoints; the first existing one is used. OpenTAD and
# ActionFormer evaluate with the EMA, the others have one kind of weights. V-JEPA 2 offers its
# encoder, not the EMA beside it.
_NESTED = ("state_dict_ema", "state_dict", "model_state", "model", "module", "encoder")

# Checkpoints of mmcv keep the best score as a NumPy number. These harmless functions, which
# unpickle such numbers, are allowed, under their names in NumPy 1 and 2.
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
    """Read the weights in a file.

    Args:
        path: `.safetensors`, or a file that `torch.save` wrote: a dictionary of tensors, or a
            checkpoint of mmaction2, PyTorchVideo, OpenTAD, ActionFormer, VSGN, VideoMAE or V-JEPA 2
            that holds one. Only tensors and plain values are unpickled.

    Raises:
        ValueError: the file cannot be read, holds no weights, or weights are not finite.
    """
    weights = _read(path)
    if wrong := infinite(weights):
        raise ValueError(f"The weights in {path} cannot be used: {wrong}.")
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        what = "it is no regular file" if path.exists() else "there is no such file"
        raise ValueError(f"The weights in {path} cannot be read: {what}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own message advises switching the check off
        raise ValueError(
            f"The weights in {path} cannot be read: the file is damaged, or holds more than "
            f"tensors and plain values{_refused(path)}, which is not loaded because it could run "
            "code. If you trust it, write only its tensors to another file where it was made: "
            'torch.save(checkpoint["state_dict"], file).'
        ) from error
    except Exception as error:  # a damaged file can cause errors of any kind
        raise ValueError(f"The weights in {path} cannot be read: {error}") from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no weights: a dictionary of tensors is needed.")
    return dict(content)


Header = Mapping[str, tuple[tuple[int, ...], bool]]
"""Name of a tensor -> its shape, and true if its numbers are floating point."""

_FLOATING = ("F16", "BF16", "F32", "F64")


def read_header(path: Path) -> Header:
    """Read names, shapes and kinds of the tensors in a safetensors file, without the tensors.

    Raises:
        OSError: the file cannot be read.
        safetensors.SafetensorError: the file is damaged, or is not a safetensors file.
    """
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: (tuple(part.get_shape()), part.get_dtype() in _FLOATING)
            for name, part in slices.items()
        }


def infinite(weights: Mapping[str, Tensor]) -> str:
    """Describe the weights that are not finite; return "" if there are none."""
    wrong = [
        name
        for name, value in weights.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if not wrong:
        return ""
    return f"{len(wrong)} weights are not finite (nan or inf): {', '.join(shortened(wrong, 3))}"


def _refused(path: Path) -> str:
    try:
        with safe_globals(_NUMBERS):
            names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, UnpicklingError):  # a file that torch cannot inspect
        return ""
    return f" ({', '.join(sorted(names))})" if names else ""
