"""Error of which programs show only the message, and helpers for messages."""

from collections.abc import Collection, Sequence


class UserError(Exception):
    """Mistake in the user's input; the message says what is wrong, where, and what to do.

    Scripts print the message without a traceback and exit with 1. A subclass exists only where code
    catches it separately.
    """


def shortened(items: Sequence[str], most: int = 20, *, rest: str = "") -> list[str]:
    """Shorten a list for a message to its first items and the number of the others.

    Args:
        items: lines or names.
        most: greatest number of items shown.
        rest: place that lists the others, such as ", in failures.json".
    """
    left = len(items) - most
    return [*items[:most], *([f"... and {left:,} more{rest}"] if left > 0 else [])]


def count_of(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun: "1 video", "2,000 videos"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def apart(found: Collection[str], wanted: Collection[str]) -> str:
    """Show three ids of each of two disjoint sets, for the end of a message.

    Args:
        found: ids of the videos in a file.
        wanted: ids of the annotated videos.
    """
    listed = (", ".join(shortened(sorted(ids), 3)) or "none" for ids in (found, wanted))
    theirs, ours = listed
    bare = {video_id.removeprefix("v_") for video_id in wanted}
    fits = any(video_id.removeprefix("v_") in bare for video_id in found)
    hint = '. Without "v_" in front they have some in common' if fits else ""
    return f"The ids there are {theirs}; those of the annotations are {ours}{hint}"


def check_within(settings: object, **bounds: tuple[float, float]) -> None:
    """Refuse settings that are too small or too large, or not a number.

    Args:
        settings: a dataclass.
        bounds: smallest and largest value of each named field. Every number of a tuple is checked;
            None passes.

    Raises:
        ValueError: a field is outside its bounds.
    """
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not least <= number <= most:  # true for NaN too
                raise ValueError(
                    f"{type(settings).__name__}.{name} must be {least:,} to {most:,}, but is "
                    f"{value!r:.60}."
                )
