"""One text file a class, as THUMOS-14 and MultiTHUMOS are handed out.

Each line is `video_name start end`, in seconds, and the file's name is the label: `Diving_val.txt`
and `Diving_test.txt` of THUMOS-14 (Jiang et al., 2014), `Diving.txt` of MultiTHUMOS (Yeung et al.,
IJCV 2018). The subset is in the name of the video: video_validation_0000051, video_test_0000004.
There are no durations: give those of the video files.
"""

from pathlib import Path
from typing import Any

from re2tal.annotations import AnnotationError, RawCollection, read_text

SUBSETS = ("validation", "test")


def read_class_files(path: Path) -> RawCollection:
    """Reads the text files of a folder and of the folders in it.

    Raises:
        AnnotationError: There is none, or one cannot be read.
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
            subset = next((s for s in SUBSETS if words[0].startswith(f"video_{s}_")), None)
            place = f"{file.name}:{number}"
            if len(words) != 3 or subset is None:
                problems.append(f"{place}: must be a THUMOS video, a start and an end: {line:.60}")
                continue
            entry = videos.setdefault(words[0], {"subset": subset, "annotations": []})
            entry["annotations"].append({"id": place, "segment": words[1:], "label": label})
    return RawCollection(videos=videos, problems=tuple(problems))
