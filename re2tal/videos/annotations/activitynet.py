"""ActivityNet's form: ActivityNet-1.3, HACS Segments, FineAction, and THUMOS as most convert it.

`{"database": {id: {"subset", "duration", "annotations": [{"segment": [s, e], "label"}]}}}`, times
in seconds. Other keys ("taxonomy", "version", "url", "label_id", ...) may be there and are not
read. Subsets are called "training", "validation" and "testing", the last without annotations;
conversions of THUMOS also say "train" and "test".
"""

from pathlib import Path

from re2tal.videos.annotations.collection import AnnotationError
from re2tal.videos.annotations.raw import JsonObject, RawCollection, read_json


def read_activitynet(path: Path) -> RawCollection:
    """Reads one JSON file; keys of "database" that are given twice are problems.

    Raises:
        AnnotationError: The file cannot be read, is no JSON text or is of another shape.
    """
    document = read_json(path)
    database = document.get("database") if isinstance(document, JsonObject) else None
    if not isinstance(database, JsonObject):
        shape = 'the top level must be an object that holds the object "database" (id -> video)'
        raise AnnotationError(str(path), [shape])
    if not database:
        raise AnnotationError(str(path), ['"database" is empty'])
    repeated = tuple(f"video {key!r}: is there more than once" for key in database.repeated)
    return RawCollection(videos=database, problems=repeated)
