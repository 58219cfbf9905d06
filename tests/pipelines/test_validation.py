"""What the evaluation of a run compares."""

import pytest
import torch

from pipelines.data.batches import Video
from pipelines.training.validation import compare, metrics_of
from re2tal.annotations import Instance, VideoAnnotation
from re2tal.detection import Detections


def test_ambiguous_stretches_end_where_they_are_annotated_to_end() -> None:
    """A detection that starts with the end of such a stretch shares no time with it.

    In float32 this end, 1000.7, is later than it is.
    """
    annotation = VideoAnnotation(
        video_id="a",
        subset="",
        duration=2000.0,
        instances=(Instance(start=1.0, end=2.0, label="x"),),
        ambiguous=(Instance(start=100.7, end=1000.7, label="Ambiguous"),),
    )
    found = Detections(
        segments=torch.tensor([[1000.7, 1005.0], [1.0, 2.0]], dtype=torch.float64),
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([0, 0]),
    )
    video = Video(annotation=annotation, uri="")

    def quality(found: Detections) -> float:
        results = compare({"a": found}, [video], ["x"], [0.5], ignore_ambiguous=True)
        return metrics_of(results, ["x"])["val/mAP"]

    assert quality(found) == pytest.approx(0.5)
    earlier = found.segments - torch.tensor([[0.1], [0.0]])
    assert quality(found.with_segments(earlier)) == pytest.approx(1.0)
