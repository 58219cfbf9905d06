"""What is known of each video that is through: a JSON file each, from which a second run goes on.

They hold all detections that suppression leaves, so another threshold or other formats need no
detecting.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from re2tal.atomic import replacing

FOLDER = "videos"


class RecordError(Exception):
    """Records that cannot be gone on from; the message says why, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A video that is through.

    Attributes:
        video_id: the video.
        uri: where its file is.
        model: fingerprint of the detector.
        duration: in seconds.
        problems: why parts of it could not be decoded.
        detections: rows of `re2tal.detection.files.rows`, by falling score.
    """

    video_id: str
    uri: str
    model: str
    duration: float
    problems: tuple[str, ...]
    detections: list[dict[str, Any]]


_RECORD = TypeAdapter(Record)


def write_record(output: Path, record: Record) -> None:
    """Writes a record; it is there whole or not at all.

    Args:
        output: folder of the run's results; it is made.
        record: of a video.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{record.video_id}.json") as partial:
        partial.write_bytes(_RECORD.dump_json(record))


def read_records(output: Path, videos: Mapping[str, str], *, model: str) -> dict[str, Record]:
    """Reads the records of those videos that are through.

    Args:
        output: folder of the run's results.
        videos: video id to path or URI; one whose file is another than then is not through.
        model: fingerprint of the detector.

    Raises:
        RecordError: if they are of another detector, or cannot be read.
    """
    found = {}
    for video_id, uri in videos.items():
        path = output / FOLDER / f"{video_id}.json"
        if not path.exists():
            continue
        try:
            record = _RECORD.validate_json(path.read_bytes())
        except ValidationError as error:
            raise RecordError(f"{path} cannot be read: remove it ({error}).") from error
        if record.model != model:
            raise RecordError(
                f"{output} holds what another model detected. Give another --output, or remove "
                f"{output / FOLDER} to begin anew."
            )
        if record.uri == uri:
            found[video_id] = record
    return found
