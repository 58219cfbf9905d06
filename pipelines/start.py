"""A detector as its training begins: with pretrained weights, and frozen in part."""

from pathlib import Path

from pipelines.freezing import freeze
from pipelines.settings import BackboneModelConfig
from re2tal.backbones.checkpoint import load_backbone_weights
from re2tal.detector import Detector
from re2tal.reversible.controls import set_slice_bytes


def prepare(detector: Detector, weights: str | Path | None, config: BackboneModelConfig) -> None:
    """Loads the backbone's weights, says how it runs, and freezes what is not to be trained.

    Args:
        detector: the model.
        weights: file or name of backbone weights, or None.
        config: how frames are normalized, how large pieces are, names of frozen parts, what becomes
            of norms.

    Raises:
        ValueError: if the weights do not fit the backbone, or were trained on frames normalized by
            other values; if there is no part of a name that is to be frozen.
    """
    if weights is not None:
        report = load_backbone_weights(detector.backbone, weights)
        report.require_normalization(config.mean, config.std, option="--model.")
    if config.slice_mb is not None:
        set_slice_bytes(detector, config.slice_mb * 2**20)
    freeze(detector, config)
