"""A toy data set that the project makes itself: actions that only their motion tells apart."""

from re2tal.datasets.toy.dataset import (
    ANNOTATIONS,
    FPS,
    VIDEOS,
    ToyClip,
    ToyConfig,
    make_clip,
    make_toy,
)
from re2tal.datasets.toy.motion import ACTIONS, FRAME_SIZE
from re2tal.datasets.toy.trimmed import (
    NO_ACTION,
    POSES,
    TRIMMED_CLASSES,
    UNFINISHED,
    TrimmedToyConfig,
    make_trimmed_toy,
)

__all__ = [
    "ACTIONS",
    "ANNOTATIONS",
    "FPS",
    "FRAME_SIZE",
    "NO_ACTION",
    "POSES",
    "TRIMMED_CLASSES",
    "UNFINISHED",
    "VIDEOS",
    "ToyClip",
    "ToyConfig",
    "TrimmedToyConfig",
    "make_clip",
    "make_toy",
    "make_trimmed_toy",
]
