"""ActivityNet's form: ActivityNet-1.3, HACS Segments, FineAction, and THUMOS as most convert it.

`{"database": {id: {"subset", "duration", "annotations": [{"segment": [s, e], "label"}]}}}`, times
in seconds. Other keys ("taxonomy", "version", "url", "label_id", ...) may be there and are not
read. Subsets are called "training", "validation" and "testing", the last without annotations;
conversions of THUMOS also say "train" and "test".
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from re2tal.annotations import AnnotationError, RawCollection, read_json
from re2tal.json_files import RepeatedKey


def read_activitynet(path: Path) -> RawCollection:
    """Reads one JSON file; keys that an object in it has more than once are problems.

    Raises:
        AnnotationError: The file cannot be read, is no JSON text or is of another shape.
    """
    document, repeated = read_json(path)
    of_videos, problems = _sorted_out(repeated)
    database = document.get("database") if isinstance(document, dict) else None
    if not isinstance(database, dict):
        shape = 'the top level must be an object that holds the object "database" (id -> video)'
        raise AnnotationError(str(path), [*problems, shape])
    if not database:
        raise AnnotationError(str(path), [*problems, '"database" is empty'])
    return RawCollection(videos=database, problems=tuple(problems), repeated=of_videos)


def _sorted_out(
    repeated: Iterable[RepeatedKey],
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What concerns one video, by its id, and what concerns the rest of the file."""
    of_videos: dict[str, tuple[str, ...]] = {}
    others: list[str] = []
    for key in repeated:
        match key.place:
            case ("database",):
                video_id, phrase = key.key, "is there more than once"
            case ("database", str(video_id), *inside):
                phrase = str(replace(key, place=tuple(inside)))
            case _:
                others.append(str(key))
                continue
        of_videos[video_id] = (*of_videos.get(video_id, ()), phrase)
    return of_videos, others
