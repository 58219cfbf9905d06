"""A detector with all that is needed to use it: parts, how it reads videos, weights.

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
    """What a detector is built of and how it reads a video.

    Attributes:
        classes: names of the action classes; a label is an index into it. A class-agnostic
            detector has one.
        backbone: the video backbone.
        localizer: what turns features into segments.
        reversible: whether the backbone's residual connections are rewired (Re2TAL).
        size: pixels of the side of the square frames that the backbone sees.
        window: sliding windows over a video.
        nms: what is done to the raw detections.
        mean: of red, green and blue in [0, 1] in the backbone's pretraining (torchvision's).
        std: their standard deviation.
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

    def build(self) -> Detector:
        """Returns the detector with random weights, rewired if `reversible`.

        Of one state of the generator, the localizer has the same weights behind any backbone, or
        none: so that runs which differ in it begin alike.
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


def save_detector(folder: Path, spec: DetectorSpec, detector: Detector) -> None:
    """Writes a detector to a folder, which is made.

    Args:
        folder: where to; existing files of the same names are replaced.
        spec: what `detector` was built from.
        detector: the weights; they are written in the precision they have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # contiguous copies: safetensors refuses views and shared storages
    state = {
        name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()
    }
    save_file(state, folder / WEIGHTS_FILE)
    (folder / SPEC_FILE).write_bytes(_SPEC.dump_json(spec, indent=2))


def read_spec(folder: str | Path) -> DetectorSpec:
    """Reads what a detector that `save_detector` wrote is built of.

    Args:
        folder: where `spec.json` and `weights.safetensors` are.

    Raises:
        ValueError: if the folder holds no detector.
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
) -> tuple[DetectorSpec, Detector]:
    """Reads a detector that `save_detector` wrote.

    Args:
        folder: where `spec.json` and `weights.safetensors` are.
        device: where the weights go.

    Returns:
        The specification and the detector in evaluation mode.

    Raises:
        ValueError: if the folder holds no detector, or its weights do not fit its specification.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    detector = spec.build()
    try:
        detector.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {SPEC_FILE}: {error}") from error
    return spec, detector.to(device).eval()
