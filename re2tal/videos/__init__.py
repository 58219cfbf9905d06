"""Videos: files, time grids, decoding and windows."""

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
    "TimeGrid",
    "VideoError",
    "VideoInfo",
    "Window",
    "WindowConfig",
    "decode",
    "decode_window",
    "find_videos",
    "match_videos",
    "probe",
    "sliding_windows",
    "training_windows",
]
