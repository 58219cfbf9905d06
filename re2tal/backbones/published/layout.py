"""A published layout of weights, and the conversion from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

CLASSIFIER = "of the classifier"
_OUTSIDE = "not of the backbone"
_LISTED = 10

Colour = tuple[float, float, float]
"""Of red, green and blue in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a library names the weights of a backbone.

    Attributes:
        title: what they are, for people.
        mark: a name that every such file has and no other; what is in group 1 comes before all
            names of the backbone, such as `backbone.`.
        rename: gives a name, without what comes before it, ours, or None if it is unknown.
        classifier: names of the classifier's weights if nothing sets them apart from the
            backbone's.
        may_lack: ends of the names of buffers that some versions did not write; the backbone keeps
            its own.
        note: what else one has to know to use them.
        mean: of the frames that they were trained on, if it is not ImageNet's.
        std: likewise their standard deviation.
        objection: says why a backbone would compute something else with these weights than they
            were trained for, though they fit; None if it would not.
    """

    title: str
    mark: re.Pattern[str]
    rename: Callable[[str], str | None]
    classifier: re.Pattern[str] | None = None
    may_lack: tuple[str, ...] = ()
    note: str = ""
    mean: Colour | None = None
    std: Colour | None = None
    objection: Callable[[nn.Module], str | None] = lambda _: None


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsReport:
    """What became of the weights of a file.

    Attributes:
        layout: what they were recognised as.
        placed: the file's names and ours.
        left_out: the file's names and why they were not used.
        kept: weights that the file lacks, and the backbone has by itself.
        note: what else one has to know to use them.
        mean: of the frames that they were trained on, if it is known not to be ImageNet's.
        std: likewise their standard deviation.
    """

    layout: str
    placed: Mapping[str, str]
    left_out: Mapping[str, str]
    kept: Sequence[str]
    note: str = ""
    mean: Colour | None = None
    std: Colour | None = None

    def require_normalization(self, mean: Colour, std: Colour, *, option: str) -> None:
        """Makes sure that frames are normalized as those that the weights were trained on.

        Args:
            mean: by which they are.
            std: likewise.
            option: what comes before `mean` and `std` on the command line, such as `--model.`.

        Raises:
            ValueError: if they are normalized by other values, with the options to give.
        """
        wanted = ((self.mean, mean, "mean"), (self.std, std, "std"))
        if all(own is None or own == given for own, given, _ in wanted):
            return
        needed = [f"{option}{n} {' '.join(map(str, own))}" for own, _, n in wanted if own]
        raise ValueError(
            f"{self.layout} was trained on frames that were normalized by other values than "
            f"{mean} and {std}: add {' '.join(needed)}."
        )

    def __str__(self) -> str:
        """Every name on a line of its own."""
        counts = f"{len(self.placed)} placed, {len(self.left_out)} left out"
        lines = [f"{self.layout}: {counts}, {len(self.kept)} kept"]
        lines += [f"  {theirs} -> {ours}" for theirs, ours in self.placed.items()]
        lines += [f"  {theirs} left out: {reason}" for theirs, reason in self.left_out.items()]
        lines += [f"  {ours} kept: the file has none" for ours in self.kept]
        return "\n".join([*lines, *([self.note] if self.note else [])])


class WeightsMismatchError(ValueError):
    """Weights do not fit a backbone.

    Attributes:
        problems: all of them; the message lists the first few.
    """

    def __init__(self, what: str, backbone: nn.Module, problems: Sequence[str]) -> None:
        listed = "".join(f"\n  {problem}" for problem in problems[:_LISTED])
        rest = len(problems) - _LISTED
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        super().__init__(
            f"{what} are not those of this {type(backbone).__name__}: {len(problems)} do not fit. "
            f"Is it another size?{listed}{more}"
        )
        self.problems = tuple(problems)


def recognise(names: Sequence[str], layouts: Sequence[Layout], own: Layout) -> tuple[Layout, str]:
    """Finds out the layout of a file.

    Args:
        names: of its weights.
        layouts: that it may have.
        own: what it is if it has none of them.

    Returns:
        The layout, and what comes before every name of the backbone.

    Raises:
        ValueError: if the file holds several backbones.
    """
    found = [(layout, m[1]) for layout in layouts for n in names if (m := layout.mark.fullmatch(n))]
    if len(found) > 1:
        listed = ", ".join(f"{layout.title} at {prefix!r}" for layout, prefix in found)
        raise ValueError(f"it holds several backbones: {listed}. Keep the weights of one")
    return found[0] if found else (own, "")


def convert(
    published: Mapping[str, Tensor], layout: Layout, prefix: str, backbone: nn.Module, what: str
) -> tuple[dict[str, Tensor], WeightsReport]:
    """Gives published weights our names.

    Args:
        published: weights under their names.
        layout: of which they are.
        prefix: what comes before every name of the backbone.
        backbone: what they are for.
        what: says where they come from, in the plural.

    Returns:
        All weights and buffers of the backbone, and the report.

    Raises:
        WeightsMismatchError: with every weight that is missing, unknown, there twice, or has
            another shape, or if the backbone objects to the layout.
    """
    placed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    problems: list[str] = []
    for name in published:
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            left_out[name] = _OUTSIDE
        elif layout.classifier is not None and layout.classifier.match(inner):
            left_out[name] = CLASSIFIER
        elif ours := layout.rename(inner):
            placed[name] = ours
        else:
            problems.append(f"{name} is unknown")
    own = backbone.state_dict()
    kept = sorted(n for n in own.keys() - placed.values() if n.endswith(layout.may_lack))
    problems += _mismatches(own, placed, published, kept)
    if objection := layout.objection(backbone):
        problems.insert(0, objection)
    if problems:
        raise WeightsMismatchError(what, backbone, problems)
    state = {ours: published[theirs] for theirs, ours in placed.items()}
    state |= {name: own[name] for name in kept}
    return state, WeightsReport(
        layout=layout.title,
        placed=placed,
        left_out=left_out,
        kept=kept,
        note=layout.note,
        mean=layout.mean,
        std=layout.std,
    )


def _mismatches(
    own: Mapping[str, Tensor],
    placed: Mapping[str, str],
    published: Mapping[str, Tensor],
    kept: Sequence[str],
) -> Iterator[str]:
    times = Counter(placed.values())
    theirs = {ours: name for name, ours in placed.items()}
    for ours in sorted((own.keys() | theirs.keys()) - set(kept)):
        if ours not in theirs:
            yield f"{ours} is missing"
            continue
        name = theirs[ours]
        called = name if name == ours else f"{name} (here {ours})"
        if ours not in own:
            yield f"{called} is unknown"
        elif times[ours] > 1:
            yield f"{called} is there {times[ours]} times, under different names"
        elif own[ours].shape != published[name].shape:
            shapes = tuple(published[name].shape), tuple(own[ours].shape)
            yield f"{called} has shape {shapes[0]} instead of {shapes[1]}"


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
