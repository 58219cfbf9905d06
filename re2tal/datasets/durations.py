"""Whether the annotations speak of the files that are there: their durations are compared."""

from collections.abc import Mapping

from re2tal.annotations import Annotations
from re2tal.datasets.checking import DURATION_TOLERANCE


def check_durations(
    annotations: Annotations,
    measured: Mapping[str, float],
    *,
    tolerance: float = DURATION_TOLERANCE,
) -> dict[str, str]:
    """Compares the annotated duration of each video with that of its file.

    A file that was cut, or converted to another frame rate without its time, puts every action of
    the video in the wrong place, and nothing else shows it.

    Args:
        annotations: The annotations that are to be used.
        measured: Video id -> duration of its file in seconds; videos that are not in it pass.
        tolerance: Seconds by which the two may differ.

    Returns:
        Id to a sentence, of each video whose durations differ by more, in the order of the videos.
    """
    problems = {}
    for video in annotations.videos:
        seconds = measured.get(video.video_id, video.duration)
        if not abs(seconds - video.duration) <= tolerance:  # so that NaN is a problem as well
            last = max((i.end for i in video.instances), default=0.0)
            lost = f", and actions in it reach up to {last:g} s" if last > seconds else ""
            problems[video.video_id] = (
                f"video {video.video_id!r}: its file lasts {seconds:g} s, its annotation says "
                f"{video.duration:g} s{lost}; get the original file, or exclude it"
            )
    return problems
