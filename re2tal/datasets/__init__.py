"""Reading and complete checking of the annotations of seven data sets.

`load_annotations` reads ActivityNet-1.3, THUMOS-14, MultiTHUMOS, HACS Segments, FineAction,
EPIC-Kitchens-100 and Ego4D Moment Queries into one `Annotations`. All faults are listed in one
`AnnotationError`; known faults of a published data set are repaired and reported if its record is
passed (`THUMOS14`, `ACTIVITYNET13`, ...). `published` holds a record for each data set, `forms` a
reader for each form. `python -m re2tal.datasets FILE` describes a file.
"""

from re2tal.datasets.checking import DURATION_TOLERANCE, check_durations
from re2tal.datasets.loading import load_annotations, read_durations, read_ids
from re2tal.datasets.published import (
    ACTIVITYNET13,
    ACTIVITYNET_BINS,
    ANY_OTHER,
    DATASETS,
    EGO4D_MQ,
    EPIC_KITCHENS100,
    FINEACTION,
    FORMS,
    HACS_SEGMENTS,
    MULTITHUMOS,
    THUMOS14,
    THUMOS_BINS,
    Dataset,
    Fault,
)
from re2tal.datasets.summary import summarize

__all__ = [
    "ACTIVITYNET13",
    "ACTIVITYNET_BINS",
    "ANY_OTHER",
    "DATASETS",
    "DURATION_TOLERANCE",
    "EGO4D_MQ",
    "EPIC_KITCHENS100",
    "FINEACTION",
    "FORMS",
    "HACS_SEGMENTS",
    "MULTITHUMOS",
    "THUMOS14",
    "THUMOS_BINS",
    "Dataset",
    "Fault",
    "check_durations",
    "load_annotations",
    "read_durations",
    "read_ids",
    "summarize",
]
