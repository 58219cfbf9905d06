"""The files that detections are written to, all of them made anew from the records."""

import csv
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.output.page import page, video_source
from pipelines.output.picture import timeline
from pipelines.output.records import Record
from re2tal.atomic import replacing
from re2tal.detection.files import write_rows
from re2tal.detection.subtitles import srt, webvtt

Format = Literal["json", "csv", "vtt", "srt", "png", "html"]
FORMATS: tuple[Format, ...] = ("json", "csv", "vtt", "srt", "png", "html")

COLUMNS = ("video", "start", "end", "label", "score")
"""Of the CSV file; the times are seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """What is written of the detections.

    Attributes:
        score_threshold: weaker detections are left out.
        top_k: so many detections of a video at most, the best.
        formats: what to write.
        embed: megabytes up to which a video is put into the page, instead of its path.
    """

    score_threshold: float = 0.1
    top_k: int = 200
    formats: tuple[Format, ...] = FORMATS
    embed: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}.")


def strongest(record: Record, config: OutputConfig) -> Record:
    """The record with those detections only that are to be written.

    Args:
        record: of a video, its detections by falling score.
        config: which these are.
    """
    strong = [row for row in record.detections if row["score"] >= config.score_threshold]
    return replace(record, detections=strong[: config.top_k])


def write_files(
    output: Path,
    records: Mapping[str, Record],
    failures: Mapping[str, str],
    classes: Sequence[str],
    config: OutputConfig,
) -> list[Path]:
    """Writes the detections in all formats that are asked for, and which videos failed.

    Args:
        output: folder for them; it exists.
        records: by video, with all of their detections.
        failures: video id to why it could not be read.
        classes: class names.
        config: what to write.

    Returns:
        The files, those of all videos together first.
    """
    shown = {video_id: strongest(record, config) for video_id, record in sorted(records.items())}
    tables: dict[Format, tuple[str, Callable[[Path], None]]] = {
        "json": ("detections.json", lambda path: write_rows(path, _rows(shown))),
        "csv": ("detections.csv", lambda path: _write_csv(path, _rows(shown))),
        "html": ("index.html", lambda path: _write_page(path, shown, failures, classes, config)),
    }
    pictures: dict[Format, tuple[str, Callable[[Path, Record], None]]] = {
        "vtt": ("subtitles", lambda path, record: _write(path, webvtt(record.detections))),
        "srt": ("subtitles", lambda path, record: _write(path, srt(record.detections))),
        "png": ("timelines", lambda path, record: _draw(path, record, classes)),
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
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for video_id, rows in results.items():
            writer.writerows(
                (video_id, *row["segment"], row["label"], row["score"]) for row in rows
            )


def _draw(path: Path, record: Record, classes: Sequence[str]) -> None:
    figure = timeline(record.video_id, record.detections, record.duration, classes)
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(partial, format="png", dpi=120)


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
