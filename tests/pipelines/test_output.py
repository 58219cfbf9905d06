"""Files of detections, and the records from which they are made."""

import base64
import csv
import json
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from pipelines.core import figures
from pipelines.core.figures import COLOURS, Timeline, timelines
from pipelines.core.storage import stamps_of
from pipelines.core.tables import csv_text, read_csv, write_csv
from pipelines.inference.output import (
    COLUMNS,
    FORMATS,
    OutputConfig,
    Record,
    counted,
    read_records,
    write_files,
    write_record,
)
from re2tal.annotations import Instance
from re2tal.detection.files import read_detections
from re2tal.errors import UserError
from tests.pipelines.output_files import Page

NASTY = "\u4f60</script><script>alert('1')</script> <!-- $x$ \u2028 {{data}}"
CLASSES = ("jump", NASTY, "never")


def record(video_id: str, uri: str = "/films/a.mp4") -> Record:
    return Record(
        video_id=video_id,
        uri=uri,
        model="m",
        duration=10.0,
        problems=(),
        detections=[
            {"segment": [1.0, 2.5], "score": 0.9, "label": NASTY},
            {"segment": [0.25, 9.0], "score": 0.5, "label": "jump"},
            {"segment": [3.0, 4.0], "score": 0.05, "label": "jump"},
        ],
    )


def write(folder: Path, *records: Record, **changes: object) -> list[Path]:
    config = replace(OutputConfig(), **changes)  # type: ignore[arg-type]
    failures = {"broken": "<b>no video"}
    return write_files(folder, {r.video_id: r for r in records}, failures, CLASSES, config)


def test_all_files_hold_the_same_detections(tmp_path: Path) -> None:
    written = write(tmp_path, record("b"), record("a"))
    names = ["failures.json", "detections.json", "detections.csv", "index.html"]
    for folder, kind in (("subtitles", "vtt"), ("subtitles", "srt"), ("timelines", "png")):
        names += [f"{folder}/{video}.{kind}" for video in "ab"]
    assert [str(path.relative_to(tmp_path)) for path in written] == names
    assert all(path.stat().st_size for path in written)
    assert not list(tmp_path.rglob("*.partial"))
    found = read_detections(tmp_path / "detections.json", CLASSES)
    assert list(found) == ["a", "b"]
    assert found["a"].segments.tolist() == [[1.0, 2.5], [0.25, 9.0]]
    assert found["a"].labels.tolist() == [1, 0]
    rows = read_csv(tmp_path / "detections.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [tuple(row.values()) for row in rows[:2]] == [
        ("a", "1.0", "2.5", NASTY, "0.9"),
        ("a", "0.25", "9.0", "jump", "0.5"),
    ]
    assert len(rows) == 4
    assert json.loads((tmp_path / "failures.json").read_text()) == {"broken": "<b>no video"}
    assert (tmp_path / "subtitles" / "a.vtt").read_text().count("-->") == 2
    assert (tmp_path / "subtitles" / "a.srt").read_text().count("-->") == 3
    with Image.open(tmp_path / "timelines" / "a.png") as picture:
        assert picture.width > picture.height > 100


FORMULAS = ("=1+1", "+x", "-x", "@x", "\tx", "\rx", "\nx", "-", "'=x", "''@x", '="a",b\n')
TEXTS = ("", "'", "'x", "x=1", "a,b", 'a "b"', "a\r\nb", "\u00e9", "x\t", "1", "''")


def test_texts_are_no_formulas_to_a_spreadsheet_and_come_back(tmp_path: Path) -> None:
    columns = ("=name", "value", "none")
    given = [{"=name": text, "value": -0.5} for text in (*FORMULAS, *TEXTS)]
    write_csv(tmp_path / "t.csv", columns, given)
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=name", "value", "none"]
    assert [name for name, *_ in rows] == [*(f"'{text}" for text in FORMULAS), *TEXTS]
    assert {tuple(rest) for _, *rest in rows} == {("-0.5", "")}  # numbers stay numbers
    assert [row["=name"] for row in read_csv(tmp_path / "t.csv")] == [*FORMULAS, *TEXTS]
    assert csv_text(columns, given).encode() == (tmp_path / "t.csv").read_bytes()


def test_labels_and_names_of_videos_are_no_formulas(tmp_path: Path) -> None:
    row = {"segment": [-1.0, 2.0], "score": 0.5, "label": "=cmd|' /C calc'!A0"}
    found = replace(record("-a"), detections=[row])
    write(tmp_path, found, formats=("csv",))
    written = (tmp_path / "detections.csv").read_text(encoding="utf-8").splitlines()
    assert written[1] == "'-a,-1.0,2.0,'=cmd|' /C calc'!A0,0.5"
    (read,) = read_csv(tmp_path / "detections.csv")
    assert (read["video"], read["label"]) == ("-a", row["label"])


def test_only_the_strongest_of_what_is_asked_for_are_written(tmp_path: Path) -> None:
    written = write(tmp_path, record("a"), formats=("csv",), score_threshold=0.0, top_k=1)
    assert [path.name for path in written] == ["failures.json", "detections.csv"]
    assert [row["score"] for row in read_csv(tmp_path / "detections.csv")] == ["0.9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detections.csv", "failures.json"]
    write(tmp_path, record("a"), formats=("csv",), score_threshold=0.05)
    assert len(read_csv(tmp_path / "detections.csv")) == 3
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        OutputConfig(top_k=0)


def test_detections_are_counted_and_weak_ones_not_passed_over_in_silence() -> None:
    one = record("a")
    best = max(row["score"] for row in one.detections)
    weak = OutputConfig(score_threshold=best + 0.01)
    number = len(one.detections)
    some = f"{number} detections with a score of 0 or more in 1 video of "
    (told,) = counted([one], OutputConfig(score_threshold=0.0))
    assert told.startswith(some)
    none, advice = counted([one, record("b")], weak)
    assert none.startswith("0 detections with a score of 0.")
    assert "in 2 videos of" in none
    assert f"strongest scores {best:.2g}: with --score-threshold" in advice
    assert len(counted([replace(one, detections=[])], weak)) == 1


def test_the_page_loads_nothing_and_no_name_breaks_out_of_its_data(tmp_path: Path) -> None:
    films = tmp_path / "films #1"
    films.mkdir()
    (films / "a?.mp4").write_bytes(b"content")
    output = tmp_path / "out"
    output.mkdir()
    shown = [record("a", str(films / "a?.mp4")), record(NASTY, "s3://bucket/b.mp4")]
    write(output, *shown, formats=("html",))
    page = Page(output / "index.html")
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [attributes for _, attributes in page.elements if {"src", "href"} & set(attributes)]
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert page.data["classes"] == list(CLASSES)
    assert page.data["threshold"] == 0.1
    videos = {video["id"]: video for video in page.data["videos"]}
    assert list(videos) == ["a", NASTY, "broken"]
    assert videos["a"]["source"] == "../films%20%231/a%3F.mp4"
    assert videos[NASTY]["source"] == ""  # browsers know no s3
    assert videos["a"]["found"] == [[1.0, 2.5, 0.9, 1], [0.25, 9.0, 0.5, 0]]
    assert (videos["broken"]["failed"], videos["broken"]["problems"]) == (True, ["<b>no video"])


BROWSERS = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize(
    ("address", "shown"),
    [("%E0%A4%A", "a"), ("b%", "b%"), ("b%25", "b%")],
)
def test_the_page_shows_a_video_whatever_the_address(
    tmp_path: Path, address: str, shown: str
) -> None:
    write(tmp_path, record("b%"), record("a"), formats=("html",))
    url = f"{(tmp_path / 'index.html').as_uri()}#{address}"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    options = ("--headless", "--no-sandbox", "--disable-gpu", profile, "--dump-dom", url)
    done = subprocess.run(
        [str(BROWSER), *options], capture_output=True, text=True, check=True, timeout=120
    )
    assert f'<h2 id="name">{shown}</h2>' in done.stdout
    assert "2 of 2 segments" in done.stdout


@pytest.mark.parametrize(("embed", "embedded"), [(1e-5, True), (1e-6, False)])
def test_small_videos_can_be_put_into_the_page(
    embed: float, embedded: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.webm").write_bytes(b"content")
    write(tmp_path, record("a", str(tmp_path / "a.webm")), formats=("html",), embed=embed)
    source = Page(tmp_path / "index.html").data["videos"][0]["source"]
    content = f"data:video/webm;base64,{base64.b64encode(b'content').decode()}"
    assert source == (content if embedded else "a.webm")


def test_a_video_without_detections_is_written_too(tmp_path: Path) -> None:
    write(tmp_path, replace(record("a"), detections=[]), formats=FORMATS)
    assert json.loads((tmp_path / "detections.json").read_text())["results"] == {"a": []}
    assert (tmp_path / "timelines" / "a.png").exists()


def test_the_picture_has_a_lane_for_each_class_that_occurs() -> None:
    rows = record("a").detections
    (axes,) = timelines({"$title$": Timeline(duration=10.0, found=rows)}, CLASSES).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["jump", f"{NASTY[:39]}…"]
    boxes = [bar.get_window_extent().transformed(axes.transData.inverted()) for bar in axes.patches]
    bars = {(round(b.x0, 6), round(b.x1, 6), round((b.y0 + b.y1) / 2)) for b in boxes}
    assert bars == {(1.0, 2.5, 1), (0.25, 9.0, 0), (3.0, 4.0, 0)}
    assert axes.get_xlim() == (0, 10)


def test_annotated_instances_lie_above_the_detections_of_their_lane() -> None:
    truth = [Instance(start=5.0, end=6.0, label="jump"), Instance(start=1.0, end=2.0, label=NASTY)]
    found = [row for row in record("a").detections if row["label"] == "jump"]
    videos = {
        "a": Timeline(duration=10.0, found=found, truth=truth),
        "b": Timeline(duration=4.0, found=[], truth=[], least=0.2),
    }
    first, second = timelines(videos, CLASSES).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["jump", f"{NASTY[:39]}…"]
    bars = set()
    for bar in first.patches:
        box = bar.get_path().transformed(bar.get_patch_transform()).get_extents()
        bars.add((round(box.x0, 3), round((box.y0 + box.y1) / 2, 3), bool(bar.get_hatch())))
    detected = {(row["segment"][0], 0.2, False) for row in found}
    assert bars == detected | {(5.0, -0.2, True), (1.0, 0.8, True)}  # y points down
    nothing = "b: nothing was detected with a score of 0.20 or more"
    assert [one.get_title(loc="left") for one in (first, second)] == ["a", nothing]


def test_colours_tell_twenty_classes_apart_and_patterns_the_others() -> None:
    linear = np.array([to_rgb(colour) for colour in COLOURS])
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    x, y, z = np.cbrt(linear @ np.transpose(to_xyz) / [0.9505, 1, 1.0888]).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)[np.triu_indices(20, 1)]
    assert apart.min() > 35  # CIELAB; 2 is what an eye can just tell apart

    classes = [f"class {number}" for number in range(200)]
    found = [{"segment": [0, 1], "score": 1.0, "label": name} for name in classes]
    (axes,) = timelines({"a": Timeline(duration=2.0, found=found)}, classes).axes
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in axes.patches}
    assert len(looks) == 200


def test_characters_without_a_font_are_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures._warn_of_fonts.cache_clear()
    written = record("\ue000")  # for private use: no font has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, written, replace(written, video_id="b"), formats=("png",))
    assert capsys.readouterr().out.count("the fonts of this machine lack characters") == 1


def test_records_come_back_and_those_of_another_file_do_not(tmp_path: Path) -> None:
    videos = {"a": "/films/a.mp4", "b": "/films/b.mp4", "c": "/films/c.mp4"}
    assert read_records(tmp_path, videos, model="m") == {}
    for video_id in ("a", "b"):
        write_record(tmp_path, record(video_id))  # both of /films/a.mp4
    assert read_records(tmp_path, videos, model="m") == {"a": record("a")}


def test_a_video_that_was_replaced_is_not_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = {name: str(tmp_path / f"{name}.mp4") for name in ("a", "b", "c")}
    for place in videos.values():
        Path(place).write_bytes(b"a video")
    stamps = stamps_of(videos)
    for video_id, place in videos.items():
        stamp = None if video_id == "c" else stamps[video_id]  # as an older version wrote it
        write_record(tmp_path, replace(record(video_id, place), stamp=stamp))
    assert read_records(tmp_path, videos, model="m").keys() == {"a", "b", "c"}
    Path(videos["a"]).write_bytes(b"another one")
    assert read_records(tmp_path, videos, model="m").keys() == {"b", "c"}
    assert "replaced: a: its file is not the one" in capsys.readouterr().out


def test_records_of_another_model_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    write_record(tmp_path, record("a"))
    with pytest.raises(UserError, match="another model"):
        read_records(tmp_path, {"a": "/films/a.mp4"}, model="n")
    (tmp_path / "videos" / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read: remove it \(the top level: invalid JSON"):
        read_records(tmp_path, {"a": "/films/a.mp4"}, model="m")
