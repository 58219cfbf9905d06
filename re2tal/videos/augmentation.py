"""Augmentation of training clips: in time, before decoding; in space, on their device.

In time, a window and its segments are changed to another speed or reversed. In space, torchvision's
transforms apply a random resized crop, flip and colour jitter. Their random numbers are drawn once
per clip and shared by all its frames: a network would take a crop that jumps from frame to frame
for motion.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from re2tal.annotations import VideoAnnotation
from re2tal.videos.windows import Window, WindowConfig, at_speed, reversed_window

# Pixels that are transformed at once. The change of hue needs about 100 bytes per pixel, so the
# frames of a clip are transformed in parts of 100 MiB, whatever the clip's length.
_PIXELS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """Random changes of a training clip; by default none.

    Attributes:
        source_size: side in pixels of the square frames from which crops are taken, best slightly
            larger than the network's input; None for the size of the input. Without crops it has no
            effect.
        crop_area: smallest and largest area of a crop as a share of the frame's; None for no crop.
        crop_aspect: smallest and largest width of a crop as a multiple of its height, before it is
            resized to a square.
        flip: probability that a clip is mirrored, left to right. Leave it 0 where the direction of
            a movement, or written text, distinguishes classes.
        brightness: greatest relative change of the brightness.
        contrast: greatest relative change of the contrast of each frame.
        saturation: greatest relative change of the saturation.
        hue: greatest rotation of the hue, in turns of the colour circle, at most 0.5.
        speed: slowest and fastest speed of a clip, drawn for each clip: at 0.5 a clip spans half as
            many seconds, and its actions last twice as many frames. None keeps the speed, as is
            necessary for classes that differ only in speed.
        reverse: probability that a clip runs backwards. Leave it 0 where the direction of time
            distinguishes classes, such as opening and closing.

    Raises:
        ValueError: a field is out of its range.
    """

    source_size: int | None = None
    crop_area: tuple[float, float] | None = None
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    speed: tuple[float, float] | None = None
    reverse: float = 0.0

    def __post_init__(self) -> None:
        if self.source_size is not None and self.source_size < 1:
            raise ValueError(
                f"AugmentationConfig.source_size must be at least 1, not {self.source_size}."
            )
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(
                "AugmentationConfig.crop_area must be two shares of the frame, 0 < smallest <= "
                f"largest <= 1, not {self.crop_area}."
            )
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1] < float("inf"):
            raise ValueError(
                "AugmentationConfig.crop_aspect must be two positive numbers, the smaller first, "
                f"not {self.crop_aspect}."
            )
        if self.speed is not None and not 0.1 <= self.speed[0] <= self.speed[1] <= 10:
            raise ValueError(
                "AugmentationConfig.speed must be two factors, 0.1 <= slowest <= fastest <= 10, "
                f"not {self.speed}."
            )
        largest = dict.fromkeys(("flip", "brightness", "contrast", "saturation", "reverse"), 1.0)
        largest["hue"] = 0.5
        for name, most in largest.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"AugmentationConfig.{name} must be in [0, {most:g}], "
                    f"not {getattr(self, name)}."
                )

    def decoded_size(self, size: int) -> int:
        """Side in pixels of the square frames to decode for a network input of `size` pixels."""
        return size if self.crop_area is None else self.source_size or size

    @property
    def in_time(self) -> "AugmentationConfig":
        """Changes in time alone, which need no frames."""
        return AugmentationConfig(speed=self.speed, reverse=self.reverse)

    def densest(self, fps: float | None) -> float | None:
        """Greatest number of frames per second that is sampled; `fps` is that of the windows."""
        return fps if fps is None or self.speed is None else fps / self.speed[0]

    def tempo(self, random: np.random.Generator) -> "Tempo":
        """Draw the changes of a clip in time.

        Always three random numbers, so that settings do not shift the generator's sequence.
        """
        slowest, fastest = self.speed or (1.0, 1.0)
        power, share, turn = random.uniform(size=3).tolist()
        speed = slowest * math.exp(power * math.log(fastest / slowest))  # log-uniform
        return Tempo(speed=speed, share=share, backwards=turn < self.reverse)

    def transforms(self, size: int) -> list[v2.Transform]:
        """Build the transforms of a clip `(T, 3, H, W)` for frames of `size` x `size` pixels."""
        chosen: list[v2.Transform] = []
        if self.crop_area is not None:
            chosen.append(v2.RandomResizedCrop(size, self.crop_area, self.crop_aspect))
        if self.flip:
            chosen.append(v2.RandomHorizontalFlip(self.flip))
        if self.brightness or self.contrast or self.saturation or self.hue:
            chosen.append(v2.Lambda(Tensor.contiguous))  # planes of colours: 20 % faster
            chosen.append(v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue))
        return chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Tempo:
    """Changes of a clip in time.

    Attributes:
        speed: factor of the speed of its actions.
        share: place of the new window in the old one, or of the old one in the new; see `at_speed`.
        backwards: true if the clip runs backwards.
    """

    speed: float
    share: float
    backwards: bool

    def of_window(
        self, window: Window, video: VideoAnnotation, classes: Sequence[str], config: WindowConfig
    ) -> Window:
        """Change a window; see `at_speed` for the arguments."""
        if self.speed != 1:
            window = at_speed(window, video, classes, config, speed=self.speed, share=self.share)
        return reversed_window(window) if self.backwards else window


def clip_seed(window: Window, *, seed: int, epoch: int) -> int:
    """Compute a 32-bit seed of `augment` for a window, the same on every worker.

    Args:
        window: window that the clip shows.
        seed: seed of the run.
        epoch: epoch from 0; each epoch gives another seed.
    """
    place = f"{seed} {epoch} {window.video_id} {float(window.grid.offset).hex()} {window.valid}"
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big")


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator, which torchvision uses, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed the generators of all devices as well
        torch.default_generator.manual_seed(seed)
        yield


def augment(
    frames: Tensor, config: AugmentationConfig, *, size: int, seeds: Sequence[int]
) -> Tensor:
    """Transform clips at random, with the same transform for all frames of a clip.

    A clip's result depends on its frames, the configuration and its seed, not on other clips of the
    batch. The global generators are not changed. Black frames, such as padding, stay black. Beside
    the result, about 100 MiB of memory are needed, whatever the length of the clips.

    Args:
        frames: uint8 `(B, T, H, W, 3)` on any device.
        config: permitted changes. Without crops, H and W must be `size`.
        size: side of the result in pixels.
        seeds: one seed per clip, such as from `clip_seed`.

    Returns:
        uint8 `(B, T, size, size, 3)` on the same device; `frames` itself if nothing may change.

    Raises:
        ValueError: the arguments do not fit together.
    """
    batch, length, height, width = _shape(frames, seeds)
    if config.crop_area is None and (height, width) != (size, size):
        raise ValueError(
            f"Frames of {height} x {width} pixels are to become {size} x {size}, but crop_area is "
            "None: decode them at the right size, or crop them."
        )
    transforms = config.transforms(size)
    if not transforms:
        return frames
    transform = v2.Compose(transforms)
    part = max(1, _PIXELS // (height * width))
    result = frames.new_empty(batch, length, size, size, 3)
    for clip, out, seed in zip(frames, result, seeds, strict=True):
        for source, target in zip(clip.split(part), out.split(part), strict=True):
            with _drawing_from(seed):  # again for each part, so that all parts get the same draws
                target.copy_(transform(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    return result


def _shape(frames: Tensor, seeds: Sequence[int]) -> tuple[int, int, int, int]:
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ValueError(
            f"Frames must be uint8 (B, T, H, W, 3), but got {frames.dtype} {tuple(frames.shape)}."
        )
    if len(seeds) != len(frames):
        raise ValueError(f"{len(frames)} clips need one seed each, but got {len(seeds)}.")
    batch, length, height, width, _ = frames.shape
    return batch, length, height, width
