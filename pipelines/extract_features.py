r"""Makes features of videos with a frozen backbone, to train a localizer on them without frames.

  python pipelines/extract_features.py --videos FOLDER --annotations A --output FEATURES \
      --backbone swin_t --weights torchvision:swin3d_t/KINETICS400_V1
  python pipelines/extract_features.py --way windows --fps 15 --frames 1024 ...

Either of short clips, one for each feature, as published features are made (--way clips), or of
long windows, as a detector sees them that is trained end to end (--way windows). features.json
beside the files says where in their videos the features lie.

All places may be URIs (s3://, gs://, ...), and the videos may lie in shards (prepare.py). A run
that was stopped, however hard, goes on when the same command is given again. Videos that cannot be
decoded are listed in features.json; once they are mended, the same command with --retry-failed
makes only theirs.

`python -m re2tal.backbones` lists the backbones; one of your own needs --import MODULE_OR_FILE.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.choices import import_own
from pipelines.config.command_line import told_shortly
from pipelines.core.clock import duration
from pipelines.core.cluster import init_ray
from pipelines.core.storage import absolute, join
from pipelines.core.tracking import (
    Run,
    finishing,
    log_dataset,
    log_metrics,
    start_run,
    tracking_uri,
)
from pipelines.data.decoding import VideoJob
from pipelines.data.feature_extraction import (
    FrozenBackbone,
    FrozenBackboneConfig,
    Pool,
    PoolConfig,
    extract,
    load_backbone,
    pool_for,
)
from pipelines.data.feature_writing import (
    Collection,
    FeatureFolder,
    FilesConfig,
    MakingProgress,
    VideoInTheMaking,
    collect,
)
from pipelines.data.features import DESCRIPTION, NAME, Description, Sampling, SamplingConfig
from pipelines.data.plan import read_annotations
from re2tal.annotations import Annotations
from re2tal.errors import UserError, shortened


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig(AnnotationConfig):
    """Of which videos, with which backbone, and how. Annotations are not needed.

    Attributes:
        videos: folder of the video files, named by id, or of shards; a path or a URI.
        subsets: names of the subsets; all of them by default. With annotations, features are made
            of the annotated videos only, as long as annotated.
        output: folder for the features; a path or a URI.
        retry_failed: also try the videos that failed before once more.
        max_failed: end with an error when more than this share of the videos failed; the features
            of the others are kept.
        experiment: MLflow experiment.
        runs: folder of the default MLflow store.
    """

    videos: str | None = None
    subsets: tuple[str, ...] = ()
    output: str | None = None
    backbone: tyro.conf.OmitArgPrefixes[FrozenBackboneConfig] = field(
        default_factory=FrozenBackboneConfig
    )
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    files: tyro.conf.OmitArgPrefixes[FilesConfig] = field(default_factory=FilesConfig)
    pool: tyro.conf.OmitArgPrefixes[PoolConfig] = field(default_factory=PoolConfig)
    retry_failed: bool = False
    max_failed: float = 0.05
    experiment: str = "re2tal"
    runs: str = "runs"

    @property
    def name(self) -> str:
        """Of the MLflow run."""
        return f"features-{self.backbone.backbone}-{self.sampling.way}"


def parse(arguments: Sequence[str]) -> ExtractConfig:
    """Reads the command line.

    Args:
        arguments: without the program's name.
    """
    return tyro.cli(
        ExtractConfig, args=import_own(arguments), prog="extract_features.py", description=__doc__
    )


def extract_features(config: ExtractConfig) -> Description:
    """Makes the features that are not there yet.

    Args:
        config: of which videos, and how.

    Returns:
        What the folder holds.

    Raises:
        UserError: if something is not there.
        AnnotationError: with every problem in the annotations.
        UserError: if the videos lie in shards that are not whole; if the folder holds features of
            other settings, or damaged ones; if the cluster is too small; if weights, stride or
            frames do not fit the backbone; if more videos failed than may; all others have their
            features.
    """
    annotations = _annotations(config)
    collection = collect(config.videos, annotations, config.subsets)
    if config.output is None:
        raise UserError("The features: no path given. Say where with --output PATH_OR_URI.")
    stride = config.sampling.stride if config.sampling.way == "windows" else None
    runs = Path(config.runs).absolute()
    try:
        backbone = load_backbone(config.backbone, stride=stride, tracking_uri=tracking_uri(runs))
        sampling = config.sampling.resolved(
            temporal_stride=backbone.temporal_stride, multiple=backbone.multiple
        )
    except ValueError as problem:
        raise UserError(str(problem)) from problem
    job = _Job(config, collection, backbone, sampling)
    run = start_run(config, output=runs)
    with finishing(run):
        run.client.set_tag(run.run_id, "kind", "features")
        if annotations is not None and config.annotations is not None:
            source = absolute(config.annotations)
            name = Path(source).stem
            log_dataset(run, name=name, source=source, digest=annotations.fingerprint)
        description = job.run()
        _log(run, job, description)
        _check_failures(description, config.max_failed)
    return description


class _Job:
    """One run: what is to be made, and how far it is."""

    def __init__(
        self,
        config: ExtractConfig,
        collection: Collection,
        backbone: FrozenBackbone,
        sampling: Sampling,
    ) -> None:
        self._config, self._collection = config, collection
        self._backbone, self._sampling = backbone, sampling
        self.uri = absolute(str(config.output))
        self.speed = 0.0  # seconds of video per second
        self._folder = FeatureFolder(
            self.uri,
            config.files,
            tuple(collection.subsets),
            settings={**backbone.described(), **sampling.described()},
            sampling=sampling,
            channels=backbone.channels,
        )

    def run(self) -> Description:
        """Makes what is missing."""
        began = time.perf_counter()
        to_make = self._folder.begin(retry_failed=self._config.retry_failed)
        total = len(self._collection.subsets)
        print(f"{total - len(to_make)} of {total} videos are through", flush=True)
        if to_make:
            init_ray()
            self._make(to_make)
            self._folder.write_description()
        description = self._folder.description
        print(_summary(description, self.uri, time.perf_counter() - began), flush=True)
        return description

    def _make(self, video_ids: Sequence[str]) -> None:
        """Makes the features of some videos."""
        pool = pool_for(self._config.pool)
        found, failures = self._collection.look_at(video_ids)
        for video_id, reason in failures.items():
            self._fail(video_id, reason)
        videos = {
            video_id: VideoInTheMaking(
                video,
                self._sampling.of(duration=video.duration, own_fps=video.fps),
                self._collection.subsets[video_id],
            )
            for video_id, video in found.items()
        }
        for video_id in [v for v in videos if self._folder.holds(v)]:
            self._folder.adopt(video_id, videos.pop(video_id).entry)
        if videos:
            self._extract(videos, pool)

    def _extract(self, videos: dict[str, VideoInTheMaking], pool: Pool) -> None:
        """Runs the backbone over some videos, and writes what it makes of each."""
        progress = MakingProgress(videos.values())
        jobs = [VideoJob(video_id=k, uri=v.found.uri, sampled=v.sampled) for k, v in videos.items()]
        notes = self._folder.notes
        for made in extract(jobs, self._backbone, self._sampling, pool, notes=notes):
            video = videos[made.video_id]
            if made.error:
                self._fail(made.video_id, made.error)
                progress.through(not_made=video.seconds(video.units_left))
                continue
            whole = video.take(made.number, made.units)
            progress.made(video.seconds(len(made.units)))
            if whole is not None:
                self._folder.add(made.video_id, whole)
                del videos[made.video_id]
                progress.through()
        self.speed = progress.speed

    def _fail(self, video_id: str, reason: str) -> None:
        print(f"  failed: {video_id}: {reason}", flush=True)
        self._folder.fail(video_id, reason)


def _annotations(config: ExtractConfig) -> Annotations | None:
    if config.annotations is None:
        if config.subsets:
            raise UserError("--subsets are of annotations: say which with --annotations.")
        return None
    return read_annotations(config, prefix="--")


def _log(run: Run, job: _Job, description: Description) -> None:
    """Writes to MLflow what was made."""
    metrics = {
        "features/videos": len(description.videos),
        "features/failed": len(description.failures),
        "features/number": sum(entry.length for entry in description.videos.values()),
        "features/video_seconds": sum(entry.duration for entry in description.videos.values()),
    }
    if job.speed:
        metrics["features/video_seconds_per_second"] = job.speed
    log_metrics(run, metrics, step=0)
    run.client.set_tag(run.run_id, "features", job.uri)
    text = DESCRIPTION.dump_json(description, indent=1).decode()
    run.client.log_text(run.run_id, text, NAME)


def _summary(description: Description, folder: str, seconds: float) -> str:
    entries = description.videos.values()
    took = f"{duration(sum(e.duration for e in entries))} of video; {duration(seconds)} in all"
    number = sum(entry.length for entry in entries)
    made = f"{len(entries)} videos, {number} features of {description.channels} channels"
    lines = [f"{description.state}: {made}, {took}"]
    if description.failures:
        lines.append(f"{len(description.failures)} videos failed: {join(folder, NAME)} says why")
    return "\n".join(lines)


def _check_failures(description: Description, max_failed: float) -> None:
    failed = len(description.failures)
    total = failed + len(description.videos)
    if failed <= max_failed * total:
        return
    reasons = [f"{video_id}: {reason}" for video_id, reason in sorted(description.failures.items())]
    listed = "\n".join(f"  {line}" for line in shortened(reasons, rest=f", in {NAME}"))
    raise UserError(
        f"{failed} of {total} videos have no features, more than the allowed {max_failed:.0%} "
        f"(--max-failed). Mend them and give the same command with --retry-failed.\n{listed}"
    )


if __name__ == "__main__":
    with told_shortly(
        failure="features could not be made. Start again to go on.",
    ):
        extract_features(parse(sys.argv[1:]))
