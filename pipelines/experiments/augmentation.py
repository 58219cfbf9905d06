"""Experiment `augmentation`: time of augmentation as a share of a reversible backbone's step."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median

import torch

from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.timing import finish, in_turns, ratios
from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.swin import swin_t
from re2tal.detector import grey_levels, normalize
from re2tal.reversible import rewire
from re2tal.videos.augmentation import AugmentationConfig, augment

FRAMES, SIZE = 64, 224
_CROPS = AugmentationConfig(source_size=256, crop_area=(0.08, 1.0), flip=0.5)
_COLOURS = replace(_CROPS, brightness=0.5, contrast=0.5, saturation=0.5)
CONFIGS = {
    "crops and flips": _CROPS,
    "brightness, contrast and saturation, too": _COLOURS,
    "hue, too": replace(_COLOURS, hue=0.1),
}
_STEP = "step"


def measure_augmentation(*, device: str = "cpu", rounds: int = 5) -> Tables:
    """Time that augmentation adds to a training step of a reversible backbone, paired in one run.

    On a CPU, times are CPU seconds of all threads together, so that other load on the machine adds
    little; on a GPU they are wall-clock times until the GPU has finished.

    Args:
        device: device of augmentation and step.
        rounds: number of counted rounds, after a warm-up round.
    """
    title = f"A clip of {FRAMES} frames, 256 to {SIZE} pixels, and a step of Swin-T"
    return {title: compare(swin_t(), CONFIGS, FRAMES, SIZE, torch.device(device), rounds)}


def compare(
    backbone: BackboneConfig,
    configs: Mapping[str, AugmentationConfig],
    frames: int,
    size: int,
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """Tabulate each configuration's time, and its share of the backbone's step."""
    model = backbone.build().to(device)
    rewire(model, verify=False)
    mean, std = grey_levels([0.45] * 3).to(device), grey_levels([0.225] * 3).to(device)
    seeds = count()  # a new seed each time: the cost of a crop depends on its place

    def clip(side: int) -> torch.Tensor:
        return torch.randint(256, (1, frames, side, side, 3), dtype=torch.uint8, device=device)

    seen = clip(size)

    def step() -> float:
        return _seconds(
            lambda: model(normalize(seen, mean, std)).square().mean().backward(), device
        )

    def augmented(config: AugmentationConfig) -> float:
        source, seed = clip(config.decoded_size(size)), next(seeds)
        return _seconds(lambda: augment(source, config, size=size, seeds=[seed]), device)

    ways: dict[str, Callable[[], float]] = {_STEP: step}
    ways |= {name: partial(augmented, config) for name, config in configs.items()}
    times = in_turns(ways, rounds)
    return [
        {
            "what changes": name,
            "ms a frame": 1000 * median(times[name]) / frames,
            "% of the step": 100 * median(ratios(times[name], times[_STEP])),
        }
        for name in configs
    ]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    finish(device)
    start = clock()
    work()
    finish(device)
    return clock() - start
