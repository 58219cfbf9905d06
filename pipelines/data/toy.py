"""Toy data sets, made when they are missing.

Each process of a pool in the calling script would import all that the script has imported, which
takes ten seconds. So a separate program with few imports has the pool.
"""

import subprocess
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from re2tal.backbones.table import IMAGENET_MEAN, IMAGENET_STD
from re2tal.datasets.toy import FPS, POSES, TRIMMED_CLASSES, ToyConfig, TrimmedToyConfig
from re2tal.detector import grey_levels, normalize
from re2tal.videos.decoding import decode


def toy_videos(folder: Path, config: ToyConfig | None = None) -> None:
    """Make the untrimmed videos and their annotations, unless they exist."""
    config = config or ToyConfig()
    _make("unseen" if config.unseen else "videos", folder, config)


def toy_clips(
    folder: Path, config: TrimmedToyConfig | None = None, *, processes: int | None = None
) -> None:
    """Make the trimmed clips, unless they exist, with `processes` or one process a core."""
    _make("clips", folder, config or TrimmedToyConfig(), processes)


def _make(
    kind: str, folder: Path, config: ToyConfig | TrimmedToyConfig, processes: int | None = None
) -> None:
    command = [sys.executable, "-m", "re2tal.datasets.toy", kind, str(folder)]
    if processes is not None:
        command += ["--processes", str(processes)]
    numbers = {name: value for name, value in asdict(config).items() if name != "unseen"}
    for name, value in numbers.items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--{name}", *map(str, values)]
    subprocess.run(command, check=True)  # noqa: S603 - a module of ours


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Clips in memory.

    Attributes:
        frames: uint8 (N, T, H, W, 3).
        poses: float32 (N, T, 4): x and y as shares of the side, log of the size, angle in radians.
        labels: class numbers, int64 (N,).
    """

    frames: np.ndarray
    poses: np.ndarray
    labels: Tensor


def load_clips(
    folder: Path, config: TrimmedToyConfig, *, size: int, processes: int
) -> tuple[Clips, Clips]:
    """Make the trimmed toy clips, unless they exist, and decode them at `size` pixels a side.

    `processes` is the number of processes that make clips, and of threads that decode them.

    Returns:
        The training and the validation clips.
    """
    toy_clips(folder, config, processes=processes)
    with ThreadPoolExecutor(processes) as pool:  # FFmpeg releases the interpreter lock
        return _read(folder, "training", size, pool), _read(folder, "validation", size, pool)


def _read(folder: Path, subset: str, size: int, pool: Executor) -> Clips:
    poses = load_file(folder / POSES)
    paths = sorted((folder / subset).glob("*/*.mp4"), key=lambda path: path.name)
    of_each = np.stack([poses[f"{path.parent.name}/{path.stem}"] for path in paths])
    decoding = partial(_decode, frames=of_each.shape[1], size=size)
    frames = np.stack(list(pool.map(decoding, paths)))
    labels = torch.tensor([TRIMMED_CLASSES.index(path.parent.name) for path in paths])
    return Clips(frames=frames, poses=of_each, labels=labels)


def _decode(path: Path, *, frames: int, size: int) -> np.ndarray:
    return decode(str(path), (np.arange(frames) + 0.5) / FPS, size=size)


def augmented(
    frames: np.ndarray, poses: np.ndarray, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Change the look of clips: mirroring, brightness per channel, contrast.

    None of these turns one toy action into another.

    Args:
        frames: uint8 (B, T, H, W, 3); changed in place.
        poses: (B, T, 4); changed in place.
        random: random generator.

    Returns:
        Normalised float (B, 3, T, H, W), and the poses.
    """
    mirrored = random.random(len(frames)) < 0.5
    frames[mirrored] = frames[mirrored][:, :, :, ::-1]
    # x becomes 1 - x, and the angle changes its sign
    poses[mirrored] = poses[mirrored] * (-1, 1, 1, -1) + (1, 0, 0, 0)
    contrast = random.uniform(0.8, 1.2, (len(frames), 1, 1, 1, 1))
    brightness = random.uniform(-0.3, 0.3, (len(frames), 3, 1, 1, 1))
    video = normalised(frames) * torch.from_numpy(contrast).float()
    return video + torch.from_numpy(brightness).float(), torch.from_numpy(poses)


def normalised(frames: np.ndarray) -> Tensor:
    """Turn uint8 RGB frames (B, T, H, W, 3) into a backbone's input: float (B, 3, T, H, W)."""
    mean, std = grey_levels(IMAGENET_MEAN), grey_levels(IMAGENET_STD)
    return normalize(torch.from_numpy(frames), mean, std)
