"""Output files of detection. All are written anew from the records, one for each finished video."""

import base64
import json
import mimetypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from pipelines.core.clock import duration
from pipelines.core.figures import COLOURS, Timeline, drawn, timelines
from pipelines.core.storage import Stamp, file_size, read_bytes, replaced_files
from pipelines.core.tables import write_csv
from re2tal.atomic import replacing
from re2tal.detection.files import srt, webvtt, write_rows
from re2tal.errors import UserError, count_of
from re2tal.json_files import problem_of

FOLDER = "videos"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Record of a finished video.

    Attributes:
        uri: path or URI of the video's file.
        model: fingerprint of the detector.
        duration: length in seconds.
        problems: reasons why parts of the video could not be decoded.
        stamp: signs by which the file is recognised; None if they could not be read.
        detections: rows of `re2tal.detection.files.rows`, by falling score.
    """

    video_id: str
    uri: str
    model: str
    duration: float
    problems: tuple[str, ...]
    detections: list[dict[str, Any]]
    stamp: Stamp | None = None


_RECORD = TypeAdapter(Record)


def write_record(output: Path, record: Record) -> None:
    """Write a record into the folder of the run's results, atomically."""
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{record.video_id}.json") as partial:
        partial.write_bytes(_RECORD.dump_json(record))


def read_records(output: Path, videos: Mapping[str, str], *, model: str) -> dict[str, Record]:
    """Read the records of finished videos.

    Args:
        output: folder of the run's results.
        videos: video id to path or URI; a video whose file was moved or replaced counts as
            unfinished.
        model: fingerprint of the detector.

    Raises:
        UserError: if records belong to another detector, or cannot be read.
    """
    found = {}
    for video_id, uri in videos.items():
        path = output / FOLDER / f"{video_id}.json"
        if not path.exists():
            continue
        try:
            record = _RECORD.validate_json(path.read_bytes())
        except ValidationError as error:
            problem = problem_of(error.errors()[0])
            raise UserError(f"{path} cannot be read: remove it ({problem}).") from error
        if record.model != model:
            raise UserError(
                f"{output} holds detections of another model. Give another --output, or remove "
                f"{output / FOLDER} to start afresh."
            )
        if record.uri == uri:
            found[video_id] = record
    stamps = {v: record.stamp for v, record in found.items() if record.stamp is not None}
    for video_id in replaced_files(videos, stamps):
        print(f"  replaced: {video_id}: its file is not the one that its detections were made of")
        del found[video_id]
    return found


_HERE = Path(__file__).parent


def page(
    records: Mapping[str, Record],
    failures: Mapping[str, str],
    *,
    classes: Sequence[str],
    threshold: float,
    sources: Mapping[str, str],
) -> str:
    """Make the HTML page of videos, which shows all detections of the records.

    Records, failures (reasons) and sources (from `video_source`) are by video id; `threshold` is
    the lowest score of the detections.
    """
    index = {name: place for place, name in enumerate(classes)}
    videos = [
        {
            "id": record.video_id,
            "source": sources[record.video_id],
            "duration": record.duration,
            "problems": record.problems,
            "failed": False,
            "found": [
                [*row["segment"], row["score"], index[row["label"]]] for row in record.detections
            ],
        }
        for record in records.values()
    ]
    videos += [
        {
            "id": video_id,
            "source": "",
            "duration": 1,
            "problems": [reason],
            "failed": True,
            "found": [],
        }
        for video_id, reason in failures.items()
    ]
    data = {
        "classes": list(classes),
        "colours": COLOURS,
        "threshold": threshold,
        "videos": videos,
    }
    text = (_HERE / "page.html").read_text(encoding="utf-8")
    for name, content in (
        ("style", (_HERE / "page.css").read_text(encoding="utf-8")),
        ("script", (_HERE / "page.js").read_text(encoding="utf-8")),
        ("data", _json(data)),  # last: a name in it may look like a placeholder
    ):
        text = text.replace("{{" + name + "}}", content)
    return text


def _json(data: Any) -> str:
    """Format JSON for a script element: it can neither end the element nor begin a comment."""
    text = json.dumps(data, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def video_source(uri: str, folder: Path, *, embed: float) -> str:
    """Return a URL from which a browser can play a video.

    Args:
        uri: path or URI of the video's file.
        folder: folder of the page.
        embed: megabytes up to which a video is embedded in the page.

    Returns:
        The video itself as a data URL, or its path relative to the page; empty for remote URIs,
            which browsers cannot open.
    """
    if embed and file_size(uri) <= embed * 1e6:
        kind = mimetypes.guess_type(uri)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(read_bytes(uri)).decode()}"
    if "://" in uri:
        return ""
    return quote(Path(os.path.relpath(uri, folder)).as_posix())


Format = Literal["json", "csv", "vtt", "srt", "png", "html"]
FORMATS: tuple[Format, ...] = ("json", "csv", "vtt", "srt", "png", "html")

COLUMNS = ("video", "start", "end", "label", "score")
"""Columns of the CSV file; the times are seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Written formats, and the detections in them.

    Attributes:
        score_threshold: lowest score of a detection; weaker ones are left out.
        top_k: largest number of detections of a video; the best are kept.
        formats: formats to write.
        embed: megabytes up to which a video is embedded in the page, instead of linked by its path.
    """

    score_threshold: float = 0.1
    top_k: int = 200
    formats: tuple[Format, ...] = FORMATS
    embed: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}.")


def strongest(record: Record, config: OutputConfig) -> Record:
    """Keep only a record's strongest detections, which are sorted by falling score."""
    strong = [row for row in record.detections if row["score"] >= config.score_threshold]
    return replace(record, detections=strong[: config.top_k])


def counted(records: Sequence[Record], config: OutputConfig) -> list[str]:
    """Count the detections that are written; where all are too weak, name the strongest."""
    number = sum(len(strongest(record, config).detections) for record in records)
    length = duration(sum(record.duration for record in records))
    what = f"{count_of(number, 'detection')} with a score of {config.score_threshold:g} or more"
    lines = [f"{what} in {count_of(len(records), 'video')} of {length}"]
    best = max((row["score"] for record in records for row in record.detections), default=0.0)
    if 0 < best < config.score_threshold:
        lines.append(
            f"the strongest scores {best:.2g}: with --score-threshold {best / 4:.1g} the same "
            "command shows weaker ones, and detects nothing anew"
        )
    return lines


def write_files(
    output: Path,
    records: Mapping[str, Record],
    failures: Mapping[str, str],
    classes: Sequence[str],
    config: OutputConfig,
) -> list[Path]:
    """Write the detections in all configured formats, and the reasons of failures.

    The folder must exist. Records, with all of their detections, and failures are by video id.

    Returns:
        The files; those that cover all videos come first.
    """
    least = config.score_threshold
    shown = {video_id: strongest(record, config) for video_id, record in sorted(records.items())}
    tables: dict[Format, tuple[str, Callable[[Path], None]]] = {
        "json": ("detections.json", lambda path: write_rows(path, _rows(shown))),
        "csv": ("detections.csv", lambda path: _write_csv(path, _rows(shown))),
        "html": ("index.html", lambda path: _write_page(path, shown, failures, classes, config)),
    }
    pictures: dict[Format, tuple[str, Callable[[Path, Record], None]]] = {
        "vtt": ("subtitles", lambda path, record: _write(path, webvtt(record.detections))),
        "srt": ("subtitles", lambda path, record: _write(path, srt(record.detections))),
        "png": ("timelines", lambda path, record: _draw(path, record, classes, least)),
    }
    written = [output / "failures.json"]
    _write(written[0], json.dumps(dict(sorted(failures.items())), indent=2))
    for kind in config.formats:
        if kind in tables:
            name, write = tables[kind]
            write(output / name)
            written.append(output / name)
    for kind in config.formats:
        if kind in pictures:
            folder, draw = pictures[kind]
            (output / folder).mkdir(exist_ok=True)
            for video_id, record in shown.items():
                written.append(output / folder / f"{video_id}.{kind}")
                draw(written[-1], record)
    return written


def _rows(records: Mapping[str, Record]) -> dict[str, list[dict[str, Any]]]:
    return {video_id: record.detections for video_id, record in records.items()}


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _write_csv(path: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    cells = (
        (video_id, *row["segment"], row["label"], row["score"])
        for video_id, rows in results.items()
        for row in rows
    )
    write_csv(path, COLUMNS, (dict(zip(COLUMNS, row, strict=True)) for row in cells))


def _draw(path: Path, record: Record, classes: Sequence[str], least: float) -> None:
    shown = Timeline(duration=record.duration, found=record.detections, least=least)
    with replacing(path) as partial, drawn():
        timelines({record.video_id: shown}, classes).savefig(partial, format="png", dpi=120)


def _write_page(
    path: Path,
    records: Mapping[str, Record],
    failures: Mapping[str, str],
    classes: Sequence[str],
    config: OutputConfig,
) -> None:
    sources = {
        video_id: video_source(record.uri, path.parent, embed=config.embed)
        for video_id, record in records.items()
    }
    threshold = config.score_threshold
    text = page(records, failures, classes=classes, threshold=threshold, sources=sources)
    _write(path, text)
