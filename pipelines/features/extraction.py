"""Frames to features with Ray Data: decoding in tasks, the backbone in a pool of actors."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import Tensor

from pipelines.features.backbone import FrozenBackbone
from pipelines.features.decoding import VideoJob, decode_video
from pipelines.features.sampling import Sampling
from pipelines.resources import capacity, require_resources


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """How the work is laid over the cluster.

    Attributes:
        actors: processes that run the backbone; by default one a GPU, or one without GPUs.
        gpu: one GPU for each of them; by default if the cluster has any.
        cpus_per_actor: logical CPUs that each of them holds; what is left over decodes videos.
        cpus_per_decoder: logical CPUs that a decoding task holds, so how many of them run at once.
        decoder_threads: of a decoding task; more than one helps with large pictures only.
    """

    actors: int | None = None
    gpu: bool | None = None
    cpus_per_actor: float = 1.0
    cpus_per_decoder: float = 0.5
    decoder_threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """`PoolConfig` for a cluster.

    Attributes:
        actors: processes that run the backbone.
        gpu: one GPU for each of them.
        config: the rest.
    """

    actors: int
    gpu: bool
    config: PoolConfig


def pool_for(config: PoolConfig) -> Pool:
    """Decides what is left open, and checks that the cluster can hold it: Ray itself would wait.

    Args:
        config: what was asked for.

    Raises:
        ResourceError: if CPUs or GPUs do not suffice for the actors and one decoding task.
    """
    gpu = capacity().get("GPU", 0.0) > 0 if config.gpu is None else config.gpu
    now = int(ray.cluster_resources().get("GPU", 0.0))
    actors = config.actors or (max(1, now) if gpu else 1)
    require_resources(
        cpus=actors * config.cpus_per_actor + config.cpus_per_decoder,
        gpus=actors if gpu else 0,
        who=f"{actors} actors and the decoding",
        advice="Lower --actors or --cpus-per-actor, or go without GPUs (--gpu False).",
    )
    return Pool(actors=actors, gpu=gpu, config=config)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StretchFeatures:
    """The features of the units in a stretch of a video.

    Attributes:
        video_id: the video.
        number: of the stretch, from 0 on.
        units: float32 of shape (U, per_unit, C).
        error: why there are none; empty if all went well.
    """

    video_id: str
    number: int
    units: np.ndarray
    error: str


def extract(
    videos: Sequence[VideoJob],
    backbone: FrozenBackbone,
    sampling: Sampling,
    pool: Pool,
    *,
    notes: str,
) -> Iterator[StretchFeatures]:
    """Makes the features of videos, in the order in which they come.

    What is decoded ahead of the backbone is bounded by Ray Data's budget, a share of the object
    store. With another execution beside this one on a small cluster the budget may be none: then
    it works, but slowly (`pipelines.streaming` says why).

    Args:
        videos: of which.
        backbone: that makes them.
        sampling: how videos are sampled.
        pool: of the actors.
        notes: path or URI of a folder for notes on what is being decoded.
    """
    decode = functools.partial(
        decode_video,
        size=backbone.config.size,
        batch_size=backbone.config.batch_size,
        threads=pool.config.decoder_threads,
        notes=notes,
    )
    dataset = (
        ray.data.from_items([{"video": video} for video in videos], override_num_blocks=len(videos))
        .flat_map(decode, num_cpus=pool.config.cpus_per_decoder)
        .map_batches(
            _Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.config.cpus_per_actor,
            num_gpus=1 if pool.gpu else None,
            fn_constructor_kwargs={
                "backbone": backbone,
                "clips": sampling.way == "clips",
                "frames": sampling.frames,
                "gpu": pool.gpu,
            },
        )
    )
    for row in dataset.iter_rows():
        yield StretchFeatures(
            video_id=row["video_id"],
            number=int(row["number"]),
            units=np.asarray(row["units"]),
            error=row["error"],
        )


class _Actor:
    """Runs the backbone on one stretch after the other."""

    def __init__(self, *, backbone: FrozenBackbone, clips: bool, frames: int, gpu: bool) -> None:
        device = torch.device("cuda" if gpu else "cpu")
        self._extract, self._batch = backbone.build(device), backbone.config.batch_size
        self._clips, self._frames = clips, frames

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """What Ray runs: a row of `decode_video` to its features."""
        units = np.zeros((0, 1, 1), np.float32)
        if not batch["error"][0]:
            units = unit_features(
                self._extract,
                batch["frames"][0],
                batch["starts"][0],
                valid=int(batch["valid"][0]),
                frames=self._frames,
                clips=self._clips,
                batch_size=self._batch,
            )
        kept = {name: batch[name] for name in ("video_id", "number", "error")}
        return {**kept, "units": units[None]}


def unit_features(
    extractor: Callable[[Tensor], Tensor],
    stretch: np.ndarray,
    starts: np.ndarray,
    *,
    valid: int,
    frames: int,
    clips: bool,
    batch_size: int,
) -> np.ndarray:
    """The features of the units in a stretch.

    Args:
        extractor: the backbone, as `FeatureExtractor`.
        stretch: decoded frames, uint8 (T, H, W, 3).
        starts: first frame of each unit.
        valid: so many frames show the video; a clip that is longer than its video repeats the last
            one, a window is black behind it, as for a detector.
        frames: of a unit.
        clips: average over time what the backbone makes of a unit.
        batch_size: units that go through it at a time.

    Returns:
        float32 of shape (U, 1 or T' / temporal_stride, C).
    """
    made = []
    for first in range(0, len(starts), batch_size):
        places = starts[first : first + batch_size, None] + np.arange(frames)
        if clips:
            places = places.clip(max=valid - 1)
        found = extractor(torch.from_numpy(stretch[places]))
        made.append(found.mean(dim=2, keepdim=True) if clips else found)
    return torch.cat(made).transpose(1, 2).contiguous().numpy()
