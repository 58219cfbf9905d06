"""Time that augmentation adds to a training step of a reversible backbone, paired in one run.

On a CPU, times are CPU seconds of all threads together, so that other load on the machine adds
little to them; on a GPU they last until it has finished.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch

from pipelines.experiments.experiment import Row, Tables
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


def measure(*, device: str = "cpu", rounds: int = 5) -> Tables:
    """Time augmentation and the step that follows it.

    Args:
        device: device of both.
        rounds: number of rounds that count, after one that does not.
    """
    title = f"A clip of {FRAMES} frames, 256 to {SIZE} pixels, and a step of Swin-T"
    rows = compared(swin_t(), CONFIGS, FRAMES, SIZE, device=device, rounds=rounds)
    return {title: rows}


def compared(
    backbone: BackboneConfig,
    configs: Mapping[str, AugmentationConfig],
    frames: int,
    size: int,
    *,
    device: str,
    rounds: int,
) -> list[Row]:
    """Compare configurations: the time of each, and as a share of the step that follows it.

    Args:
        backbone: backbone that is trained, rewired.
        configs: configurations by name.
        frames: length of the clip.
        size: side in pixels of the backbone's input.
        device: device of both.
        rounds: number of rounds of the step and all configurations that count, after one that does
            not.
    """
    model = backbone.build().to(device)
    rewire(model, verify=False)
    mean, std = grey_levels([0.45] * 3).to(device), grey_levels([0.225] * 3).to(device)

    def clip(side: int) -> torch.Tensor:
        return torch.randint(256, (1, frames, side, side, 3), dtype=torch.uint8, device=device)

    seen = clip(size)

    def step() -> None:
        model(normalize(seen, mean, std)).square().mean().backward()

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in configs}
    for turn in range(rounds + 1):
        whole = _seconds(step, device)
        for name, config in configs.items():
            source = clip(config.decoded_size(size))
            # another seed each round, since the cost of a crop depends on its place
            taken = _seconds(lambda: augment(source, config, size=size, seeds=[turn]), device)  # noqa: B023
            if turn > 0:
                times[name].append((taken, taken / whole))
    return [
        {
            "what changes": name,
            "ms a frame": 1000 * median(taken for taken, _ in pairs) / frames,
            "% of the step": 100 * median(share for _, share in pairs),
        }
        for name, pairs in times.items()
    ]


def _seconds(work: Callable[[], object], device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize(device)
    start = clock()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - start
