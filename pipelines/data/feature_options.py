"""Options of `extract_features.py`, read before the slow imports of extraction itself."""

from dataclasses import dataclass, field

import tyro

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.recipe import PoolConfig
from pipelines.data.feature_writing import FilesConfig
from pipelines.data.sampling import SamplingConfig
from re2tal.backbones.table import entry_of
from re2tal.errors import UserError
from re2tal.precision import Precision
from re2tal.weights import Colour


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenBackboneConfig:
    """Backbone that makes features, and the form of its frames.

    Attributes:
        backbone: name of the backbone; `python -m re2tal.backbones` lists them.
        weights: weights of the backbone, required: a path or a URI, also of MLflow, or a name such
            as torchvision:swin3d_t/KINETICS400_V1 or hf:MCG-NJU/videomae-base.
        reversible: rewire the backbone (Re2TAL), for weights that were finetuned rewired.
        size: pixels of a frame's side: the short side is resized to it, the centre is cut out.
        precision: number format of the computation; reversible streams stay float32.
        batch_size: number of clips or windows in a forward pass.
        mean: means of red, green and blue in [0, 1] that the backbone was pretrained with; by
            default those in the table of backbones.
        std: standard deviations of red, green and blue, likewise.
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
        entry_of(self.backbone)
        if min(self.size, self.batch_size) < 1:
            raise UserError(
                f"--size and --batch-size must be at least 1, not {self.size} and "
                f"{self.batch_size}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig(AnnotationConfig):
    """Videos, backbone and sampling of features. Annotations are optional.

    Attributes:
        videos: folder of the video files, named by id, or of shards; a path or a URI.
        subsets: names of the subsets; all subsets by default. With annotations, features are made
            only of annotated videos, and cover their annotated duration.
        output: folder for the features; a path or a URI.
        retry_failed: try again the videos that failed before.
        max_failed: share of failed videos above which the script ends with an error; the features
            of the other videos are kept.
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
