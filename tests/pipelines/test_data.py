"""Windows of a worker: Ray Data delivers exactly these, in order and decoded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.data.batches import Video, decode_batches, epoch_windows, share, stream_batches
from pipelines.data.plan import Plan
from pipelines.data.streaming import FrameStream
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import Window, WindowConfig

CONFIG = WindowConfig(frames=64, fps=12.0)


def _windows(plan: Plan, *, seed: int = 0, epoch: int = 0) -> list[Window]:
    return epoch_windows(plan.training, plan.classes, CONFIG, stride=2, seed=seed, epoch=epoch)


def _places(windows: list[Window]) -> list[tuple[str, float]]:
    return [(w.video_id, w.grid.offset) for w in windows]


def test_an_epoch_is_a_function_of_seed_and_epoch(tiny_plan: Plan) -> None:
    first = _places(_windows(tiny_plan))
    assert first == _places(_windows(tiny_plan))
    assert first != _places(_windows(tiny_plan, epoch=1))
    assert first != _places(_windows(tiny_plan, seed=1))
    assert {name for name, _ in first} == {v.annotation.video_id for v in tiny_plan.training}


def test_windows_are_changed_in_time_one_by_one_and_only_so(tiny_plan: Plan) -> None:
    def windows(augmentation: AugmentationConfig | None, epoch: int = 0) -> list[Window]:
        return epoch_windows(
            tiny_plan.training, tiny_plan.classes, CONFIG, stride=2, seed=0, epoch=epoch,
            augmentation=augmentation,
        )  # fmt: skip

    def told(windows: list[Window]) -> list[Any]:
        return [(w.video_id, w.grid, w.valid, w.segments.tobytes(), w.backwards) for w in windows]

    plain = _windows(tiny_plan)
    for same in (None, AugmentationConfig(speed=(1.0, 1.0), flip=0.5)):
        assert told(windows(same)) == told(plain)
    varied = AugmentationConfig(speed=(0.5, 1.5), reverse=0.5)
    changed = windows(varied)
    assert told(changed) == told(windows(varied))
    assert [w.video_id for w in changed] == [w.video_id for w in plain]
    rates = [w.grid.fps for w in changed]
    assert len(set(rates)) == len(rates)
    assert 8.0 <= min(rates) < 12.0 < max(rates) <= 24.0
    assert {w.backwards for w in changed} == {False, True}
    later = windows(varied, epoch=1)
    assert sorted(rates) != sorted(w.grid.fps for w in later)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_share_an_epoch_evenly_and_without_overlap(
    tiny_plan: Plan, world_size: int
) -> None:
    windows = _windows(tiny_plan)
    shares = [
        share(windows, rank=rank, world_size=world_size, batch_size=2) for rank in range(world_size)
    ]
    assert len({len(part) for part in shares}) == 1
    assert len(shares[0]) % 2 == 0
    places = [place for part in shares for place in _places(part)]
    assert len(set(places)) == len(places)
    assert len(windows) - len(places) < 2 * world_size  # less than one step is left out


def test_too_few_windows_for_a_step_is_one_clear_error(tiny_plan: Plan) -> None:
    with pytest.raises(ValueError, match="do not fill one step of 4 workers x batch 64"):
        share(_windows(tiny_plan), rank=0, world_size=4, batch_size=64)


def test_batches_hold_frames_masks_and_targets_of_their_windows(tiny_plan: Plan) -> None:
    windows = _windows(tiny_plan)[:3]
    short = replace(windows[2], valid=10)
    (first, second) = decode_batches([*windows[:2], short], tiny_plan.uris, size=32, batch_size=2)
    assert first.frames.shape == (2, 64, 32, 32, 3)
    assert first.frames.dtype == torch.uint8
    assert first.mask.all()
    assert second.mask[0].tolist() == [i < 10 for i in range(64)]
    assert not second.frames[0, 10:].any()
    for window, target in zip(windows[:2], first.targets, strict=True):
        assert target.segments.numpy() == pytest.approx(window.segments)
        assert target.labels.tolist() == window.labels.tolist()


def test_a_window_that_cannot_be_decoded_is_masked_and_reported(
    tiny_plan: Plan, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    window = next(w for w in _windows(tiny_plan) if len(w.labels))
    uris = {window.video_id: str(broken)}
    (batch,) = decode_batches([window], uris, size=32, batch_size=1)
    assert not batch.mask.any()
    assert not batch.frames.any()
    assert len(batch.targets[0].labels) == 0
    assert str(broken) in batch.failures[window.video_id]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_videos_are_read_by_uri(tiny_plan: Plan) -> None:
    window = _windows(tiny_plan)[0]
    path = tiny_plan.uris[window.video_id]
    by_uri = list(
        stream_batches(
            FrameStream(), [window], {window.video_id: f"file://{path}"}, size=32, batch_size=1
        )
    )
    by_path = list(decode_batches([window], {window.video_id: path}, size=32, batch_size=1))
    assert torch.equal(by_uri[0].frames, by_path[0].frames)
    assert isinstance(tiny_plan.training[0], Video)
