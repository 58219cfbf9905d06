r"""Make features of videos with a frozen backbone, to train a localizer on them without frames.

  python pipelines/extract_features.py --videos FOLDER --annotations A --output FEATURES \
      --backbone swin_t --weights torchvision:swin3d_t/KINETICS400_V1
  python pipelines/extract_features.py --way windows --fps 15 --frames 1024 ...

They are made of short clips, one for each feature, like published features (--way clips), or of
long windows, like those of a detector trained end to end (--way windows). features.json beside the
files says where in their videos the features lie.

All places may be URIs (s3://, gs://, ...), and the videos may lie in shards (prepare.py). A run
that was stopped, however hard, goes on when the same command is given again. Videos that cannot be
decoded are listed in features.json; once they are mended, the same command with --retry-failed
makes only theirs.

`python -m re2tal.backbones` lists the backbones; one of your own needs --import MODULE_OR_FILE.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.choices import import_own
from pipelines.config.command_line import told_shortly
from pipelines.core.resources import PoolConfig
from pipelines.core.tracking import finishing, log_dataset, start_run, tracking_uri
from pipelines.data.feature_extraction import FeatureJob, FrozenBackboneConfig, load_backbone
from pipelines.data.feature_writing import FilesConfig
from pipelines.data.features import FEATURES, Description
from pipelines.data.inputs import resolved
from pipelines.data.plan import read_annotations
from pipelines.data.sampling import SamplingConfig
from re2tal.annotations import Annotations
from re2tal.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig(AnnotationConfig):
    """Videos, backbone and sampling of features. Annotations are optional.

    Attributes:
        videos: folder of the video files, named by id, or of shards; a path or a URI.
        subsets: names of the subsets; all of them by default. With annotations, features are made
            only of the annotated videos, and of their annotated length.
        output: folder for the features; a path or a URI.
        retry_failed: try the videos that failed before once more.
        max_failed: share of failed videos above which the script ends with an error; the features
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
        """Name of the MLflow run."""
        return f"features-{self.backbone.backbone}-{self.sampling.way}"


def parse(arguments: Sequence[str]) -> ExtractConfig:
    """Read the command line, without the program's name."""
    return tyro.cli(
        ExtractConfig, args=import_own(arguments), prog="extract_features.py", description=__doc__
    )


def extract_features(config: ExtractConfig) -> Description:
    """Make the features that are missing, and return the description of their folder.

    Raises:
        AnnotationError: the annotations have problems; all of them are listed.
        UserError: something is missing; the videos lie in incomplete shards; the folder holds
            features of other settings, or damaged ones; the cluster is too small; weights, stride
            or frames do not fit the backbone; or too many videos failed (the others have their
            features).
    """
    config = resolved(
        config,
        needed=("videos",),
        optional=("annotations", "exclude"),
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
    run = start_run(config, output=config.runs)
    with finishing(run):
        run.client.set_tag(run.run_id, "kind", "features")
        if annotations is not None:
            source = str(config.annotations)
            digest = annotations.fingerprint
            log_dataset(run, name=Path(source).stem, source=source, digest=digest)
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
            raise UserError("--subsets are of annotations: say which with --annotations.")
        return None
    return read_annotations(config)


if __name__ == "__main__":
    with told_shortly(
        failure="features could not be made. Start again to go on.",
    ):
        extract_features(parse(sys.argv[1:]))
