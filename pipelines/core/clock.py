"""Durations in words."""


def duration(seconds: float) -> str:
    """Format seconds, 0 or more, as minutes and seconds or hours and minutes: `3:07`, `2 h 05`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60} h {minutes % 60:02d}"
