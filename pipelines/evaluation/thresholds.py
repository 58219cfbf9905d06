"""The tIoU thresholds at which each data set is evaluated: its evaluator's, or those of papers."""

from collections.abc import Mapping

from pipelines.recipe import Dataset

_LOW = (0.1, 0.2, 0.3, 0.4, 0.5)
_MIDDLE = (0.3, 0.4, 0.5, 0.6, 0.7)
_HIGH = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

USUAL_THRESHOLDS: Mapping[Dataset | None, tuple[float, ...]] = {
    None: _MIDDLE,
    "thumos-14": _MIDDLE,
    "multithumos": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "activitynet-1.3": _HIGH,
    "hacs-segments": _HIGH,
    "fineaction": _HIGH,
    "epic-kitchens-100": _LOW,
    "ego4d-mq": _LOW,
}
"""By data set; None is any other."""
