"""Summary of annotations in plain text of at most 80 columns."""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from re2tal.annotations import Annotations, Instance, VideoAnnotation
from re2tal.errors import shortened

WIDTH = 80
_BAR = 40  # characters of the longest bar
_LISTED = 20  # greatest number of lines of a list
_EXTREMES = 5  # number of the largest, and of the smallest, classes


def summarize(annotations: Annotations) -> str:
    """Describe size, classes, lengths and coverage of annotations, exclusions and repairs."""
    instances = [i for video in annotations.videos for i in video.instances]
    blocks = [
        _subsets(annotations.videos),
        _classes(annotations.classes, instances),
        _lengths([i.end - i.start for i in instances]),
        _remarks(annotations),
        _list("Left out", [f"{e.video_id}: {e.reason}" for e in annotations.excluded]),
        _list(
            "Repaired",
            [
                f"{r.video_id}: {r.instance.label} {r.instance.start:g} to {r.instance.end:g} s "
                f"{r.action}: {r.reason}"
                for r in annotations.repairs
            ],
        ),
    ]
    return "\n\n".join("\n".join(block) for block in map(list, blocks) if block)


def _subsets(videos: Sequence[VideoAnnotation]) -> Iterator[str]:
    """Yield a row per subset and one for all: size, hours, instances, share of time in action."""
    row = "{:<18} {:>8} {:>9} {:>10} {:>14} {:>10}"
    yield row.format("subset", "videos", "hours", "instances", "per video", "in action")
    names = sorted({video.subset for video in videos})
    groups = [(name, [v for v in videos if v.subset == name]) for name in names]
    for name, group in [*groups, *([("all", list(videos))] if len(groups) > 1 else [])]:
        seconds = sum(video.duration for video in group)
        count = sum(len(video.instances) for video in group)
        most = max((len(video.instances) for video in group), default=0)
        share = sum(map(_covered, group)) / seconds if seconds else 0.0
        per_video = f"{count / len(group) if group else 0:.1f} (<= {most})"
        hours = f"{seconds / 3600:,.2f}"
        yield row.format(
            f"{name:.18}", f"{len(group):,}", hours, f"{count:,}", per_video, f"{share:.1%}"
        )


def _covered(video: VideoAnnotation) -> float:
    """Compute the seconds of a video in which at least one action happens."""
    covered, reached = 0.0, 0.0
    for instance in video.instances:  # sorted by start
        covered += max(instance.end - max(instance.start, reached), 0.0)
        reached = max(reached, instance.end)
    return covered


def _classes(classes: Sequence[str], instances: Sequence[Instance]) -> Iterator[str]:
    counts = Counter(dict.fromkeys(classes, 0))
    counts.update(instance.label for instance in instances)
    ranked = sorted(classes, key=lambda label: (-counts[label], label))
    yield _count(len(classes), "class", "classes")
    ends = (
        [("most", ranked[:_EXTREMES]), ("fewest", ranked[-_EXTREMES:][::-1])]
        if len(ranked) > 2 * _EXTREMES
        else [("all", ranked)]
    )
    for name, labels in ends:
        yield from _wrap(f"{name:<7} " + ", ".join(f"{la} {counts[la]:,}" for la in labels))
    if empty := sum(count == 0 for count in counts.values()):
        yield f"  without an instance: {empty:,}"


def _lengths(lengths: Sequence[float]) -> Iterator[str]:
    """Yield quantiles, and a histogram of the lengths with powers of two as borders."""
    if not lengths:
        return
    ranked = sorted(lengths)
    marks = [("min", 0.0), ("5%", 0.05), ("25%", 0.25), ("median", 0.5)]
    marks += [("75%", 0.75), ("95%", 0.95), ("max", 1.0)]
    yield "Lengths of instances in seconds"
    values = (f"{name} {_quantile(ranked, q):.3g}" for name, q in marks)
    yield "  " + "   ".join(values)
    bins = Counter(math.floor(math.log2(length)) for length in lengths)
    longest = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        bar = "#" * math.ceil(_BAR * bins[power] / longest)
        yield f"  {2.0**power:>9g} to {2.0 ** (power + 1):<9g} {bins[power]:>9,} {bar}".rstrip()


def _quantile(ranked: Sequence[float], q: float) -> float:
    """Return the smallest value such that at least the share `q` of values does not exceed it."""
    return ranked[max(math.ceil(q * len(ranked)) - 1, 0)]


def _remarks(annotations: Annotations) -> Iterator[str]:
    """Yield remarks on unusual content that is not necessarily wrong."""
    twice = sum(len(v.instances) - len(set(v.instances)) for v in annotations.videos)
    if twice:
        yield f"{_count(twice, 'instance')} with the times and the label of another"
    if ambiguous := annotations.ambiguous:
        count = sum(map(len, ambiguous.values()))
        place = _count(len(ambiguous), "video")
        yield f"{_count(count, 'ambiguous stretch', 'ambiguous stretches')} in {place}, set apart"


def _list(title: str, items: Sequence[str]) -> Iterator[str]:
    if not items:
        return
    yield f"{title}: {len(items):,}"
    for item in shortened(items, _LISTED):
        yield from _wrap(item)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _wrap(text: str) -> Iterable[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
