"""From scored segments to a video's detections, and how good those are."""

from re2tal.detection.evaluation import MapResult, mean_average_precision
from re2tal.detection.nms import NmsConfig, nms, nms_videos
from re2tal.detection.segments import Detections, LabelledSegments, tiou

__all__ = [
    "Detections",
    "LabelledSegments",
    "MapResult",
    "NmsConfig",
    "mean_average_precision",
    "nms",
    "nms_videos",
    "tiou",
]
