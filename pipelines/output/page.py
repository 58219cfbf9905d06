"""One HTML page that plays videos with their detections beside them, from a file, without a server.

Style and script are inside it, and its content security policy keeps it from loading anything but
the videos.
"""

import base64
import json
import mimetypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.output.records import Record
from pipelines.storage import file_size, read_bytes

_HERE = Path(__file__).parent


def page(
    records: Mapping[str, Record],
    failures: Mapping[str, str],
    *,
    classes: Sequence[str],
    threshold: float,
    sources: Mapping[str, str],
) -> str:
    """The page of some videos.

    Args:
        records: by video; all of their detections are shown.
        failures: video id to why it could not be read.
        classes: class names.
        threshold: lowest score of the detections.
        sources: video id to what a browser plays (`video_source`), empty if it cannot.
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
    data = {"classes": list(classes), "threshold": threshold, "videos": videos}
    text = (_HERE / "page.html").read_text(encoding="utf-8")
    for name, content in (
        ("style", (_HERE / "page.css").read_text(encoding="utf-8")),
        ("script", (_HERE / "page.js").read_text(encoding="utf-8")),
        ("data", _json(data)),  # last: names in it may look like anything
    ):
        text = text.replace("{{" + name + "}}", content)
    return text


def _json(data: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends that, or begins a comment."""
    text = json.dumps(data, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def video_source(uri: str, folder: Path, *, embed: float) -> str:
    """What a browser can play a video from.

    Args:
        uri: path or URI of its file.
        folder: where the page is going to lie.
        embed: megabytes up to which a video is put into the page.

    Returns:
        A URL: the video itself, or its place relative to the page; empty for other URIs, which
        browsers do not know.
    """
    if embed and file_size(uri) <= embed * 1e6:
        kind = mimetypes.guess_type(uri)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(read_bytes(uri)).decode()}"
    if "://" in uri:
        return ""
    return quote(Path(os.path.relpath(uri, folder)).as_posix())
