"""Loading of a file or folder as `Annotations`: form, exclusions, problems."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from re2tal.annotations import (
    AnnotationError,
    Annotations,
    Exclusion,
    RawCollection,
    as_named,
    labels_alike,
    read_json,
    read_text,
)
from re2tal.datasets.checking import (
    LEAST_SECONDS,
    MOST_SECONDS,
    Checked,
    Number,
    Rules,
    check_video,
)
from re2tal.datasets.forms import ACTIVITYNET_JSON, FileForm
from re2tal.datasets.published import ANY_OTHER, FORMS, Dataset, Fault
from re2tal.errors import apart
from re2tal.json_files import problem_of

Durations: TypeAlias = Mapping[str, float] | Callable[[Sequence[str]], Mapping[str, float]]
_Seconds = Annotated[Number, Field(ge=LEAST_SECONDS, le=MOST_SECONDS)]
_DURATIONS = TypeAdapter(dict[str, _Seconds])


def load_annotations(
    path: str | Path,
    *,
    form: str = "auto",
    classes: Sequence[str] | None = None,
    dataset: Dataset = ANY_OTHER,
    exclude: Collection[str] = (),
    keep: Collection[str] = (),
    durations: Durations | None = None,
) -> Annotations:
    """Read the annotations of a data set and check all of them before any is used.

    Numbers may be written as strings, as in some THUMOS-14 files. A segment that ends at most
    `DURATION_TOLERANCE` seconds after the duration is clipped to it.

    Args:
        path: JSON file, or the folder of a data set that consists of several files.
        form: layout of the files, a key of `FORMS`. "auto" detects it; for EPIC-Kitchens-100 one of
            three forms must be named.
        classes: permitted labels; by default those that the data set lists or uses.
        dataset: record of the data set, whose known faults are repaired and reported. By default
            nothing is repaired: every fault is an error.
        exclude: ids of videos to leave out unchecked, such as those that are no longer available;
            see `read_ids`. An id may have the prefix `v_` of its video file.
        keep: ids of videos to use although `dataset` leaves them out, to compare with results that
            count them.
        durations: video id -> seconds, for videos without a duration in the files; or a function
            from the ids of these videos to the durations, which is called only if there are any.

    Returns:
        The annotations of all subsets.

    Raises:
        AnnotationError: a file cannot be read, or its content is wrong; all problems are listed.
    """
    source = str(path)
    raw = _form(Path(path), form).read(Path(path))
    reasons, problems = _left_out(raw, dataset, exclude, keep)
    problems = [*raw.problems, *problems]
    known = classes if classes is not None else raw.classes
    lacking = [v for v, entry in raw.videos.items() if v not in reasons and _lacks_duration(entry)]
    found = as_named(_durations(lacking, durations or {}), raw.videos) if lacking else {}
    if found and found.keys().isdisjoint(raw.videos):
        problems.append(
            f"none of the {len(found)} durations is of a video here: are these its ids? "
            f"{apart(found, raw.videos)}"
        )
    rules = Rules(
        dataset=dataset,
        classes=None if known is None else frozenset(known),
        durations=found,
    )
    checked = {v: check_video(v, raw.videos[v], rules) for v in raw.videos if v not in reasons}
    for video_id, result in checked.items():
        reasons_against = (*raw.repeated.get(video_id, ()), *result.problems)
        problems += [f"video {video_id!r}: {reason}" for reason in reasons_against]
    if known is None:
        way = ", or have the spaces around labels removed (--trim-labels, --data.trim-labels)"
        problems += labels_alike(_labels(raw, reasons, dataset), spaces=way)
    annotations = _assemble(checked, known, {v: reasons[v] for v in raw.videos if v in reasons})
    if not problems and not known and not any(v.instances for v in annotations.videos):
        problems.append("there is nothing to learn: no video has an annotated instance")
    if problems:
        raise AnnotationError(source, problems)
    return annotations


def _labels(raw: RawCollection, left_out: Collection[str], dataset: Dataset) -> Counter[str]:
    """Count the labels of the used videos, trimmed if the record says so."""
    counts = Counter(dict.fromkeys(dataset.ambiguous, 0))
    for video_id, entry in raw.videos.items():
        actions = entry.get("annotations") if isinstance(entry, dict) else None
        if video_id in left_out or not isinstance(actions, list):
            continue
        labels = (action.get("label") for action in actions if isinstance(action, dict))
        counts.update(label for label in labels if isinstance(label, str) and label.strip())
    if Fault.SPACED not in dataset.repaired:
        return counts
    trimmed: Counter[str] = Counter()
    for label, number in counts.items():
        trimmed[label.strip()] += number
    return trimmed


def _lacks_duration(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("duration") is None


def _durations(video_ids: Sequence[str], known: Durations) -> Mapping[str, float]:
    return known if isinstance(known, Mapping) else known(video_ids)


def read_ids(path: str | Path) -> frozenset[str]:
    """Read ids of videos to exclude: one per line, a JSON list, or the keys of a JSON object.

    Feature extractors write the first form as missing_files.txt; lists of blocked videos are
    published in the other two.

    Raises:
        AnnotationError: the file cannot be read or has another shape.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        return frozenset(line.strip() for line in read_text(path).splitlines() if line.strip())
    document, _ = read_json(path)  # a repeated id does no harm
    if not isinstance(document, list | dict) or not all(isinstance(i, str) for i in document):
        raise AnnotationError(str(path), ["must be a list of video ids or an object keyed by them"])
    return frozenset(document)


def read_durations(path: str | Path) -> dict[str, float]:
    """Read durations in seconds by video id from a JSON object.

    Raises:
        AnnotationError: the file cannot be read, repeats an id or has another shape.
    """
    document, repeated = read_json(Path(path))
    problems = [*map(str, repeated)]
    try:
        durations = _DURATIONS.validate_python(document)
    except ValidationError as error:
        problems += [problem_of(e, f"{e['loc'][0]!r}" if e["loc"] else "") for e in error.errors()]
    if problems:
        raise AnnotationError(str(path), problems)
    return durations


def _left_out(
    raw: RawCollection, dataset: Dataset, exclude: Collection[str], keep: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Return video id -> reason of exclusion, and problems of `exclude` and `keep`."""
    listed = {
        video_id if video_id in raw.videos else video_id.removeprefix("v_")
        for video_id in as_named(dict.fromkeys(exclude), raw.videos)
    }
    listed = set(as_named(dict.fromkeys(listed), raw.videos))
    problems = [
        f"video {video_id!r}: is to be kept, but "
        + ("is not left out" if video_id in raw.videos else "is not in the annotations")
        for video_id in sorted(keep)
        if video_id not in dataset.unusable or video_id not in raw.videos
    ]
    if listed and listed.isdisjoint(raw.videos):
        problems.append(
            f"none of the {len(listed)} videos to exclude is there: are these its ids? "
            f"{apart(listed, raw.videos)}"
        )
    reasons = {
        **dict.fromkeys(listed, "is on the list to exclude"),
        **raw.excluded,
        **{v: why for v, why in dataset.unusable.items() if v not in keep},
    }
    return reasons, problems


def _form(path: Path, name: str) -> FileForm:
    """Return the form of that name; for "auto", detect the form of the path."""
    if name in FORMS:
        return FORMS[name]
    if name != "auto":
        raise ValueError(f"There is no form {name!r}. Give one of auto, {', '.join(FORMS)}.")
    # from the last form to the first: any folder with text files could hold class files
    looked_at = [form for form in reversed([*FORMS.values()]) if form.suits is not None]
    found = next((form for form in looked_at if form.suits and form.suits(path)), None)
    if found is None and path.is_dir():
        unknown = "cannot be read: no known data set has such a folder"
        raise AnnotationError(str(path), [unknown])
    if found is None:
        return ACTIVITYNET_JSON
    alike = [form.name for form in FORMS.values() if form.suits is found.suits]
    if len(alike) > 1:
        reason = "can be read with several kinds of labels: choose the form "
        raise AnnotationError(str(path), [f"{reason}{', '.join(alike[:-1])} or {alike[-1]}"])
    return found


def _assemble(
    checked: Mapping[str, Checked], classes: Collection[str] | None, excluded: Mapping[str, str]
) -> Annotations:
    """Collect the valid videos, exclusions and repairs."""
    videos = sorted((r.video for r in checked.values() if r.video), key=lambda v: v.video_id)
    used = {i.label for video in videos for i in video.evaluated}
    return Annotations(
        classes=tuple(sorted(used if classes is None else set(classes))),
        videos=tuple(videos),
        excluded=tuple(Exclusion(video_id=v, reason=excluded[v]) for v in sorted(excluded)),
        repairs=tuple(
            repair for video_id in sorted(checked) for repair in checked[video_id].repairs
        ),
    )
