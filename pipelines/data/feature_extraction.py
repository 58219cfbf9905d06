"""Frames to features with Ray Data: decoding in tasks, the backbone in a pool of actors."""

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import Tensor, nn

from pipelines.core.models import fetch_weights, require_weights
from pipelines.core.resources import capacity, require_resources
from pipelines.data.decoding import VideoJob, decode_video
from pipelines.data.features import Sampling
from re2tal.backbones.protocol import BackboneConfig, Strided
from re2tal.backbones.table import entry_of
from re2tal.backbones.weights import load_backbone_weights
from re2tal.detector import grey_levels, normalize
from re2tal.errors import UserError
from re2tal.precision import Precision
from re2tal.reversible import rewire
from re2tal.weights import Colour


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenBackboneConfig:
    """Which backbone, and what it sees.

    Attributes:
        backbone: its name, of those that `python -m re2tal.backbones` lists.
        weights: its weights, without which its features would mean nothing; a path or a
            URI, also of MLflow, or a name such as torchvision:swin3d_t/KINETICS400_V1.
        reversible: rewire it (Re2TAL), for weights that were finetuned so.
        size: pixels of a frame's side: the short side is resized to it, the centre is cut out.
        precision: what it computes in; its reversible streams stay float32.
        batch_size: clips or windows that go through it at a time.
        mean: of red, green and blue in [0, 1] that it was pretrained with; by default as the table
            of backbones has it.
        std: their standard deviation.
    """

    backbone: str = "swin_t"
    weights: str | None = None
    reversible: bool = False
    size: int = 224
    precision: Precision = "float32"
    batch_size: int = 4
    mean: Colour | None = None
    std: Colour | None = None

    def __post_init__(self) -> None:
        if min(self.size, self.batch_size) < 1:
            raise UserError(
                f"--size and --batch-size must be at least 1, not {self.size} and "
                f"{self.batch_size}."
            )


@dataclass(frozen=True, kw_only=True)
class FrozenBackbone:
    """A backbone with its weights, which travels to the processes that run it.

    Attributes:
        config: what was asked for.
        shape: of the backbone.
        mean: of the frames that it is given.
        std: their standard deviation.
        state: its weights by name.
        fingerprint: SHA-256 of these.
        channels: C of its features.
        temporal_stride: frames per feature.
        multiple: the number of frames that it is given is a multiple of this.
    """

    config: FrozenBackboneConfig
    shape: BackboneConfig
    mean: Colour
    std: Colour
    state: dict[str, Tensor]
    fingerprint: str
    channels: int
    temporal_stride: int
    multiple: int

    def described(self) -> dict[str, Any]:
        """What decides its features, for files of them."""
        config = self.config
        return {
            "backbone": config.backbone,
            "shape": asdict(self.shape),  # type: ignore[call-overload]
            "weights": self.fingerprint,
            "reversible": config.reversible,
            "size": config.size,
            "precision": config.precision,
            "mean": self.mean,
            "std": self.std,
        }

    def build(self, device: torch.device) -> "FeatureExtractor":
        """The module, ready to run."""
        backbone = _build(self.shape, reversible=self.config.reversible)
        backbone.load_state_dict(self.state)
        return FeatureExtractor(backbone.eval().to(device), self)


def load_backbone(
    config: FrozenBackboneConfig, *, stride: int | None, tracking_uri: str | None = None
) -> FrozenBackbone:
    """Reads the weights and checks that they fit.

    Args:
        config: which backbone.
        stride: frames per feature of windows, if other than the backbone's own; None for clips.
        tracking_uri: MLflow's store, where weights may lie.

    Raises:
        UserError: if there are no weights.
        ValueError: if they do not fit the backbone, or it cannot have that stride.
    """
    entry = entry_of(config.backbone)
    shape = entry.make()
    if stride is not None:
        if entry.input == "clip":
            raise ValueError(f"--way windows: {entry.name} takes clips only; take --way clips.")
        if not isinstance(shape, Strided):
            raise ValueError(f"--stride: that of {entry.name} cannot be changed.")
        shape = shape.with_stride(stride)
    mean, std = config.mean or entry.mean, config.std or entry.std
    backbone = _build(shape, reversible=config.reversible)
    weights = require_weights(config.weights, option="--weights")
    with tempfile.TemporaryDirectory() as folder:
        fetched = fetch_weights(weights, Path(folder), tracking_uri=tracking_uri)
        if fetched is None:
            raise UserError(
                "The backbone's weights: no path given. Say where with --weights PATH_OR_URI."
            )
        report = load_backbone_weights(backbone, fetched)
    report.require_normalization(mean, std, option="--")
    state = backbone.state_dict()
    temporal_stride = int(backbone.temporal_stride)
    return FrozenBackbone(
        config=config,
        shape=shape,
        mean=mean,
        std=std,
        state=state,
        fingerprint=_fingerprint(state),
        channels=int(backbone.channels),
        temporal_stride=temporal_stride,
        multiple=int(backbone.multiple),
    )


class FeatureExtractor:
    """Frames in, features out.

    Args:
        backbone: in evaluation mode.
        frozen: says what it sees.
    """

    def __init__(self, backbone: nn.Module, frozen: FrozenBackbone) -> None:
        self._backbone = backbone
        self._device = next(backbone.parameters()).device
        self._mean = grey_levels(frozen.mean).to(self._device)
        self._std = grey_levels(frozen.std).to(self._device)
        self._precision = getattr(torch, frozen.config.precision)

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Tensor:
        """The features of some clips or windows.

        Args:
            frames: `(B, T, H, W, 3)` uint8 on the CPU.

        Returns:
            `(B, C, T / temporal_stride)` float32 on the CPU.
        """
        frames = frames.to(self._device, non_blocking=True)
        lower = self._precision != torch.float32
        with torch.autocast(self._device.type, self._precision, enabled=lower):
            features: Tensor = self._backbone(normalize(frames, self._mean, self._std))
        return features.float().cpu()


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _build(shape: BackboneConfig, *, reversible: bool) -> Any:
    backbone = shape.build()
    if reversible:
        rewire(backbone)
    return backbone


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
        UserError: if CPUs or GPUs do not suffice for the actors and one decoding task.
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
    it works, but slowly (`pipelines.data.streaming` says why).

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
