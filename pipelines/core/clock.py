"""Durations in words."""


def duration(seconds: float) -> str:
    """Format seconds as minutes and seconds, or hours and minutes: `3:07`, `2 h 05`.

    Args:
        seconds: a duration, not negative.
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60} h {minutes % 60:02d}"
