"""Feature extraction with Ray Data: decoding in tasks, the backbone in a pool of actors."""

import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor, nn

from pipelines.config.recipe import PoolConfig
from pipelines.core.clock import duration
from pipelines.core.cluster import start_ray
from pipelines.core.metric_log import log_metrics
from pipelines.core.models import fetch_weights, require_weights
from pipelines.core.progress import VideoCounter
from pipelines.core.resources import Pool, pool_for
from pipelines.core.storage import Stamp, join
from pipelines.core.tracking import Run, finishing, log_dataset, start_run, tracking_uri
from pipelines.data.decoding import VideoJob, decode_video
from pipelines.data.feature_options import ExtractConfig, FrozenBackboneConfig
from pipelines.data.feature_writing import FeatureFolder, FilesConfig, VideoInTheMaking
from pipelines.data.features import FEATURES, NAME, Description
from pipelines.data.inputs import resolved
from pipelines.data.plan import read_annotations
from pipelines.data.sampling import Sampling
from pipelines.data.videos import FoundVideos, find_videos, opened
from re2tal.annotations import Annotations
from re2tal.backbones.protocol import BackboneConfig, Strided
from re2tal.backbones.table import entry_of
from re2tal.backbones.weights import load_backbone_weights
from re2tal.detector import grey_levels, normalize
from re2tal.errors import UserError
from re2tal.reversible import rewire
from re2tal.videos.reader import TAIL
from re2tal.weights import Colour


@dataclass(frozen=True, kw_only=True)
class FrozenBackbone:
    """Backbone with its weights, sent to the actors that run it.

    Attributes:
        config: options that the backbone was loaded with.
        shape: configuration of the backbone's layers.
        mean: means of red, green and blue in [0, 1]; `std` are their standard deviations.
        state: weights by name.
        fingerprint: SHA-256 of the weights.
        channels: C of the features.
        temporal_stride: frames per feature.
        multiple: the backbone's number of input frames must be a multiple of this.
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
        """Return the settings that determine the features; files of features record them."""
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
        """Build the module, ready to run."""
        backbone = _build(self.shape, reversible=self.config.reversible)
        backbone.load_state_dict(self.state)
        return FeatureExtractor(backbone.eval().to(device), self)


def load_backbone(
    config: FrozenBackboneConfig, *, stride: int | None, tracking_uri: str | None = None
) -> FrozenBackbone:
    """Read the weights and check that they fit the backbone.

    Args:
        config: backbone and its weights.
        stride: frames per feature of windows, if other than the backbone's own; None for clips.
        tracking_uri: MLflow's store, where weights may lie.

    Raises:
        UserError: if there are no weights.
        ValueError: if the weights do not fit the backbone, or it cannot have that stride.
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
    """Backbone in evaluation mode that turns frames into features."""

    def __init__(self, backbone: nn.Module, frozen: FrozenBackbone) -> None:
        self._backbone = backbone
        self._device = next(backbone.parameters()).device
        self._mean = grey_levels(frozen.mean).to(self._device)
        self._std = grey_levels(frozen.std).to(self._device)
        self._precision = getattr(torch, frozen.config.precision)

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Tensor:
        """Compute the features of clips or windows.

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
        # as bytes: NumPy has no bfloat16
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _build(shape: BackboneConfig, *, reversible: bool) -> Any:
    backbone = shape.build()
    if reversible:
        rewire(backbone)
    return backbone


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StretchFeatures:
    """Features of the units in a stretch of a video.

    Attributes:
        number: position of the stretch in the video, counted from 0.
        units: float32 of shape (U, per_unit, C).
        error: reason why there are none; empty if all went well.
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
    """Make the features of videos, and yield them as they are finished, in any order.

    Ray Data's memory budget, a share of the object store, bounds the frames that are decoded ahead
    of the backbone. On a small cluster with another execution this budget may be zero: then
    extraction works, but slowly (`pipelines.data.streaming` says why). `notes` is the path or URI
    of a folder for notes on the videos that are being decoded.
    """
    decode = functools.partial(
        decode_video,
        size=backbone.config.size,
        batch_size=backbone.config.batch_size,
        threads=pool.config.decoder_threads,
        notes=notes,
    )
    dataset = ray.data.from_items(
        [{"video": video} for video in videos], override_num_blocks=len(videos)
    ).flat_map(decode, num_cpus=pool.config.cpus_per_decoder)
    dataset = pool.map_batches(
        dataset, _Actor, backbone=backbone, sampling=sampling, device=pool.device
    )
    dataset.set_name("extracting features")
    for row in dataset.iter_rows():
        yield StretchFeatures(
            video_id=row["video_id"],
            number=int(row["number"]),
            units=np.asarray(row["units"]),
            error=row["error"],
        )


class _Actor:
    """Actor that runs the backbone on one stretch after another."""

    def __init__(self, *, backbone: FrozenBackbone, sampling: Sampling, device: str) -> None:
        self._extract = backbone.build(torch.device(device))
        self._batch, self._sampling = backbone.config.batch_size, sampling

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Make the features of a row of `decode_video`; Ray calls this."""
        units = np.zeros((0, 1, 1), np.float32)
        if not batch["error"][0]:
            units = unit_features(
                self._extract,
                batch["frames"][0],
                batch["starts"][0],
                valid=int(batch["valid"][0]),
                frames=self._sampling.frames,
                clips=self._sampling.way == "clips",
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
    """Make the features of the units in a stretch.

    Args:
        extractor: backbone, as `FeatureExtractor`.
        stretch: decoded frames, uint8 (T, H, W, 3).
        starts: first frame of each unit.
        valid: number of frames that show the video. A clip longer than its video repeats the last
            of them; a window is black after it, as for a detector.
        frames: number of frames of a unit.
        clips: the units are clips, whose features are averaged over time.
        batch_size: number of units in a forward pass.

    Returns:
        float32 of shape (U, 1 or T' / temporal_stride, C).
    """
    made = []
    for first in range(0, len(starts), batch_size):
        places = starts[first : first + batch_size, None] + np.arange(frames)
        if clips:
            places = places.clip(max=valid - 1)
        found = extractor(torch.from_numpy(stretch[places]))  # (B, frames, H, W, 3) to (B, C, T')
        made.append(found.mean(dim=2, keepdim=True) if clips else found)
    return torch.cat(made).transpose(1, 2).contiguous().numpy()  # (U, C, T') to (U, T', C)


class FeatureJob:
    """Job that fills a folder with the features of videos; a killed job can be continued.

    Args:
        uri: path or URI of the folder.
        videos: path or URI of the folder of the videos.
        annotations: annotations of the videos; without them, features are made of all videos.
        subsets: names of the subsets; empty for all videos.
        backbone: backbone that makes the features.
        sampling: units that each video is cut into.
        files: format of the files.
        pool: actors and decoding tasks.

    Attributes:
        speed: seconds of video per second of the last run.

    Raises:
        UserError: if there are no videos; if they lie in incomplete shards; if the folder holds
            features of other settings, or damaged ones.
        AnnotationError: if a subset does not exist.
    """

    def __init__(
        self,
        uri: str,
        videos: str,
        annotations: Annotations | None,
        subsets: Sequence[str] = (),
        *,
        backbone: FrozenBackbone,
        sampling: Sampling,
        files: FilesConfig,
        pool: PoolConfig,
    ) -> None:
        chosen = annotations.chosen(subsets) if annotations is not None else ()
        ids = None if annotations is None else [video.video_id for video in chosen]
        self._uri, self._found = uri, find_videos(videos, ids)
        self._backbone, self._sampling, self._pool = backbone, sampling, pool
        self._durations = {v.video_id: v.duration for v in chosen}
        self._subsets = dict.fromkeys(self._found.uris, "") | {v.video_id: v.subset for v in chosen}
        self.speed = 0.0
        self._stamps: dict[str, Stamp] = {}  # of the videos in progress
        self._folder = FeatureFolder(
            uri,
            files,
            tuple(self._subsets),
            settings={**backbone.described(), **sampling.described()},
            sampling=sampling,
            channels=backbone.channels,
        )

    def run(self, *, retry_failed: bool) -> Description:
        """Make the features that are missing; `retry_failed` tries the failed videos once more."""
        began = time.perf_counter()
        print(*self._found.remarks, sep="\n", end="\n" * bool(self._found.remarks))
        replaced = self._found.replaced(self._folder.stamps)
        for video_id in replaced:
            print(f"  replaced: {video_id}: its file is not the one that its features were made of")
        self._folder.forget(replaced)
        to_make = self._folder.begin(retry_failed=retry_failed)
        total = len(self._subsets)
        print(f"{total - len(to_make)} of {total} videos are done", flush=True)
        if to_make:
            start_ray()
            self._make(to_make)
            self._folder.write_description()
        description = self._folder.description
        print(_summary(description, self._uri, time.perf_counter() - began), flush=True)
        return description

    def log(self, run: Run, description: Description) -> None:
        """Send the numbers of a run, and the description that it returned, to MLflow."""
        metrics = {
            "features/videos": len(description.videos),
            "features/failed": len(description.failures),
            "features/number": sum(entry.length for entry in description.videos.values()),
            "features/video_seconds": sum(entry.duration for entry in description.videos.values()),
        }
        if self.speed:
            metrics["features/video_seconds_per_second"] = self.speed
        log_metrics(run, metrics, step=0)
        run.client.set_tag(run.run_id, "features", self._uri)
        text = FEATURES.description.dump_json(description, indent=1).decode()
        run.client.log_text(run.run_id, text, NAME)

    def _make(self, video_ids: Sequence[str]) -> None:
        pool = pool_for(self._pool)
        known = self._found.uris
        found = opened(replace(self._found, uris={v: known[v] for v in video_ids if v in known}))
        self._stamps = found.stamped(found.uris)
        videos: dict[str, VideoInTheMaking] = {}
        for video_id in video_ids:
            if video_id in found.failures:
                self._fail(video_id, found.failures[video_id])
                continue
            video = self._video(video_id, found)
            if self._folder.holds(video_id):
                self._folder.adopt(video_id, video.entry)
            else:
                videos[video_id] = video
        if videos:
            self._extract(videos, pool)

    def _video(self, video_id: str, found: FoundVideos) -> VideoInTheMaking:
        """Lay units over a video's annotated duration, so that features fit training's windows."""
        measured = found.durations[video_id]
        seconds = self._durations.get(video_id, measured)
        if seconds > measured + TAIL:  # the file ends earlier: nothing to decode after its end
            seconds = measured
        return VideoInTheMaking(
            uri=found.uris[video_id],
            duration=seconds,
            sampled=self._sampling.of(duration=seconds, own_fps=found.rates[video_id]),
            subset=self._subsets[video_id],
            stamp=self._stamps.get(video_id),
        )

    def _extract(self, videos: dict[str, VideoInTheMaking], pool: Pool) -> None:
        """Run the backbone over videos, and write the features of each."""
        counter = VideoCounter(len(videos), sum(video.duration for video in videos.values()))
        jobs = [VideoJob(video_id=k, uri=v.uri, sampled=v.sampled) for k, v in videos.items()]
        notes = self._folder.notes
        for made in extract(jobs, self._backbone, self._sampling, pool, notes=notes):
            video = videos[made.video_id]
            if made.error:
                self._fail(made.video_id, made.error)
                counter.through(not_made=video.seconds(video.units_left))
                continue
            whole = video.take(made.number, made.units)
            counter.made(video.seconds(len(made.units)))
            if whole is not None:
                self._folder.add(made.video_id, whole)
                del videos[made.video_id]
                counter.through()
        self.speed = counter.speed

    def _fail(self, video_id: str, reason: str) -> None:
        print(f"  failed: {video_id}: {reason}", flush=True)
        self._folder.fail(video_id, reason)


def _summary(description: Description, folder: str, seconds: float) -> str:
    entries = description.videos.values()
    took = f"{duration(sum(e.duration for e in entries))} of video; {duration(seconds)} in all"
    number = sum(entry.length for entry in entries)
    made = f"{len(entries)} videos, {number} features of {description.channels} channels"
    lines = [f"{description.state}: {made}, {took}"]
    if description.failures:
        lines.append(f"{len(description.failures)} videos failed: {join(folder, NAME)} says why")
    return "\n".join(lines)


def extract_features(config: ExtractConfig) -> Description:
    """Make the features that are missing, and return the description of their folder.

    Raises:
        AnnotationError: with every problem in the annotations.
        UserError: if an input is missing; the videos lie in incomplete shards; the folder holds
            features of other settings, or damaged ones; the cluster is too small; weights, stride
            or frames do not fit the backbone; or too many videos failed (the features of the
            others are written).
    """
    config = resolved(
        config,
        needed=("videos",),
        optional=("annotations",),
        written=("output", "runs"),
    )
    annotations = _annotations(config)
    stride = config.sampling.stride if config.sampling.way == "windows" else None
    store = tracking_uri(config.runs)
    try:
        backbone = load_backbone(config.backbone, stride=stride, tracking_uri=store)
        sampling = config.sampling.resolved(
            temporal_stride=backbone.temporal_stride, multiple=backbone.multiple
        )
    except ValueError as problem:
        raise UserError(str(problem)) from problem
    job = FeatureJob(
        str(config.output),
        str(config.videos),
        annotations,
        config.subsets,
        backbone=backbone,
        sampling=sampling,
        files=config.files,
        pool=config.pool,
    )
    run = start_run(config, output=config.runs, once=True)
    with finishing(run):
        run.client.set_tag(run.run_id, "kind", "features")
        if annotations is not None:
            source = str(config.annotations)
            digest = annotations.fingerprint
            used = {"inference": config.title}
            log_dataset(run, source=source, digest=digest, subsets=used)
        made = job.run(retry_failed=config.retry_failed)
        job.log(run, made)
        FEATURES.check_failures(
            made.failures,
            len(made.failures) + len(made.videos),
            config.max_failed,
            problem="have no features",
        )
    return made


def _annotations(config: ExtractConfig) -> Annotations | None:
    if config.annotations is None:
        if config.subsets:
            raise UserError("--subsets names subsets of annotations: give --annotations as well.")
        return None
    return read_annotations(config)
