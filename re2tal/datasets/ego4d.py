"""Ego4D Moment Queries: moments_train.json, moments_val.json, moments_test_unannotated.json.

`{"videos": [{"video_uid", "split", "clips": [{"clip_uid", "clip_start_sec", "clip_end_sec",
"annotations": [{"annotator_uid", "labels": [{"start_time", "end_time", "label", "primary"}]}]}]}]}`
(Grauman et al., CVPR 2022; annotation schemas of the data set). A clip of up to eight minutes is
what is annotated, so a clip is a video here: its id is `clip_uid`, which is what the files of the
data set's own clips are called, and `start_time` and `end_time` count from the clip's start.
Several annotators saw each clip and all their labels count, so that one moment may be there twice
with slightly different times. Labels that are not `primary` are not part of the benchmark, and
clips of which no label is primary are left out, both as in the benchmark's own code.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from re2tal.annotations import AnnotationError, RawCollection, read_json

FILES = ("moments_train.json", "moments_val.json", "moments_test_unannotated.json")


def read_ego4d(path: Path) -> RawCollection:
    """Reads one of the files, or those of them that lie in a folder.

    Raises:
        AnnotationError: There is no such file, one cannot be read or is of another shape.
    """
    paths = [path / name for name in FILES if (path / name).exists()] if path.is_dir() else [path]
    if not paths:
        raise AnnotationError(str(path), [f"none of {', '.join(FILES)} is in this folder"])
    videos: dict[str, Any] = {}
    problems: list[str] = []
    excluded: dict[str, str] = {}
    for file in paths:
        document, repeated = read_json(file)
        twice = [f"{file.name}, {key}" for key in repeated]
        problems += twice
        for place, split, clip in _clips(document, file, twice):
            uid = clip.get("clip_uid") if isinstance(clip, dict) else None
            if not isinstance(uid, str):
                problems.append(f"{file.name}, {place}: must be an object with a clip_uid")
            elif uid in videos:
                problems.append(f"video {uid!r}: is there more than once")
            else:
                videos[uid] = _entry(split, clip)
                if "annotations" in clip and not videos[uid]["annotations"]:
                    excluded[uid] = "none of its labels is primary"
    return RawCollection(videos=videos, problems=tuple(problems), excluded=excluded)


def _clips(document: Any, path: Path, problems: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Every clip of a file: where it stands, the split of its video, and its raw object.

    Raises:
        AnnotationError: The file is of another shape; its other `problems` are told with it.
    """
    videos = document.get("videos") if isinstance(document, dict) else None
    if not isinstance(videos, list):
        shape = 'the top level must be an object that holds the list "videos"'
        raise AnnotationError(str(path), [*problems, shape])
    for number, video in enumerate(videos):
        clips = video.get("clips") if isinstance(video, dict) else None
        if not isinstance(clips, list):
            shape = f'videos[{number}] must be an object that holds the list "clips"'
            raise AnnotationError(str(path), [*problems, shape])
        for index, clip in enumerate(clips):
            yield f"videos[{number}].clips[{index}]", video.get("split"), clip


def _entry(split: Any, clip: dict[str, Any]) -> dict[str, Any]:
    """One clip in ActivityNet's shape."""
    start, end = clip.get("clip_start_sec"), clip.get("clip_end_sec")
    annotators = clip.get("annotations")
    return {
        "subset": split,
        "duration": _difference(end, start),
        "annotations": [
            {
                "segment": [label.get("start_time"), label.get("end_time")],
                "label": label.get("label"),
            }
            for annotator in (annotators if isinstance(annotators, list) else ())
            if isinstance(annotator, dict)
            for label in annotator.get("labels") or ()
            if isinstance(label, dict) and label.get("primary")
        ],
    }


def _difference(end: Any, start: Any) -> Any:
    """`end - start` of two numbers; `end` as it is where that is no number, to be refused later."""
    numbers = all(isinstance(value, int | float) for value in (start, end))
    return end - start if numbers else end
