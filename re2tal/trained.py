"""Saved detectors: parts, weights, and the way in which videos are read.

On disk it is a folder with `spec.json` and `weights.safetensors`: nothing in it is unpickled.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.table import IMAGENET_MEAN, IMAGENET_STD
from re2tal.components import Component
from re2tal.detection.suppression import NmsConfig
from re2tal.detector import Detector
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.reversible import rewire
from re2tal.videos.windows import WindowConfig

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorSpec:
    """Parts of a detector, and the way in which it reads a video.

    Attributes:
        classes: names of the action classes; a label is an index into it. A class-agnostic
            detector has one.
        backbone: configuration of the video backbone.
        localizer: configuration of the localizer behind it.
        reversible: true if the backbone's residual connections are rewired (Re2TAL).
        size: side in pixels of the square frames that the backbone sees.
        window: settings of the sliding windows over a video.
        nms: settings of the suppression of repeated detections.
        mean: mean of red, green and blue in [0, 1] in the backbone's pretraining (torchvision's).
        std: standard deviation of red, green and blue.
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

    def build(self) -> Detector[Any, Any]:
        """Build the detector with random weights, rewired if `reversible`.

        For one state of the generator the localizer has the same weights behind any backbone, or
        none, so that runs which differ in the backbone begin alike.
        """
        seed = int(torch.randint(2**62, ()))
        backbone: Any = self.backbone.build()
        if self.reversible:
            rewire(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            localizer = self.localizer.build(backbone.channels, len(self.classes))
        return Detector(backbone, localizer, mean=self.mean, std=self.std)


_SPEC = TypeAdapter(DetectorSpec)


def save_detector(folder: Path, spec: DetectorSpec, detector: Detector[Any, Any]) -> None:
    """Write a detector to a folder, which is made.

    Args:
        folder: folder of the detector; existing files of the same names are replaced.
        spec: specification that `detector` was built from.
        detector: detector, whose weights are written in the precision they have.
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
        ValueError: the folder holds no detector.
    """
    folder = Path(folder)
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a saved detector: it has no {name}.")
    try:
        return _SPEC.validate_json((folder / SPEC_FILE).read_bytes())
    except ValidationError as error:
        raise ValueError(f"{folder / SPEC_FILE} does not describe a detector: {error}") from error


def load_detector(
    folder: str | Path, *, device: torch.device | str = "cpu"
) -> tuple[DetectorSpec, Detector[Any, Any]]:
    """Read a detector that `save_detector` wrote.

    Args:
        folder: folder with `spec.json` and `weights.safetensors`.
        device: device of the weights.

    Returns:
        The specification and the detector in evaluation mode.

    Raises:
        ValueError: the folder holds no detector, or its weights do not fit its specification.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    detector = spec.build()
    try:
        detector.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {SPEC_FILE}: {error}") from error
    return spec, detector.to(device).eval()
