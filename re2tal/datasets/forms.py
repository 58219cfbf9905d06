"""Forms in which annotations are published, with a reader for each.

Every reader converts its files to ActivityNet's shape, video id -> `{"subset", "duration",
"annotations": [{"segment": [start, end], "label"}]}`. Invalid values are passed on unchanged:
`re2tal.datasets.checking` checks the entries of all forms.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from re2tal.annotations import AnnotationError, RawCollection, read_json, read_text
from re2tal.json_files import RepeatedKey


@dataclass(frozen=True, kw_only=True, slots=True)
class FileForm:
    """Form of annotation files.

    Attributes:
        name: value of the options that choose a form.
        read: reader of a file or folder; it raises an `AnnotationError` if files are missing or
            have another shape.
        suits: function that recognises the form by the names and content of a file or folder. None
            for the default form of all other files.
    """

    name: str
    read: Callable[[Path], RawCollection]
    suits: Callable[[Path], bool] | None = None


def _names(path: Path) -> set[str]:
    """List the names of the files in a folder, or the name of the file itself."""
    return {file.name for file in path.iterdir()} if path.is_dir() else {path.name}


# --- ActivityNet-1.3, HACS Segments, FineAction, and most conversions of THUMOS-14 ----------------


def read_activitynet(path: Path) -> RawCollection:
    """Read a JSON file `{"database": {id: {"subset", "duration", "annotations": [...]}}}`.

    Times are in seconds. Other keys ("taxonomy", "version", "url", "label_id", ...) are not read;
    repeated keys of an object are problems. Subsets are "training", "validation" and "testing", the
    last without annotations; conversions of THUMOS-14 also use "train" and "test".
    """
    document, repeated = read_json(path)
    of_videos, problems = _sorted_out(repeated)
    database = document.get("database") if isinstance(document, dict) else None
    if not isinstance(database, dict):
        shape = 'the top level must be an object that holds the object "database" (id -> video)'
        raise AnnotationError(str(path), [*problems, shape])
    if not database:
        raise AnnotationError(str(path), [*problems, '"database" is empty'])
    return RawCollection(videos=database, problems=tuple(problems), repeated=of_videos)


def _sorted_out(
    repeated: Iterable[RepeatedKey],
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Split messages about repeated keys into those by video id and those of the rest."""
    of_videos: dict[str, tuple[str, ...]] = {}
    others: list[str] = []
    for key in repeated:
        match key.place:
            case ("database",):
                video_id, phrase = key.key, "is there more than once"
            case ("database", str(video_id), *inside):
                phrase = str(replace(key, place=tuple(inside)))
            case _:
                others.append(str(key))
                continue
        of_videos[video_id] = (*of_videos.get(video_id, ()), phrase)
    return of_videos, others


# --- THUMOS-14 and MultiTHUMOS: one text file per class -------------------------------------------


_SUBSETS = ("validation", "test")


def read_class_files(path: Path) -> RawCollection:
    """Read the text files of a folder and its subfolders, one for each class.

    Each line is `video_name start end`, in seconds, and the file's name is the label:
    `Diving_val.txt` and `Diving_test.txt` of THUMOS-14 (Jiang et al., 2014), `Diving.txt` of
    MultiTHUMOS (Yeung et al., IJCV 2018). The subset is in the name of the video:
    video_validation_0000051, video_test_0000004. There are no durations: pass those of the videos.
    """
    files = [
        p for p in sorted(path.rglob("*.txt")) if p.name not in {"readme.txt", "class_list.txt"}
    ]
    if not files:
        raise AnnotationError(str(path), ["there is no text file of a class in this folder"])
    videos: dict[str, Any] = {}
    problems: list[str] = []
    for file in files:
        label = file.stem.removesuffix("_val").removesuffix("_test")
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            words = line.split()
            if not words:
                continue
            subset = next((s for s in _SUBSETS if words[0].startswith(f"video_{s}_")), None)
            place = f"{file.name}:{number}"
            if len(words) != 3 or subset is None:
                problems.append(f"{place}: must be a THUMOS video, a start and an end: {line:.60}")
                continue
            entry = videos.setdefault(words[0], {"subset": subset, "annotations": []})
            entry["annotations"].append({"id": place, "segment": words[1:], "label": label})
    return RawCollection(videos=videos, problems=tuple(problems))


# --- Ego4D Moment Queries ------------------------------------------------------------------------

_EGO4D_FILES = ("moments_train.json", "moments_val.json", "moments_test_unannotated.json")


def read_ego4d(path: Path) -> RawCollection:
    """Read one file `moments_*.json`, or all those in a folder.

    `{"videos": [{"video_uid", "split", "clips": [{"clip_uid", "clip_start_sec", "clip_end_sec",
    "annotations": [{"annotator_uid", "labels": [{"start_time", "end_time", "label",
    "primary"}]}]}]}]}` (Grauman et al., CVPR 2022; annotation schemas of the data set). Clips of up
    to eight minutes are annotated, so a clip is a video here: its id is `clip_uid`, the name of the
    data set's own clip files, and `start_time` and `end_time` count from the clip's start. Several
    annotators saw each clip and all their labels count, so one moment may occur twice with slightly
    different times. Labels that are not `primary` are not part of the benchmark, and clips without
    a primary label are left out, both as in the benchmark's own code.
    """
    paths = (
        [path / name for name in _EGO4D_FILES if (path / name).exists()]
        if path.is_dir()
        else [path]
    )
    if not paths:
        raise AnnotationError(str(path), [f"none of {', '.join(_EGO4D_FILES)} is in this folder"])
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
                videos[uid] = _clip_entry(split, clip)
                if "annotations" in clip and not videos[uid]["annotations"]:
                    excluded[uid] = "none of its labels is primary"
    return RawCollection(videos=videos, problems=tuple(problems), excluded=excluded)


def _clips(document: Any, path: Path, problems: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield every clip of a file: its place, its video's split, and its raw object."""
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


def _clip_entry(split: Any, clip: dict[str, Any]) -> dict[str, Any]:
    """Convert one clip to ActivityNet's shape."""
    start, end = clip.get("clip_start_sec"), clip.get("clip_end_sec")
    annotators = clip.get("annotations")
    return {
        "subset": split,
        "duration": _difference(end, start),
        "annotations": [*_actions(annotators)]
        if isinstance(annotators, list | None)
        else annotators,
    }


def _actions(annotators: Sequence[Any] | None) -> Iterator[Any]:
    """Yield the primary labels of a clip, and invalid values, which are refused later."""
    for annotator in annotators or ():
        labels = annotator.get("labels") if isinstance(annotator, dict) else annotator
        for label in labels if isinstance(labels, list) else (labels,):
            if not isinstance(label, dict):
                yield from (label,) if label is not None else ()
            elif label.get("primary"):
                times = [label.get("start_time"), label.get("end_time")]
                yield {"segment": times, "label": label.get("label")}


def _difference(end: Any, start: Any) -> Any:
    """Return `end - start` of two numbers, otherwise an invalid value, which is refused later."""
    if type(end) not in (int, float):  # True is an int as well
        return end
    try:
        return float(end) - float(start) if type(start) in (int, float) else (start, end)
    except OverflowError:
        return start, end


# --- EPIC-Kitchens-100 ---------------------------------------------------------------------------

_EPIC_FILES = {
    "train": "EPIC_100_train.csv",
    "validation": "EPIC_100_validation.csv",
    "test": "EPIC_100_test_timestamps.csv",
}
_Part = Literal["verb", "noun", "action"]

_TIMESTAMP = re.compile(r"([0-9]+):([0-5][0-9]):([0-5][0-9](?:\.[0-9]+)?)")
_TIMES = ("narration_id", "video_id", "start_timestamp", "stop_timestamp")


def read_epic_kitchens(path: Path, kind: _Part) -> RawCollection:
    """Read the CSV files of the annotation repository (Damen et al., IJCV 2022).

    - EPIC_100_train.csv and EPIC_100_validation.csv: one action per row, with narration_id,
      video_id, start_timestamp and stop_timestamp (HH:MM:SS.ss), verb_class and noun_class. The
      noun is the first of the narrated sentence; other nouns (all_noun_classes) are not read.
    - EPIC_100_test_timestamps.csv: the same without classes. The times are given for the
      recognition of trimmed actions; in localization they would be the answer, so only the video
      ids are used.
    - EPIC_100_video_info.csv: video_id, duration in seconds, fps, resolution, of all 700 videos.
    - EPIC_100_verb_classes.csv, EPIC_100_noun_classes.csv: id and key of 97 verbs, 300 nouns.

    Args:
        path: folder, or one of the files in it. A subset whose file is missing is left out.
        kind: class of an action: its verb, its noun, or both, as in "take plate".
    """
    folder = path if path.is_dir() else path.parent
    there = {
        subset: folder / name for subset, name in _EPIC_FILES.items() if (folder / name).exists()
    }
    if not there:
        raise AnnotationError(str(path), [f"none of {', '.join(_EPIC_FILES.values())} is there"])
    info = _table(folder / "EPIC_100_video_info.csv", ("video_id", "duration"))
    durations = {row["video_id"]: row["duration"] for row in info}
    names = {
        part: {
            row["id"]: row["key"]
            for row in _table(folder / f"EPIC_100_{part}_classes.csv", ("id", "key"))
        }
        for part in (("verb", "noun") if kind == "action" else (kind,))
    }
    videos: dict[str, Any] = {}
    problems: list[str] = []
    for subset, file in there.items():
        columns = _TIMES if subset == "test" else (*_TIMES, *(f"{part}_class" for part in names))
        for row in _table(file, columns):
            video_id = row["video_id"]
            entry = videos.setdefault(
                video_id,
                {"subset": subset, "duration": durations.get(video_id), "annotations": []},
            )
            if entry["subset"] != subset:
                problems.append(f"video {video_id!r}: is in {entry['subset']} and in {subset}")
            if subset != "test":
                entry["annotations"].append(_annotation(row, names))
    return RawCollection(
        videos=videos,
        problems=tuple(dict.fromkeys(problems)),
        classes=None if kind == "action" else tuple(names[kind].values()),
    )


def _annotation(row: Mapping[str, str], names: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Convert one row to ActivityNet's shape; invalid values stay, and are refused later."""
    numbers = [row[f"{part}_class"] for part in names]
    keys = [names[part].get(number) for part, number in zip(names, numbers, strict=True)]
    return {
        "id": row["narration_id"],
        "segment": [_seconds(row["start_timestamp"]), _seconds(row["stop_timestamp"])],
        "label": " ".join(
            key or f"(class {number})" for key, number in zip(keys, numbers, strict=True)
        ),
    }


def _seconds(timestamp: str) -> float | str:
    """Convert `01:02:03.45` to 3723.45; return any other text unchanged."""
    match = _TIMESTAMP.fullmatch(timestamp)
    if match is None:
        return timestamp
    hours, minutes, seconds = match.groups()
    return round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 6)


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a CSV file that must have these columns; missing cells become ""."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise AnnotationError(str(path), [f"the column {name!r} is missing" for name in missing])
    return list(reader)


# --- the forms ------------------------------------------------------------------------------------


def _is_ego4d(path: Path) -> bool:
    if path.suffix != ".json" or path.name in _EGO4D_FILES:
        return not _names(path).isdisjoint(_EGO4D_FILES)
    document, _ = read_json(path)
    return isinstance(document, dict) and isinstance(document.get("videos"), list)


def _is_epic_kitchens(path: Path) -> bool:
    return not _names(path).isdisjoint(_EPIC_FILES.values())


def _is_class_files(path: Path) -> bool:
    return path.is_dir() and any(path.rglob("*.txt"))


ACTIVITYNET_JSON = FileForm(name="activitynet", read=read_activitynet)
CLASS_FILES = FileForm(name="class-files", read=read_class_files, suits=_is_class_files)
EGO4D_MOMENTS = FileForm(name="ego4d-mq", read=read_ego4d, suits=_is_ego4d)
EPIC_CSV = tuple(
    FileForm(
        name=f"epic-{part}", read=partial(read_epic_kitchens, kind=part), suits=_is_epic_kitchens
    )
    for part in get_args(_Part)
)
