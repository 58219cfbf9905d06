"""Small files in exactly the layouts in which the seven data sets are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def action(start: Any, end: Any, label: str, **more: Any) -> dict[str, Any]:
    return {"label": label, "segment": [start, end], **more}


def written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def activitynet(folder: Path) -> Path:
    """activity_net.v1-3.min.json: version, taxonomy, database; tests without annotations."""
    sports = {"nodeId": 1, "nodeName": "Sports", "parentId": 0, "parentName": "Root"}
    entry = {"resolution": "320x240", "url": "https://www.youtube.com/watch?v=sJn_-FMuAjk"}
    database = {
        "sJn_-FMuAjk": {
            **entry,
            "subset": "training",
            "duration": 30.0,
            "annotations": [action(1.5, 20.004, "Long jump"), action(0, 0, "Long jump")],
        },
        "-uJnucdW6DY": {
            **entry,
            "subset": "validation",
            "duration": 12.34,
            "annotations": [action(0.01, 12.344, "Washing hands")],
        },
        "--1DO2V4K74": {**entry, "subset": "testing", "duration": 211.53, "annotations": []},
    }
    document = {"version": "VERSION 1.3", "taxonomy": [sports, sports], "database": database}
    return written(folder / "activity_net.v1-3.min.json", document)


def thumos(folder: Path) -> Path:
    """thumos14.json as ActionFormer shares it: with frames and class numbers beside the seconds."""

    def timed(start: float, end: float, label: str, number: int) -> dict[str, Any]:
        frames = [30 * start, 30 * end]
        return action(start, end, label, **{"segment(frames)": frames, "label_id": number})

    def video(subset: str, duration: float, *actions: dict[str, Any]) -> dict[str, Any]:
        return {"subset": subset, "duration": duration, "fps": 30.0, "annotations": [*actions]}

    dives = (timed(67.5, 75.9, "CliffDiving", 4), timed(67.5, 75.9, "Diving", 7))
    database = {
        "video_validation_0000051": video("Validation", 169.79, *dives),
        "video_test_0000270": video("Test", 176.13, timed(187.3, 193.4, "HammerThrow", 10)),
        "video_test_0000814": video(
            "Test",
            181.24,
            timed(10.0, 14.1, "ThrowDiscus", 18),
            timed(233.6, 240.1, "ThrowDiscus", 18),
        ),
        "video_test_0001496": video("Test", 150.97, timed(19.7, 21.1, "CricketShot", 6)),
    }
    return written(folder / "thumos14.json", {"version": "Thumos14-30fps", "database": database})


def multithumos(folder: Path) -> Path:
    """The folder `multithumos`: README, class_list.txt and annotations/, without durations."""
    (folder / "annotations").mkdir()
    files = {
        "README": "MultiTHUMOS extends the THUMOS '14 action detection dataset.\n",
        "class_list.txt": "7 CricketShot\n25 CloseUpTalkToCamera\n45 Stand\n",
        "annotations/CricketShot.txt": "video_test_0001496 19.70 21.10\n",
        "annotations/CloseUpTalkToCamera.txt": "video_test_0001292 0.03 6.90\n",
        "annotations/Stand.txt": "video_validation_0000160 54.00 54.00\n"
        " video_validation_0000160 12.00 14.50\nvideo_test_0001292 398.44 4000.36 \n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


MULTITHUMOS_DURATIONS = {
    "video_test_0001292": 232.59,
    "video_test_0001496": 151.06,
    "video_validation_0000160": 167.4,
}


def hacs(folder: Path) -> Path:
    """HACS_segments_v1.1.1.json: nothing but the database, whose durations are strings."""

    def video(subset: str, duration: str, *actions: dict[str, Any]) -> dict[str, Any]:
        url = "https://www.youtube.com/watch?v=--0edUL8zmA"
        return {"annotations": [*actions], "subset": subset, "duration": duration, "url": url}

    database = {
        "--0edUL8zmA": video(
            "training",
            "92.166667",
            action(5.4, 11.6, "Dodgeball"),
            action(12.6, 88.16, "Dodgeball"),
            action(90.5, 90.1, "Dodgeball"),
            action(91.0, 91.0, "Dodgeball"),
        ),
        "WWowbBQB1lU": video("validation", "60.0", action(40.0, 62.5, "Ironing clothes")),
        "NKB_CEA5jNQ": video("testing", "120.5"),
    }
    return written(folder / "HACS_segments_v1.1.1.json", {"database": database})


def fineaction(folder: Path) -> Path:
    """annotations_gt.json: ActivityNet's form with ids that begin with `v_`."""

    def video(number: str, subset: str, duration: float, *actions: Any) -> dict[str, Any]:
        names = {"filename": f"v_{number}.mp4", "subset": subset, "duration": duration}
        return {**names, "annotations": [*actions]}

    database = {
        "v_00000102": video(
            "00000102",
            "training",
            50.2,
            action(1.0, 1.4, "throw darts", label_id=32),
            action(1.2, 1.2, "throw darts", label_id=32),
        ),
        "v_00004276": video("00004276", "validation", 9.5, action(7.0, 11.0, "wash hands")),
    }
    testing = video("00009001", "testing", 31.0)
    del testing["annotations"]
    document = {"version": "1.0", "taxonomy": [], "database": {**database, "v_00009001": testing}}
    return written(folder / "annotations_gt.json", document)


COLUMNS = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def row(video_id: str, number: int, start: str, stop: str, verb: int | str, noun: int | str) -> str:
    """A row as the data set writes it, with a comma inside quotes and a list inside a cell."""
    own = f"{video_id}_{number},{video_id[:3]},{video_id},00:00:00.560,{start},{stop},1,113"
    return f"""{own},"take plate, slowly",take,{verb},plate,{noun},"['plate', 'pan']","[2, 5]\""""


def epic(folder: Path, **changes: str) -> Path:
    files = {
        "EPIC_100_train.csv": "\n".join(
            (
                COLUMNS,
                row("P01_01", 0, "00:00:00.14", "00:00:03.37", 3, 1),
                row("P01_01", 1, "01:02:03.05", "01:02:04.30", 0, 2),
                row("P01_01", 10, "00:00:00.14", "00:00:03.37", 0, 1),
            )
        ),
        "EPIC_100_validation.csv": "\n".join(
            (COLUMNS, row("P02_11", 0, "00:00:00.00", "00:00:01.89", 0, 2), "")
        ),
        "EPIC_100_test_timestamps.csv": "narration_id,participant_id,video_id,narration_timestamp,"
        "start_timestamp,stop_timestamp,start_frame,stop_frame\n"
        "P03_1_0,P03,P03_1,00:00:02.851,00:00:02.86,00:00:03.87,143,193\n",
        "EPIC_100_video_info.csv": "video_id,duration,fps,resolution\n"
        "P01_01,3725.15,59.94,1920x1080\n"
        "P02_11,1.88,50.0,1920x1080\nP03_1,9.5,50.0,1920x1080\n",
        "EPIC_100_verb_classes.csv": "id,key,instances,category\n"
        "0,take,\"['take', 'get']\",retrieve\n3,open,\"['open']\",access\n",
        "EPIC_100_noun_classes.csv": "id,key,instances,category\n"
        "1,spoon,\"['spoon']\",cutlery\n2,plate,\"['plate']\",crockery\n9,egg,\"['egg']\",food\n",
    }
    for name, content in {**files, **changes}.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def clip(uid: str, *annotators: list[dict[str, Any]], length: float = 479.0) -> dict[str, Any]:
    """A clip from the middle of its video, as Ego4D writes it."""
    labels = [
        [
            label
            | {
                "video_start_time": label["start_time"] + 1182.8,
                "video_end_time": label["end_time"] + 1182.8,
            }
            for label in given
        ]
        for given in annotators
    ]
    return {
        "clip_uid": uid,
        "video_start_sec": 1182.8,
        "video_end_sec": 1182.8 + length,
        "clip_start_sec": 0,
        "clip_end_sec": length,
        "source_clip_uid": "d2c6f0e5",
        "annotations": [
            {"annotator_uid": str(n), "labels": given} for n, given in enumerate(labels)
        ],
    }


def moment(
    start: float, end: float, label: str = "use_phone", primary: bool = True
) -> dict[str, Any]:
    return {"start_time": start, "end_time": end, "label": label, "primary": primary}


def ego4d(folder: Path, name: str, split: str, *clips: dict[str, Any]) -> Path:
    document = {"version": "v2", "videos": [{"video_uid": "u", "split": split, "clips": [*clips]}]}
    path = folder / name
    path.write_text(json.dumps(document))
    return path
