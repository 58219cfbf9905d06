"""Pretraining of the small plain backbone of the toy recipes, from random weights."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from pipelines.config.clip_recipes import TOY_TRIMMED
from pipelines.core.checkout import this_command
from pipelines.core.clock import duration
from pipelines.core.metric_log import log_metrics
from pipelines.core.tracking import Run, finishing, start_run
from pipelines.data.toy import Clips, augmented, load_clips, normalised
from re2tal.backbones.protocol import BackboneConfig, Placed
from re2tal.backbones.swin import swin_toy
from re2tal.backbones.weights import save_backbone_weights
from re2tal.components import Component
from re2tal.datasets.toy import TRIMMED_CLASSES, TrimmedToyConfig
from re2tal.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainingConfig:
    """Classification of toy clips.

    Attributes:
        name: start of the MLflow run's name.
        experiment: MLflow experiment.
        runs: folder of the default MLflow store.
        output: safetensors file of the weights; replaced.
        folder: folder of the trimmed toy clips, which are made if they are missing.
        clips: number and length of the clips.
        backbone: shape of the backbone, which must show its features of each place (`Placed`).
        size: pixels of a frame's side.
        steps: optimizer steps.
        frames: frames of a step in total: many short parts at first, fewer long ones later.
        short: frames of a part in the first three fifths of the steps.
        long: frames of a part after that.
        guide: weight of the losses on the actor's place and motion; 0 learns from classes alone.
        lr: highest learning rate.
        weight_decay: weight decay of AdamW.
        seed: seed of weights and order.
        processes: number of processes that make and decode clips.
    """

    name: str = "pretrain_toy"
    experiment: str = "re2tal-backbones"
    runs: Path = Path("runs")
    output: Path = Path("runs/toy_backbone.safetensors")
    folder: Path = Path(TOY_TRIMMED)
    clips: TrimmedToyConfig = field(default_factory=TrimmedToyConfig)
    backbone: Annotated[BackboneConfig, Component()] = field(default_factory=swin_toy)
    size: int = 64
    steps: int = 1200
    frames: int = 512
    short: int = 16
    long: int = 32
    guide: float = 1.0
    lr: float = 2e-3
    weight_decay: float = 0.02
    seed: int = 0
    processes: int = 2


def batches(
    clips: Clips, config: PretrainingConfig, random: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield a batch for each step: augmented parts of clips, the actor's poses, and labels."""
    order: list[int] = []
    for step in range(config.steps):
        length = config.short if step < 0.6 * config.steps else config.long
        size = max(1, config.frames // length)
        while len(order) < size:
            order += random.permutation(len(clips.frames)).tolist()
        picked, order = order[:size], order[size:]
        starts = random.integers(0, clips.frames.shape[1] - length + 1, size)
        parts = [
            np.stack([of[i, s : s + length] for i, s in zip(picked, starts, strict=True)])
            for of in (clips.frames, clips.poses)
        ]
        yield *augmented(parts[0], parts[1], random), clips.labels[picked]


class Guide(nn.Module):
    """Auxiliary loss: linear layers predict the actor's place and motion from spatial features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.here = nn.Linear(channels, 1)
        self.motion = nn.Linear(channels, 4)
        # units: pixels of a 64-pixel side, a tenth of the size, a tenth of a radian; all about one
        self.register_buffer("scale", torch.tensor([64.0, 64.0, 10.0, 10.0]), persistent=False)

    def forward(self, features: Tensor, poses: Tensor) -> Tensor:
        """Return the loss.

        Args:
            features: (B, T', P, C), the places of square frames.
            poses: (B, T, 4) as in `Clips`.
        """
        batch, steps, places, channels = features.shape
        side = math.isqrt(places)
        per_step = poses.unflatten(1, (steps, -1))  # (B, T', T / T', 4)
        cells = (per_step.mean(dim=2)[..., :2] * side).long().clamp(0, side - 1)  # (B, T', 2): x, y
        cell = cells[..., 1] * side + cells[..., 0]  # index into P, row by row
        where = F.cross_entropy(self.here(features).flatten(0, 1)[..., 0], cell.flatten())
        index = cell[..., None, None].expand(batch, steps, 1, channels)
        # motion from the first to the last frame of a feature, learnt at the actor's place
        moved = (per_step[:, :, -1] - per_step[:, :, 0]) * self.scale
        how = F.smooth_l1_loss(self.motion(features.gather(2, index)[:, :, 0]), moved)
        return where + 2.0 * how


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Add the cross-entropies of the clip and of each of its features, to learn places in time.

    Args:
        logits: (B, T', K).
        labels: (B,).
    """
    whole = F.cross_entropy(logits.mean(dim=1), labels)
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))
    return whole + 0.5 * each


@torch.inference_mode()
def accuracy(backbone: nn.Module, head: nn.Linear, clips: Clips, length: int) -> float:
    """Return the top-1 accuracy on the middle `length` frames of each clip."""
    start = (clips.frames.shape[1] - length) // 2
    right = 0
    for first in range(0, len(clips.frames), 16):
        part = np.ascontiguousarray(clips.frames[first : first + 16, start : start + length])
        found = head(backbone(normalised(part)).mean(dim=2)).argmax(dim=1)
        right += int((found == clips.labels[first : first + 16]).sum())
    return right / len(clips.frames)


def fresh_backbone(config: BackboneConfig) -> Any:
    """Build a backbone with random weights whose scale follows each layer's width.

    The rule is that of Glorot and Bengio (2010). The libraries' scale of 0.02 for all layers makes
    the outputs of a narrow network's branches vanish.

    Raises:
        UserError: if the backbone does not show its features of each place.
    """
    backbone: nn.Module = config.build()
    if not isinstance(backbone, Placed):
        raise UserError(
            f"{type(backbone).__name__} cannot be pretrained here: it has no method `places`, from "
            "whose features the place and motion of the actor are learnt. Use finetune_backbone.py "
            "with --model.no-reversible, which learns from classes alone."
        )
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return backbone


def train(
    config: PretrainingConfig, clips: Clips, held_out: Clips, run: Run
) -> tuple[nn.Module, float]:
    """Train a backbone, and return it with its top-1 accuracy on the held-out clips."""
    random = np.random.default_rng(config.seed)
    backbone = fresh_backbone(config.backbone)
    head, guide = nn.Linear(backbone.channels, len(TRIMMED_CLASSES)), Guide(backbone.channels)
    parameters = [p for part in (backbone, head, guide) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    # the mean loss begins at that of uniform scores: log K for the clip, half of it for features
    began, running = time.perf_counter(), math.log(len(TRIMMED_CLASSES)) * 1.5
    reached = 0.0
    for step, (video, poses, labels) in enumerate(batches(clips, config, random), 1):
        backbone.train()
        places = backbone.places(video)
        loss = loss_of(head(places.mean(dim=2)), labels)
        total = loss + config.guide * guide(places, poses)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running += 0.05 * (float(loss.detach()) - running)
        if step % max(1, config.steps // 25) == 0 or step == config.steps:
            reached = accuracy(backbone.eval(), head, held_out, config.long)
            left = (time.perf_counter() - began) / step * (config.steps - step)
            log_metrics(run, {"train/loss": running, "val/top1": reached}, step=step)
            print(
                f"step {step:>4}/{config.steps}  loss {running:.3f}  held out {reached:.3f}  "
                f"left {duration(left)}",
                flush=True,
            )
    return backbone, reached


def pretrain(config: PretrainingConfig) -> None:
    """Make the clips, train, and write and log the weights."""
    clips, held_out = load_clips(
        config.folder, config.clips, size=config.size, processes=config.processes
    )
    torch.manual_seed(config.seed)
    run = start_run(config, output=config.runs.absolute(), once=True)
    with finishing(run):
        backbone, reached = train(config, clips, held_out, run)
        facts = {"command": this_command(), "held_out_top1": f"{reached:.4f}"}
        config.output.parent.mkdir(parents=True, exist_ok=True)
        save_backbone_weights(backbone, config.output, {"re2tal": json.dumps(facts)})
        run.client.log_artifact(run.run_id, str(config.output))
    print(f"weights: {config.output}, or runs:/{run.run_id}/{config.output.name}")
