"""Detections as subtitles, which any video player shows over the video: WebVTT and SubRip (SRT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Row = Mapping[str, Any]
"""`{"segment": [start, end], "score": score, "label": class name}`, as `files.rows` makes them."""


def webvtt(rows: Sequence[Row]) -> str:
    """A WebVTT file with a cue for each detection.

    Cues may overlap: players show one above the other.

    Args:
        rows: detections of a video, in seconds.
    """
    cues = []
    for row in sorted(rows, key=lambda row: tuple(row["segment"])):
        start, end = _milliseconds(row)
        cues.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_escaped(_text(row))}\n")
    return "\n".join(["WEBVTT\n", *cues])


def srt(rows: Sequence[Row]) -> str:
    """A SubRip file in which no two subtitles overlap, because many players show one at a time.

    The video is cut wherever a detection starts or ends, and each stretch names all that is on,
    best first.

    Args:
        rows: detections of a video, in seconds.
    """
    stretches = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n" + "\n".join(texts) + "\n"
        for number, (start, end, texts) in enumerate(_stretches(rows), start=1)
    ]
    return "\n".join(stretches)


def _stretches(rows: Sequence[Row]) -> list[tuple[int, int, list[str]]]:
    """Starts and ends in milliseconds, with the texts of all that is on."""
    best_first = sorted(rows, key=lambda row: -row["score"])
    timed = [(*_milliseconds(row), _plain(_text(row))) for row in best_first]
    cuts = sorted({time for start, end, _ in timed for time in (start, end)})
    found = []
    for first, last in pairwise(cuts):
        texts = [text for start, end, text in timed if start <= first and last <= end]
        if texts:
            found.append((first, last, texts))
    return found


def _milliseconds(row: Row) -> tuple[int, int]:
    """Start and end; a player would refuse one that ends as it starts."""
    start, end = (round(1000 * seconds) for seconds in row["segment"])
    return start, max(end, start + 1)


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{rest:03d}"


def _text(row: Row) -> str:
    """One line: an empty one would end the cue."""
    return f"{' '.join(row['label'].split())} {row['score']:.2f}"


def _escaped(text: str) -> str:
    """For WebVTT, which has the entities of HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(text: str) -> str:
    """For SubRip, which has no entities: players take what stands between < and > for a tag."""
    return text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}").replace(
        ">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
    )
