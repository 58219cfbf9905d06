"""Subtitles that players take, whatever the labels hold."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from re2tal.detection.files import srt, webvtt

CLOCK = r"(\d{2,}):([0-5]\d):([0-5]\d)[.,](\d{3})"


def cues(text: str) -> list[tuple[float, float, list[str]]]:
    """Blocks with a line of times, by the two formats' common rules."""
    found = []
    for block in re.split(r"\n\n+", text.strip()):
        lines = block.splitlines()
        at = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if at is None:
            assert block in ("", "WEBVTT")
            continue
        match = re.fullmatch(f"{CLOCK} --> {CLOCK}", lines[at])
        assert match is not None, lines[at]
        numbers = [int(part) for part in match.groups()]
        start, end = (
            3600 * h + 60 * m + s + ms / 1000 for h, m, s, ms in (numbers[:4], numbers[4:])
        )
        found.append((start, end, lines[at + 1 :]))
    return found


def row(start: float, end: float, label: str, score: float) -> dict[str, object]:
    return {"segment": [start, end], "label": label, "score": score}


def test_webvtt_has_a_cue_for_each_detection_by_start() -> None:
    text = webvtt([row(3725.0, 3726.5, "b", 0.9), row(0.5, 4000.25, "a", 0.123)])
    assert text.startswith("WEBVTT\n\n")
    assert cues(text) == [(0.5, 4000.25, ["a 0.12"]), (3725.0, 3726.5, ["b 0.90"])]
    assert "01:02:05.000 --> 01:02:06.500" in text


def test_srt_is_numbered_and_never_shows_two_at_once() -> None:
    text = srt([row(1.0, 4.0, "a", 0.5), row(2.0, 3.0, "b", 0.9), row(6.0, 7.0, "c", 0.4)])
    assert cues(text) == [
        (1.0, 2.0, ["a 0.50"]),
        (2.0, 3.0, ["b 0.90", "a 0.50"]),
        (3.0, 4.0, ["a 0.50"]),
        (6.0, 7.0, ["c 0.40"]),
    ]
    assert re.findall(r"^\d+$", text, flags=re.MULTILINE) == ["1", "2", "3", "4"]
    assert "00:00:01,000 --> 00:00:02,000" in text


@pytest.mark.parametrize("write", [webvtt, srt])
def test_a_label_cannot_break_out_of_its_line(write: Callable[[Any], str]) -> None:
    label = "a\n\n00:00:00.000 --> 00:00:09.000\n<b>&amp; \u2028x"
    ((start, end, lines),) = cues(write([row(1.0, 2.0, label, 0.5)]))
    assert (start, end, len(lines)) == (1.0, 2.0, 1)
    assert not set(lines[0]) & set("<>")
    if write is webvtt:
        assert "--&gt; 00:00:09.000 &lt;b&gt;&amp;amp; x 0.50" in lines[0]


@pytest.mark.parametrize("write", [webvtt, srt])
def test_an_instant_is_shown_and_nothing_is_no_cue(write: Callable[[Any], str]) -> None:
    assert cues(write([row(2.0, 2.0001, "a", 1.0)])) == [(2.0, 2.001, ["a 1.00"])]
    assert cues(write([])) == []
