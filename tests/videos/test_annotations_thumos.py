"""Which test videos of THUMOS-14 count, and how to count as others do."""

from pathlib import Path
from typing import Any

import pytest

from re2tal.annotations import AnnotationError, Exclusion
from re2tal.datasets import MULTITHUMOS, THUMOS14, load_annotations
from tests.videos.published_layouts import action, written

FALSE, EMPTY, UNSEEN = "video_test_0000270", "video_test_0001292", "video_test_0001496"


def video(*actions: Any, duration: float = 10.0, subset: str = "test") -> dict[str, Any]:
    return {"subset": subset, "duration": duration, "annotations": [*actions]}


def thumos_tests(folder: Path, **entries: Any) -> Path:
    """The three test videos of THUMOS-14 that not everybody counts, and another."""
    usual = {
        EMPTY: video(action(1, 2, "Ambiguous")),
        FALSE: video(action(1, 2, "Diving"), action(187, 193, "Diving")),
        UNSEEN: video(action(1, 2, "Diving")),
        "video_test_0000004": video(action(1, 2, "Diving")),
    }
    return written(folder / "thumos.json", {"database": usual | entries})


def test_unusable_videos_are_left_out_unchecked(tmp_path: Path) -> None:
    path = thumos_tests(
        tmp_path, **{FALSE: video(action(187, 193, "Diving"), subset="", duration=-1)}
    )
    annotations = load_annotations(path, dataset=THUMOS14)
    assert [v.video_id for v in annotations.videos] == ["video_test_0000004"]
    assert annotations.excluded == tuple(
        Exclusion(video_id=v, reason=THUMOS14.unusable[v]) for v in (FALSE, EMPTY, UNSEEN)
    )


@pytest.mark.parametrize(
    ("keep", "counted"),
    [((), 210), ((UNSEEN,), 211), ((FALSE, UNSEEN), 212), ((FALSE, EMPTY, UNSEEN), 213)],
)
def test_published_results_on_other_test_videos_can_be_compared_with(
    keep: tuple[str, ...], counted: int, tmp_path: Path
) -> None:
    path = thumos_tests(tmp_path)
    annotations = load_annotations(path, dataset=THUMOS14, keep=keep)
    # 213 test videos are annotated in the data set, 4 are here
    assert len(annotations.videos) == counted - (213 - 4)
    assert {e.video_id for e in annotations.excluded} == {FALSE, EMPTY, UNSEEN} - {*keep}
    again = load_annotations(path, dataset=THUMOS14)
    assert (annotations.fingerprint == again.fingerprint) == (not keep)


def test_what_is_to_be_kept_must_be_there_and_left_out(tmp_path: Path) -> None:
    path = thumos_tests(tmp_path)
    keep = [UNSEEN, "video_test_0000004", "video_test_1"]
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path, dataset=THUMOS14, keep=keep)
    assert caught.value.problems == (
        "video 'video_test_0000004': is to be kept, but is not left out",
        "video 'video_test_1': is to be kept, but is not in the annotations",
    )
    both = load_annotations(path, dataset=THUMOS14, keep=[UNSEEN], exclude=[UNSEEN])
    assert len(both.videos) == 1


def test_multithumos_uses_the_videos_that_thumos_leaves_out(tmp_path: Path) -> None:
    path = thumos_tests(tmp_path, **{EMPTY: video(action(0.03, 6.9, "TalkToCamera"))})
    annotations = load_annotations(path, dataset=MULTITHUMOS)
    assert len(annotations.videos) == 4
    (left_out,) = annotations.repairs
    assert (left_out.video_id, left_out.instance.start) == (FALSE, 187)
