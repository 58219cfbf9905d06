"""What happens when in which video, for seven data sets, read and checked whole.

`load_annotations` reads ActivityNet-1.3, THUMOS-14, MultiTHUMOS, HACS Segments, FineAction,
EPIC-Kitchens-100 and Ego4D Moment Queries into one `Annotations`. Everything that is wrong is
listed in one `AnnotationError`; what is known to be wrong in a published data set is repaired and
reported when its quirks are passed (`THUMOS14`, `ACTIVITYNET13`, ...). Each form has one file with
one reader, and one function checks them all. `python -m re2tal.datasets FILE` describes
a file.
"""

from re2tal.datasets.checking import DURATION_TOLERANCE
from re2tal.datasets.durations import check_durations
from re2tal.datasets.loading import (
    FORMS,
    Form,
    load_annotations,
    read_durations,
    read_ids,
)
from re2tal.datasets.quirks import (
    ACTIVITYNET13,
    DATASETS,
    EGO4D_MQ,
    EPIC_KITCHENS100,
    FINEACTION,
    HACS_SEGMENTS,
    MULTITHUMOS,
    THUMOS14,
    DatasetQuirks,
    Fault,
)
from re2tal.datasets.summary import summarize

__all__ = [
    "ACTIVITYNET13",
    "DATASETS",
    "DURATION_TOLERANCE",
    "EGO4D_MQ",
    "EPIC_KITCHENS100",
    "FINEACTION",
    "FORMS",
    "HACS_SEGMENTS",
    "MULTITHUMOS",
    "THUMOS14",
    "DatasetQuirks",
    "Fault",
    "Form",
    "check_durations",
    "load_annotations",
    "read_durations",
    "read_ids",
    "summarize",
]
