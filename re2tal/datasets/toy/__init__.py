"""Generated toy data set of actions that differ only in their motion."""

from re2tal.datasets.toy.dataset import (
    ANNOTATIONS,
    FPS,
    NO_ACTION,
    POSES,
    TRIMMED_CLASSES,
    UNFINISHED,
    VIDEOS,
    ToyClip,
    ToyConfig,
    TrimmedToyConfig,
    make_clip,
    make_toy,
    make_trimmed_toy,
    unseen_toy,
)
from re2tal.datasets.toy.scene import ACTIONS, FRAME_SIZE, UNSEEN_ACTIONS

__all__ = [
    "ACTIONS",
    "ANNOTATIONS",
    "FPS",
    "FRAME_SIZE",
    "NO_ACTION",
    "POSES",
    "TRIMMED_CLASSES",
    "UNFINISHED",
    "UNSEEN_ACTIONS",
    "VIDEOS",
    "ToyClip",
    "ToyConfig",
    "TrimmedToyConfig",
    "make_clip",
    "make_toy",
    "make_trimmed_toy",
    "unseen_toy",
]
