"""Training on features instead of frames: the changed recipe, and batches of windows."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.config.recipe import WITHOUT_BACKBONE, Recipe
from pipelines.data.batches import Batch, assemble
from pipelines.data.clip_plan import AnyPlan
from pipelines.data.features import Features
from pipelines.data.plan import Plan
from re2tal.backbones.precomputed import PrecomputedConfig
from re2tal.errors import UserError
from re2tal.videos.features import window_features
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window
from re2tal.weights import without_weights

_KEPT_BYTES = 2**30  # limit on the features that a worker keeps for the next epoch


def without_backbone(recipe: Recipe, features: Features) -> Recipe:
    """Replace a recipe's frames and backbone by features, and keep everything else.

    A window has as many features as the backbone would have made. Settings that need a backbone or
    frames are switched off: weights, rewiring, frozen parts of the backbone, and augmentation
    except in time, for which features are interpolated.
    """
    backbone: Any = without_weights(recipe.model.backbone.build)
    frozen = tuple(part for part in recipe.model.frozen if part.split(".")[0] != "backbone")
    model = replace(
        recipe.model,
        backbone=PrecomputedConfig(
            channels=features.channels, temporal_stride=backbone.temporal_stride
        ),
        frozen=frozen,
        **WITHOUT_BACKBONE,
    )
    data = replace(recipe.data, augmentation=recipe.data.augmentation.in_time)
    return replace(recipe, model=model, data=data)


def feature_stream(plan: AnyPlan) -> "FeatureStream | None":
    """Return the stream of a run that trains on features; None if it trains on frames."""
    if isinstance(plan, Plan) and plan.features is not None:
        return FeatureStream(plan.features, plan.durations)
    return None


class FeatureStream:
    """Source of the features of windows, with a least-recently-used cache of videos (1 GiB).

    Args:
        features: features of all videos.
        durations: video id to seconds.
    """

    def __init__(self, features: Features, durations: Mapping[str, float]) -> None:
        self._features, self._durations = features, durations
        self._kept: OrderedDict[str, tuple[np.ndarray, TimeGrid]] = OrderedDict()
        self._bytes = 0

    def batches(self, windows: Sequence[Window], *, batch_size: int) -> Iterator[Batch]:
        """Yield the features of windows in batches, in order; the last batch may be smaller.

        Yields:
            Batches whose frames are features, float32 (B, T', C). If the features of a window
            cannot be read, they are zero and its mask is false.
        """
        for start in range(0, len(windows), batch_size):
            chunk = windows[start : start + batch_size]
            yield assemble(chunk, [self._sample(window) for window in chunk])

    def _sample(self, window: Window) -> dict[str, Any]:
        """Return a sample like that of `decode_sample`, with features as frames."""
        try:
            features, grid = self._video(window.video_id)
        except (UserError, OSError) as problem:
            shape = window.grid.num_features, self._features.channels
            return {"frames": np.zeros(shape, np.float32), "error": str(problem)}
        return {"frames": window_features(features, grid, window), "error": ""}

    def _video(self, video_id: str) -> tuple[np.ndarray, TimeGrid]:
        if video_id in self._kept:
            self._kept.move_to_end(video_id)
            return self._kept[video_id]
        found = self._features.read(video_id, duration=self._durations[video_id])
        self._kept[video_id] = found
        self._bytes += found[0].nbytes
        while self._bytes > _KEPT_BYTES:
            self._bytes -= self._kept.popitem(last=False)[1][0].nbytes
        return found
