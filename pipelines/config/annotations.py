"""Command-line options of all scripts that read annotations."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal, TypeAlias

from re2tal.datasets import ANY_OTHER, DATASETS, FORMS, Dataset

PROBE = "probe"
"""Value of `durations` that reads them from the videos."""

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
    FormName: TypeAlias = str
else:  # the command line offers and accepts only data sets with a record
    DatasetName = Literal[*DATASETS]
    FormName = Literal["auto", *FORMS]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationConfig:
    """Annotations, and the choice of their videos.

    Attributes:
        annotations: ActivityNet-style JSON, or another format that `re2tal.datasets` reads; a path
            or, for a single file, a URI that pyarrow opens (s3://, gs://, ...).
        form: format of the annotations; "auto" detects it.
        dataset: data set whose known faults are repaired, listed and logged, and whose subsets and
            metrics are used; without it, any fault in the annotations is an error.
        exclude: file with ids of videos to leave out, such as those that are no longer available:
            one a line, or JSON.
        durations: durations of videos for annotations that lack them, as some conversions of
            THUMOS-14 do: a file (JSON, id -> seconds), or "probe" to read them from the videos.
        keep: ids of videos to use, as in some published results, although `dataset` leaves them
            out.
        trim_labels: remove spaces around labels; without it, labels that differ only in such spaces
            are an error, as are labels that differ only in case.
    """

    annotations: str | None = None
    form: FormName = "auto"
    dataset: DatasetName | None = None
    exclude: str | None = None
    durations: str | None = None
    keep: tuple[str, ...] = ()
    trim_labels: bool = False

    @property
    def title(self) -> str:
        """Name of the data: that of the data set, or else of the annotation file or its folder."""
        path = PurePath(str(self.annotations))
        return self.dataset or (path.parent.name if path.stem == "annotations" else path.stem)

    @property
    def record(self) -> Dataset:
        """Record of the data set."""
        record = DATASETS[self.dataset] if self.dataset else ANY_OTHER
        return record.trimming() if self.trim_labels else record


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnnotationConfig(AnnotationConfig):
    """Annotations, and an external classifier of whole videos.

    Attributes:
        video_scores: file with an external classifier's scores of the evaluated videos, for
            class-agnostic proposals (`re2tal.detection.video_scores`); a path or a URI.
        video_scores_top: number of the video's best classes that each proposal gets.
        video_scores_logits: apply a softmax, because the file holds logits (HACS).
    """

    video_scores: str | None = None
    video_scores_top: int = 2
    video_scores_logits: bool = False
