from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import re2tal
from pipelines.config.recipes.thumos import thumos_re2_swin_t_vsgn
from re2tal.annotations import Instance, VideoAnnotation
from re2tal.backbones.swin import swin_toy
from re2tal.detection import Detections, NmsConfig
from re2tal.detector import Detector
from re2tal.errors import UserError
from re2tal.inference import detect, detector_folder, video_detections, window_detections
from re2tal.localizers import ActionFormerConfig, Targets
from re2tal.localizers.protocol import Losses
from re2tal.trained import DetectorSpec, save_detector
from re2tal.videos.encoding import encode
from re2tal.videos.stitching import StitchConfig
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window, WindowConfig, sliding_windows, window_frames

BRIGHT = [(1.0, 2.0), (4.5, 6.5), (9.0, 9.5)]  # seconds
DURATION = 10.0
FPS = 20


def film() -> bytes:
    """A dark film, twice as wide as high, that is bright in its middle at `BRIGHT`."""
    pictures = []
    for index in range(int(DURATION * FPS)):
        picture = np.full((32, 64, 3), 20, np.uint8)
        if any(start <= (index + 0.5) / FPS < end for start, end in BRIGHT):
            picture[:, 16:48] = 220
        pictures.append(picture)
    file = io.BytesIO()
    encode(file, pictures, fps=FPS, quality=10)
    return file.getvalue()


class Brightness(nn.Module):
    """The mean value of every second frame."""

    channels = 1
    temporal_stride = 2
    multiple = 2

    def forward(self, video: Tensor) -> Tensor:
        return video.mean(dim=(1, 3, 4)).unflatten(1, (-1, 2)).mean(dim=2)[:, None]

    def layer_of(self, name: str) -> int:
        raise NotImplementedError(name)  # it has no parameters


class Runs(nn.Module):
    """Finds the runs of bright features."""

    num_classes = 3
    multiple = 1

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        raise NotImplementedError  # it is not trained

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Tensor]:
        return ((features[:, 0] > 0.4) & mask,)

    def forward(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> list[Detections]:
        return self.decode(self.predict(features, mask))

    def losses(self, predicted: tuple[Tensor], targets: Sequence[Targets]) -> Losses:
        raise NotImplementedError  # it is not trained

    def decode(self, predicted: tuple[Tensor]) -> list[Detections]:
        found = []
        for row in predicted[0]:
            steps = [j for j, bright in enumerate(row.tolist()) if bright]
            starts = [j for j in steps if j - 1 not in steps]
            ends = [j for j in steps if j + 1 not in steps]
            segments = torch.tensor([starts, ends]).t().reshape(-1, 2) + torch.tensor([-0.5, 0.5])
            found.append(
                Detections(
                    segments=segments,
                    scores=segments.diff(dim=1)[:, 0] / 100,
                    labels=torch.full((len(segments),), 2),
                )
            )
        return found


SPEC = DetectorSpec(
    classes=("a", "b", "c"),
    backbone=swin_toy(),
    localizer=ActionFormerConfig(),
    size=16,
    window=WindowConfig(frames=60, fps=15.0, overlap=0.75),
    nms=NmsConfig(method="hard", iou=0.1),  # an action that a window cut is a fragment
)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_finds_in_a_file_when_it_is_bright(batch_size: int) -> None:
    detector = Detector(Brightness(), Runs(), mean=(0, 0, 0), std=(1, 1, 1)).eval()
    video = detect(film(), (SPEC, detector), batch_size=batch_size)
    found = video.detections
    assert video.duration == pytest.approx(DURATION)
    assert found.labels.tolist() == [2, 2, 2]
    in_order = found.segments[found.segments[:, 0].argsort()]
    torch.testing.assert_close(in_order, torch.tensor(BRIGHT), atol=2 / 15, rtol=0)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_a_detector_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        detect(film(), (SPEC, Detector(Brightness(), Runs())))


def test_what_is_no_video_no_model_and_no_batch_is_refused_in_words() -> None:
    detector = Detector(Brightness(), Runs()).eval()
    with pytest.raises(TypeError, match=r"A model is the folder .* not .* the class Detector\."):
        detect(film(), detector)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"A video is a path, .* not .* the class list\."):
        detect([film()], (SPEC, detector))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, but is 0\."):
        detect(film(), (SPEC, detector), batch_size=0)


def test_a_saved_detector_is_found_by_its_folder_or_its_checkpoint(tmp_path: Path) -> None:
    localizer = ActionFormerConfig(width=16, heads=2, levels=3, window=5, head_width=16)
    spec = replace(SPEC, localizer=localizer, window=WindowConfig(frames=64, fps=15.0))
    torch.manual_seed(0)
    detector = spec.build().eval()
    save_detector(tmp_path / "checkpoint" / "detector", spec, detector)
    (tmp_path / "film.mp4").write_bytes(film())
    expected = detect(film(), (spec, detector))
    assert len(expected) > 0
    for model in (tmp_path / "checkpoint", str(tmp_path / "checkpoint" / "detector")):
        found = re2tal.detect(tmp_path / "film.mp4", model, device="cpu")
        assert found.to_list() == expected.to_list()
    first = expected.to_list()[0]
    assert set(first) == {"segment", "score", "label"}
    assert str(expected).splitlines()[0].split()[-1] == first["label"]
    with pytest.raises(UserError, match=r"holds no detector: there is no spec\.json"):
        detector_folder(tmp_path)


def test_an_open_file_is_read_as_its_content_is() -> None:
    detector = Detector(Brightness(), Runs(), mean=(0, 0, 0), std=(1, 1, 1)).eval()
    found = detect(io.BytesIO(film()), (SPEC, detector))
    assert found.to_list() == detect(film(), (SPEC, detector)).to_list() != []


def window_of(grid: TimeGrid, *, valid: int) -> Window:
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    return Window(video_id="", grid=grid, valid=valid, segments=nothing[0], labels=nothing[1])


def test_the_detector_sees_the_square_in_the_middle() -> None:
    grid = TimeGrid(fps=15.0, stride=2, length=16, offset=0.52)
    window = window_of(grid, valid=12)
    frames = window_frames(film(), window, size=16)
    assert frames.shape == (16, 16, 16, 3)
    bright = [0.52 + (i + 0.5) / 15 >= 1.0 and i < 12 for i in range(16)]
    assert (frames.min(axis=(1, 2, 3)) > 180).tolist() == bright
    assert not frames[12:].any()


def detections(segments: list[list[float]], scores: list[float]) -> Detections:
    return Detections(
        segments=torch.tensor(segments),
        scores=torch.tensor(scores),
        labels=torch.zeros(len(scores), dtype=torch.int64),
    )


def test_a_window_is_put_at_its_place_in_the_video() -> None:
    grid = TimeGrid(fps=8.0, stride=2, length=32, offset=10.0)
    raw = detections([[-0.5, 3.5], [11.5, 30.0], [20.0, 30.0]], [0.9, 0.8, 0.7])
    found = window_detections(raw, window_of(grid, valid=32), duration=14.0)
    assert found.segments.tolist() == [[10.0, 11.0], [13.0, 14.0]]
    assert found.scores.tolist() == raw.scores[:2].tolist()


def test_an_action_in_two_windows_is_one_detection() -> None:
    first = detections([[3.0, 5.0]], [0.8])
    second = detections([[3.1, 5.0], [8.0, 9.0]], [0.7, 0.6])
    found = video_detections([first, second], NmsConfig(method="hard"))
    assert found.segments.tolist() == [[3.0, 5.0], [8.0, 9.0]]
    assert len(video_detections([], NmsConfig())) == 0


def test_actions_of_a_stitched_copy_are_put_into_the_clip() -> None:
    video = VideoAnnotation(
        video_id="",
        subset="",
        duration=3.0,
        instances=(Instance(start=1.0, end=2.0, label="a"),),
    )
    config = WindowConfig(frames=80, fps=8.0, stitch=StitchConfig(enabled=True))
    (window,) = sliding_windows(video, ("a",), config, stride=2)
    raw = detections([*window.segments.tolist(), [20.0, 39.5], [8.0, 15.0]], [0.9, 0.8, 0.7, 0.6])
    raw = replace(raw, labels=torch.tensor([0, 0, 1, 0]))  # the third repeats nothing
    found = window_detections(raw, window, duration=3.0)
    # the copy has 18 frames a second, from frame 26 on
    expected = [[1.0, 2.0], [(41 - 26) / 18, 3.0], [17 / 8, 3.0]]
    torch.testing.assert_close(found.segments, torch.tensor(expected))
    assert found.scores.tolist() == raw.scores[[0, 2, 3]].tolist()


@pytest.mark.parametrize(
    ("scores", "labels", "left"),
    [
        ([0.9, 0.8], [0, 0], [[5.0, 9.0]]),
        ([0.8, 0.9], [0, 0], [[5.0, 9.0]]),
        ([0.9, 0.8], [0, 1], [[5.0, 9.0]] * 2),  # of two classes, both may be right
    ],
)
@pytest.mark.parametrize("method", ["as the recipe", "none"])
def test_an_action_that_clip_and_copy_show_is_one_detection(
    scores: list[float], labels: list[int], left: list[list[float]], method: str
) -> None:
    recipe = thumos_re2_swin_t_vsgn()
    video = VideoAnnotation(
        video_id="",
        subset="",
        duration=20.0,
        instances=(Instance(start=5.0, end=9.0, label="a"),),
    )
    (window,) = sliding_windows(video, ("a", "b"), recipe.data.window, stride=2)
    raw = Detections(
        segments=torch.from_numpy(window.segments),
        scores=torch.tensor(scores),
        labels=torch.tensor(labels),
    )
    config = recipe.nms if method != "none" else NmsConfig(method="none")
    found = video_detections([window_detections(raw, window, duration=20.0)], config)
    torch.testing.assert_close(found.segments, torch.tensor(left))
    assert found.scores[0] == max(raw.scores)


def test_a_window_that_is_not_stitched_keeps_what_overlaps() -> None:
    grid = TimeGrid(fps=8.0, stride=2, length=32)
    raw = detections([[2.0, 6.0], [2.0, 6.0]], [0.9, 0.8])
    assert len(window_detections(raw, window_of(grid, valid=32), duration=14.0)) == 2
