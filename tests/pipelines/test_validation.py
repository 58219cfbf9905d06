"""Comparison of detections and annotations in a run's evaluation."""

from typing import Any

import pytest
import torch

from pipelines.data.batches import Batch, Video
from pipelines.training.validation import (
    MeanLoss,
    compare,
    detect_windows,
    metrics_of,
    overfitting,
    watched_videos,
)
from re2tal.annotations import Instance, VideoAnnotation
from re2tal.backbones.precomputed import PrecomputedConfig
from re2tal.classifier import ClipClassifierConfig
from re2tal.detection import Detections
from re2tal.detector import Detector
from re2tal.inference import window_detections
from re2tal.videos.windows import WindowConfig, sliding_windows
from tests.localizers.small import ACTIONFORMER, ACTIONS, NOTHING, TRIDET, VSGN, built, same, sample


def test_ambiguous_stretches_end_where_they_are_annotated_to_end() -> None:
    """A detection that starts at the end of an ambiguous stretch shares no time with it.

    In float32 this end, 1000.7, would be rounded up.
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


def _videos(first: int, count: int, *, empty: tuple[int, ...] = ()) -> list[Video]:
    action = (Instance(start=1.0, end=2.0, label="x"),)
    return [
        Video(
            annotation=VideoAnnotation(
                video_id=f"{i:02}", subset="", duration=9.0, instances=() if i in empty else action
            ),
            uri="",
        )
        for i in range(first, first + count)
    ]


@pytest.mark.parametrize(
    ("training", "validation", "most", "chosen"),
    [
        (_videos(0, 16), _videos(20, 9), 8, "00 02 04 06 08 10 12 14"),
        (_videos(0, 16), _videos(20, 2), 8, "00 08"),  # it costs no more than the validation
        (_videos(0, 2), _videos(20, 9), 8, "00 01"),
        (_videos(0, 4, empty=(0, 2)), _videos(20, 9), 8, "01 03"),
        (_videos(0, 4), _videos(2, 4), 8, "00 01"),  # the others are in the validation too
        (_videos(0, 4), _videos(0, 4), 8, ""),
        (_videos(0, 4), _videos(20, 4), 0, ""),
    ],
)
def test_the_watched_videos_are_a_fixed_handful_spread_over_the_training(
    training: list[Video], validation: list[Video], most: int, chosen: str
) -> None:
    found = watched_videos(training, validation, most)
    assert [video.annotation.video_id for video in found] == chosen.split()


def test_overfitting_is_said_where_the_training_videos_are_far_better() -> None:
    assert overfitting(0.5, 0.11) == "overfits: 0.50 on training videos, 0.11 on validation"
    assert overfitting(0.97, 0.82) == ""  # as the toy recipe
    assert overfitting(0.12, 0.05) == ""  # it has not learnt yet
    assert overfitting(0.2, 0.4) == ""
    assert overfitting(None, 0.1) == ""


def test_the_mean_loss_weighs_each_window_alike() -> None:
    mean = MeanLoss()
    assert mean.gathered() is None
    mean.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, windows=3)
    mean.add({"a": torch.tensor(7.0)}, windows=1)
    assert mean.gathered() == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("config", "network", "targets"),
    [
        *((config, "pyramid", tuple(ACTIONS)) for config in (ACTIONFORMER, TRIDET, VSGN)),
        (ClipClassifierConfig(), "linear", (NOTHING, NOTHING)),
    ],
)
def test_detections_and_their_loss_come_from_one_forward(
    config: Any, network: str, targets: Any
) -> None:
    backbone = PrecomputedConfig(channels=6, temporal_stride=1).build()
    detector = Detector(backbone, built(config)).eval()
    (video,) = _videos(0, 1)
    windows = sliding_windows(video.annotation, ["x"], WindowConfig(frames=32, fps=5.0), stride=1)
    features, mask = sample([32, 21])
    batch = Batch(
        windows=tuple(windows[:2]),
        frames=features.transpose(1, 2),
        mask=mask,
        targets=targets,
        failures={},
    )
    passes = []
    part = detector.localizer.get_submodule(network)
    hook = part.register_forward_hook(lambda *_: passes.append(1))
    loss = MeanLoss()
    found, _ = detect_windows(detector, [batch], {"00": 9.0}, loss=loss)
    assert len(passes) == 1
    hook.remove()
    with torch.no_grad():
        raw = detector.localizer(features, mask)
        terms = detector.localizer(features, mask, targets)
    seconds = [window_detections(r, w, 9.0) for r, w in zip(raw, batch.windows, strict=True)]
    assert len(found["00"]) > 0
    assert same(found["00"], Detections.concat(seconds))
    assert loss.total == 2 * float(torch.stack(list(terms.values())).sum())
