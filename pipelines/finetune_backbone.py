"""Trains a backbone to classify trimmed clips, and writes its weights.

python pipelines/finetune_backbone.py
    pretrains the small plain Swin of the toy recipe on toy clips: it made the weights that the
    repository ships (about half an hour on two CPU cores)
python pipelines/finetune_backbone.py --steps 200 --output /tmp/weights.safetensors

The clips show other sprites and other backgrounds than the untrimmed toy videos, from other seeds.
What is printed as "held out" is measured on clips drawn like the untrimmed videos.
"""

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from pipelines.progress import duration
from pipelines.recipes import TOY_WEIGHTS
from re2tal.backbones.checkpoint import save_backbone_weights
from re2tal.backbones.swin import SwinBackbone, SwinConfig, swin_toy
from re2tal.trained import IMAGENET_MEAN, IMAGENET_STD
from re2tal.videos.decoding import decode
from re2tal.videos.toy import ACTIONS, FPS, make_clip

# Motion that is no action is a class too: telling it apart is half of what a detector does.
CLASSES: tuple[str | None, ...] = (*ACTIONS, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainingConfig:
    """Classification of toy clips.

    Attributes:
        output: the weights, safetensors; replaced.
        backbone: the shape of the backbone.
        clips: number of training clips.
        held_out: number of clips that are drawn like the untrimmed videos.
        seconds: length of a clip, of which each step sees a random part.
        size: pixels of a frame's side.
        steps: optimizer steps.
        frames: frames that a step sees in all: many short parts at first, fewer long ones later.
        short: frames of a part in the first three fifths of the steps.
        long: frames of a part after that.
        lr: highest learning rate.
        weight_decay: of AdamW.
        seed: of weights, clips and order.
        processes: that render clips.
    """

    output: Path = Path(TOY_WEIGHTS)
    backbone: SwinConfig = field(default_factory=swin_toy)
    clips: int = 2800
    held_out: int = 210
    seconds: float = 5.0
    size: int = 64
    steps: int = 2600
    frames: int = 512
    short: int = 16
    long: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.02
    seed: int = 0
    processes: int = 2


def _clip(number: int, *, config: PretrainingConfig, held_out: bool) -> np.ndarray:
    """One clip, decoded from H.264: uint8 (T, size, size, 3); clip i is of class i mod 7."""
    label = CLASSES[number % len(CLASSES)]
    content = make_clip(label, config.seconds, config.seed * 10**6 + number, held_out=held_out)
    times = (np.arange(round(config.seconds * FPS)) + 0.5) / FPS
    return decode(content, times, size=config.size)


def render_clips(config: PretrainingConfig, count: int, *, held_out: bool) -> np.ndarray:
    """Renders clips in several processes.

    Args:
        config: their length and size.
        count: how many; the classes take turns.
        held_out: draw them like the untrimmed videos.

    Returns:
        uint8 (count, T, size, size, 3).
    """
    began = time.perf_counter()
    make = partial(_clip, config=config, held_out=held_out)
    with ProcessPoolExecutor(
        config.processes, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        clips = list(pool.map(make, range(count), chunksize=8))
    kind = "held-out" if held_out else "training"
    print(f"{count} {kind} clips rendered in {duration(time.perf_counter() - began)}", flush=True)
    return np.stack(clips)


def augmented(clips: np.ndarray, random: np.random.Generator) -> Tensor:
    """Changes how clips look, and never which motion they show.

    Mirrored, run backwards, colour channels exchanged, inverted, brighter or darker: no action
    turns into another by any of these, as all of them are symmetric in time and left to right.

    Args:
        clips: uint8 (B, T, H, W, 3); changed in place.
        random: the source of choices.

    Returns:
        Normalised float (B, 3, T, H, W).
    """
    for i in range(len(clips)):
        mirror, backwards, inverted = random.random(3) < 0.5
        view = clips[i][:: -1 if backwards else 1, :, :: -1 if mirror else 1]
        clip = view[..., random.permutation(3)]
        clips[i] = 255 - clip if inverted else clip
    video = normalised(clips)
    contrast = random.uniform(0.8, 1.2, (len(clips), 1, 1, 1, 1))
    brightness = random.uniform(-0.3, 0.3, (len(clips), 3, 1, 1, 1))
    return video * torch.from_numpy(contrast).float() + torch.from_numpy(brightness).float()


def normalised(clips: np.ndarray) -> Tensor:
    """Turns uint8 (B, T, H, W, 3) into float (B, 3, T, H, W), as a detector does.

    Args:
        clips: RGB frames.
    """
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() - mean) / std


def batches(
    clips: np.ndarray, config: PretrainingConfig, random: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields augmented parts of clips and their labels, one batch a step.

    Args:
        clips: uint8 (N, T, H, W, 3), clip i of class i mod 7.
        config: lengths of the parts.
        random: the source of choices.
    """
    order: list[int] = []
    for step in range(config.steps):
        length = config.short if step < 0.6 * config.steps else config.long
        size = max(1, config.frames // length)
        while len(order) < size:
            order += random.permutation(len(clips)).tolist()
        picked, order = order[:size], order[size:]
        starts = random.integers(0, clips.shape[1] - length + 1, size)
        parts = np.stack([clips[i, s : s + length] for i, s in zip(picked, starts, strict=True)])
        yield augmented(parts, random), torch.tensor([i % len(CLASSES) for i in picked])


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the clip and of each of its features: where, not only whether, is learnt.

    Args:
        logits: (B, T', K).
        labels: (B,).
    """
    whole = F.cross_entropy(logits.mean(dim=1), labels)
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))
    return whole + 0.5 * each


@torch.inference_mode()
def accuracy(backbone: SwinBackbone, head: nn.Linear, clips: np.ndarray, length: int) -> float:
    """Top-1 accuracy on the middle of each clip.

    Args:
        backbone: in evaluation mode.
        head: its classifier.
        clips: uint8 (N, T, H, W, 3), clip i of class i mod 7.
        length: frames of a clip that are looked at.
    """
    start = (clips.shape[1] - length) // 2
    right = 0
    for first in range(0, len(clips), 16):
        part = np.ascontiguousarray(clips[first : first + 16, start : start + length])
        found = head(backbone(normalised(part)).mean(dim=2)).argmax(dim=1)
        right += int((found == torch.arange(first, first + len(part)) % len(CLASSES)).sum())
    return right / len(clips)


def train(config: PretrainingConfig) -> float:
    """Renders clips, trains, writes the weights.

    Args:
        config: what to do.

    Returns:
        Top-1 accuracy on the held-out clips.
    """
    torch.manual_seed(config.seed)
    random = np.random.default_rng(config.seed)
    held_out = render_clips(config, config.held_out, held_out=True)
    clips = render_clips(config, config.clips, held_out=False)
    backbone = config.backbone.build()
    head = nn.Linear(backbone.channels, len(CLASSES))
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    began, running = time.perf_counter(), math.log(len(CLASSES)) * 1.5
    for step, (video, labels) in enumerate(batches(clips, config, random), 1):
        backbone.train()
        loss = loss_of(head(backbone(video).transpose(1, 2)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running += 0.05 * (float(loss.detach()) - running)
        if step % max(1, config.steps // 25) == 0 or step == config.steps:
            reached = accuracy(backbone.eval(), head, held_out, config.long)
            left = (time.perf_counter() - began) / step * (config.steps - step)
            print(
                f"step {step:>4}/{config.steps}  loss {running:.3f}  held out {reached:.3f}  "
                f"left {duration(left)}",
                flush=True,
            )
    facts = {"command": " ".join(sys.argv), "held_out_top1": f"{reached:.4f}"}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    save_backbone_weights(backbone, config.output, {"re2tal": json.dumps(facts)})
    print(f"weights: {config.output}")
    return reached


if __name__ == "__main__":
    train(tyro.cli(PretrainingConfig, description=__doc__))
