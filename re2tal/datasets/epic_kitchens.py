"""EPIC-Kitchens-100 as its annotation repository has it: a folder of CSV files.

- EPIC_100_train.csv and EPIC_100_validation.csv: one action a row, with narration_id, video_id,
  start_timestamp and stop_timestamp (HH:MM:SS.ss), verb_class and noun_class. Its noun is the
  first of the sentence that was narrated; the others (all_noun_classes) are not read.
- EPIC_100_test_timestamps.csv: the same without classes. These times are given so that trimmed
  actions can be recognised; for localisation they are an answer, so only the video ids are read.
- EPIC_100_video_info.csv: video_id, duration in seconds, fps, resolution, of all 700 videos.
- EPIC_100_verb_classes.csv, EPIC_100_noun_classes.csv: id and key (name) of 97 verbs, 300 nouns.

(Damen et al., IJCV 2022.) The subsets are called "train", "validation" and "test".
"""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from re2tal.annotations import AnnotationError, RawCollection, read_text

FILES = {
    "train": "EPIC_100_train.csv",
    "validation": "EPIC_100_validation.csv",
    "test": "EPIC_100_test_timestamps.csv",
}
Kind = Literal["verb", "noun", "action"]

_TIMESTAMP = re.compile(r"([0-9]+):([0-5][0-9]):([0-5][0-9](?:\.[0-9]+)?)")
_TIMES = ("narration_id", "video_id", "start_timestamp", "stop_timestamp")


def read_epic_kitchens(path: Path, kind: Kind) -> RawCollection:
    """Reads the files of one folder.

    Args:
        path: The folder, or one of the files in it. A subset whose file is not there is left out.
        kind: What is a class: the verb, the noun, or the two together, as "take plate".

    Raises:
        AnnotationError: A file that is needed is not there, cannot be read, or lacks a column.
    """
    folder = path if path.is_dir() else path.parent
    there = {subset: folder / name for subset, name in FILES.items() if (folder / name).exists()}
    if not there:
        raise AnnotationError(str(path), [f"none of {', '.join(FILES.values())} is there"])
    info = _table(folder / "EPIC_100_video_info.csv", ("video_id", "duration"))
    durations = {row["video_id"]: row["duration"] for row in info}
    names = {
        part: {row["id"]: row["key"] for row in _table(_classes_file(folder, part), ("id", "key"))}
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
    """One row in ActivityNet's shape; what cannot be understood stays as it is, to be refused."""
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
    """`01:02:03.45` as 3723.45; what is no timestamp, as it is."""
    match = _TIMESTAMP.fullmatch(timestamp)
    if match is None:
        return timestamp
    hours, minutes, seconds = match.groups()
    return round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 6)


def _classes_file(folder: Path, part: str) -> Path:
    return folder / f"EPIC_100_{part}_classes.csv"


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file that has at least these columns, none of them cut short."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise AnnotationError(str(path), [f"the column {name!r} is missing" for name in missing])
    return list(reader)
