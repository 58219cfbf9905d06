"""Trimmed videos of one class each, as in Kinetics: lists of videos, and clips cut from them."""

from re2tal.datasets.trimmed.clips import ClipConfig, TrimmedVideo, ViewConfig, random_clip, views
from re2tal.datasets.trimmed.lists import (
    Entry,
    Place,
    TrimmedList,
    find_files,
    joint_classes,
    read_classes,
    read_folders,
    read_list,
)

__all__ = [
    "ClipConfig",
    "Entry",
    "Place",
    "TrimmedList",
    "TrimmedVideo",
    "ViewConfig",
    "find_files",
    "joint_classes",
    "random_clip",
    "read_classes",
    "read_folders",
    "read_list",
    "views",
]
