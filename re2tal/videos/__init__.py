"""Videos and what happens in them: annotations, time, decoding, windows and the toy data set."""

from re2tal.videos.annotations import (
    AnnotationError,
    Annotations,
    Instance,
    VideoAnnotation,
    load_annotations,
)
from re2tal.videos.decoding import VideoError, VideoInfo, decode, probe
from re2tal.videos.files import find_videos, match_videos
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import (
    Window,
    WindowConfig,
    decode_window,
    sliding_windows,
    training_windows,
)

__all__ = [
    "AnnotationError",
    "Annotations",
    "Instance",
    "TimeGrid",
    "VideoAnnotation",
    "VideoError",
    "VideoInfo",
    "Window",
    "WindowConfig",
    "decode",
    "decode_window",
    "find_videos",
    "load_annotations",
    "match_videos",
    "probe",
    "sliding_windows",
    "training_windows",
]
