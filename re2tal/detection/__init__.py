"""Post-processing of scored segments into a video's detections, and evaluation of detections."""

from re2tal.detection.evaluation import (
    ClassRecall,
    MapResult,
    ProposalRecall,
    average_recall,
    mean_average_precision,
    recall_at,
)
from re2tal.detection.files import read_detections, rows, write_detections
from re2tal.detection.raw import ensemble, read_raw, write_raw
from re2tal.detection.segments import Detections, LabelledSegments, tiou
from re2tal.detection.suppression import NmsConfig, nms, nms_videos
from re2tal.detection.video_scores import VideoScores, fuse, fuse_videos, load_video_scores
from re2tal.json_files import FileError

__all__ = [
    "ClassRecall",
    "Detections",
    "FileError",
    "LabelledSegments",
    "MapResult",
    "NmsConfig",
    "ProposalRecall",
    "VideoScores",
    "average_recall",
    "ensemble",
    "fuse",
    "fuse_videos",
    "load_video_scores",
    "mean_average_precision",
    "nms",
    "nms_videos",
    "read_detections",
    "read_raw",
    "recall_at",
    "rows",
    "tiou",
    "write_detections",
    "write_raw",
]
