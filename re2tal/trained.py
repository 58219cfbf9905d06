"""Saved detectors: parts, weights, and settings for reading videos.

A detector is saved as a folder with `spec.json` and `weights.safetensors`; nothing is unpickled.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from re2tal.backbones.adapters import AdapterConfig, refuse_unused
from re2tal.backbones.lora import LoraConfig
from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.table import IMAGENET_MEAN, IMAGENET_STD
from re2tal.components import Component
from re2tal.detection.suppression import NmsConfig
from re2tal.detector import Detector
from re2tal.errors import UserError, check_within, shortened
from re2tal.json_files import FileError, in_words, places, problem_of, read_json
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.reversible import rewire
from re2tal.videos.windows import WindowConfig
from re2tal.weights import Header, infinite, read_header

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorSpec:
    """Parts of a detector, and settings for reading a video.

    Attributes:
        classes: names of the action classes, indexed by the labels. A class-agnostic detector has
            one.
        backbone: configuration of the video backbone.
        localizer: configuration of the localizer.
        reversible: true if the backbone's residual connections are rewired (Re2TAL).
        size: side in pixels of the square frames that the backbone sees.
        window: settings of the sliding windows over a video.
        nms: settings of the suppression of repeated detections.
        mean: mean of red, green and blue in [0, 1] in the backbone's pretraining (torchvision's).
        std: standard deviation of red, green and blue.
        adapters: shape of the temporal adapters in the backbone's blocks; None for none.
        lora: shape of LoRA's matrices in the backbone's blocks; None for none.
    """

    classes: tuple[str, ...]
    backbone: Annotated[BackboneConfig, Component()]
    localizer: Annotated[LocalizerConfig, Component()]
    reversible: bool = True
    size: int
    window: WindowConfig
    nms: NmsConfig = field(default_factory=NmsConfig)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    adapters: AdapterConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        check_within(self, size=(1, 2**13), mean=(-1e3, 1e3), std=(1e-6, 1e6))
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("DetectorSpec.classes must be one or more different names.")
        if self.adapters and self.lora:
            raise ValueError("DetectorSpec.adapters and lora: a backbone has one of them or none.")

    def build(self, load: Callable[[Any], object] = lambda _: None) -> Detector[Any, Any]:
        """Build the detector with random weights, rewired if `reversible`.

        For one state of the generator, the localizer's weights are the same for any backbone, so
        runs with different backbones start from the same localizer.

        Args:
            load: function that loads the backbone's weights, before adapters are added.

        Raises:
            UserError: the backbone does not support the adapters.
        """
        # Drawn before the backbone uses the generator; on the CPU, as "meta" tensors lack values.
        seed = int(torch.randint(2**62, (), device="cpu"))
        if addition := self.adapters or self.lora:
            refuse_unused(addition, self.backbone, self.size)
        backbone = self._backbone(load)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            localizer = self.localizer.build(backbone.channels, len(self.classes))
        return Detector(backbone, localizer, mean=self.mean, std=self.std)

    def outline(self) -> Detector[Any, Any]:
        """Build the detector on the device "meta", without memory for its weights."""
        with torch.device("meta"):
            backbone = self._backbone()
            localizer = self.localizer.build(backbone.channels, len(self.classes))
            return Detector(backbone, localizer)

    def _backbone(self, load: Callable[[Any], object] = lambda _: None) -> Any:
        backbone = self.backbone.build()
        load(backbone)
        if addition := self.adapters or self.lora:
            addition.add_to(backbone)
        if self.reversible:
            rewire(backbone)
        return backbone


_SPEC = TypeAdapter(DetectorSpec)


def save_detector(folder: Path, spec: DetectorSpec, detector: Detector[Any, Any]) -> None:
    """Write a detector to a folder, which is created.

    Args:
        folder: folder of the detector; existing files of the same names are replaced.
        spec: specification from which `detector` was built.
        detector: detector, whose weights are written in their precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Contiguous copies: safetensors refuses views and shared storages
    state = {
        name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()
    }
    save_file(state, folder / WEIGHTS_FILE)
    (folder / SPEC_FILE).write_bytes(_SPEC.dump_json(spec, indent=2))


def read_spec(folder: str | Path) -> DetectorSpec:
    """Read the specification of a detector that `save_detector` wrote.

    Args:
        folder: folder with `spec.json` and `weights.safetensors`.

    Raises:
        UserError: the folder holds no detector.
        FileError: the specification is wrong; the message lists all problems.
    """
    folder = Path(folder)
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a saved detector: it has no {name}.")
    path = str(folder / SPEC_FILE)
    document, repeated = read_json(path)
    problems = [*map(str, repeated), *_no_numbers(document)]
    if problems:
        raise FileError(path, problems)
    try:
        return _SPEC.validate_python(document)
    except ValidationError as error:
        found = [*map(problem_of, error.errors())]
        raise FileError(path, found) from error


def load_detector(
    folder: str | Path, *, device: torch.device | str = "cpu"
) -> tuple[DetectorSpec, Detector[Any, Any]]:
    """Read a detector that `save_detector` wrote.

    Before anything is built, the specification is compared with the names and shapes in the weights
    file. So memory and time stay in proportion to the size of the files, whatever they contain.

    Args:
        folder: folder with `spec.json` and `weights.safetensors`.
        device: device of the weights.

    Returns:
        The specification and the detector in evaluation mode.

    Raises:
        UserError: the folder holds no detector.
        FileError: a file is damaged, or the weights do not fit the specification or are not finite.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    path = folder / WEIGHTS_FILE
    try:
        _compare(spec, read_header(path), folder)
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(str(path), [f"cannot be read: {error}"]) from error
    if wrong := infinite(state):
        raise FileError(str(path), [wrong])
    detector = spec.build()
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise FileError(str(path), [f"does not fit {SPEC_FILE}: {error}"]) from error
    return spec, detector.to(device).eval()


def _no_numbers(document: Any) -> Iterator[str]:
    """Find numbers that are invalid for every setting."""
    for place, value in places(document):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{in_words(place)}: must be finite, but is {value}"
        elif isinstance(value, int) and abs(value) >= 2**53:
            yield f"{in_words(place)}: is too large a number"


# Functions with which modules create weights and buffers. Only these are counted and may raise:
# others, such as the one that enables gradients again, must never fail.
_MAKING = (torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange)
# Limit: 5 per weight (1 to 2 were measured), and some for tensors that are not weights.
_MADE_A_TENSOR, _MADE = 5, 500


class _Effort(TorchFunctionMode):
    """Limit of the number of created tensors, so that building too large a network ends early."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._left -= func in _MAKING
        if self._left < 0 and func in _MAKING:
            raise ValueError("it is a larger network than that of the weights")
        return func(*args, **(kwargs or {}))


def _compare(spec: DetectorSpec, header: Header, folder: Path) -> None:
    """Refuse a specification that does not fit the weights.

    Parts from a user's own modules are not checked in advance, because building them may need
    tensors with values.

    Raises:
        FileError: the specification does not fit, or no detector can be built from it.
    """
    if not all(type(p).__module__.startswith("re2tal.") for p in (spec.backbone, spec.localizer)):
        return
    try:
        with _Effort(_MADE + _MADE_A_TENSOR * len(header)):
            outline = spec.outline()
    except Exception as error:  # contradictory settings can cause errors of any kind
        what = f"no detector can be built from it: {type(error).__name__}: {error}"
        raise FileError(str(folder / SPEC_FILE), [what]) from error
    frames = spec.window.frames
    if frames % outline.multiple:
        what = (
            f"window.frames: must be a multiple of {outline.multiple} for these parts, but is "
            f"{frames}"
        )
        raise FileError(str(folder / SPEC_FILE), [what])
    wanted: Header = {
        name: (tuple(value.shape), value.is_floating_point())
        for name, value in outline.state_dict().items()
    }
    if problems := [*_misfits(wanted, header)]:
        heading = f"does not fit {SPEC_FILE}: was one changed, or taken from another detector?"
        raise FileError(str(folder / WEIGHTS_FILE), [heading, *shortened(problems, 10)])


def _misfits(wanted: Mapping[str, Any], header: Mapping[str, Any]) -> Iterator[str]:
    for name in [*wanted, *sorted(header.keys() - wanted.keys())]:
        if name not in header:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is not part of the detector"
        elif header[name] != wanted[name]:
            (shape, real), (theirs, floating) = wanted[name], header[name]
            kinds = {True: "floating numbers", False: "integers"}
            yield (
                f"{name} must be {kinds[real]} of shape {shape}, but is {kinds[floating]} of shape "
                f"{theirs}"
            )
