"""Which parts of a detector are trained, and which stay as they are."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.settings import BackboneModelConfig
from re2tal.detector import Detector

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def freeze(detector: Detector, config: BackboneModelConfig) -> None:
    """Takes the gradients from what is not to be trained.

    Args:
        detector: the model.
        config: names of frozen parts, and what becomes of the backbone's norms.

    Raises:
        ValueError: if the detector has no part of a name.
    """
    for part in _parts(detector, config.frozen):
        part.requires_grad_(requires_grad=False)
    if config.norms == "frozen":
        for module in detector.backbone.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(requires_grad=False)


def train_mode(detector: Detector, config: BackboneModelConfig) -> None:
    """Training mode, out of which frozen parts stay, and BatchNorms that keep their statistics.

    Args:
        detector: the model.
        config: as for `freeze`.
    """
    detector.train()
    for part in _parts(detector, config.frozen):
        part.eval()
    if config.norms != "trained":
        for module in detector.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _parts(detector: Detector, names: tuple[str, ...]) -> Iterator[nn.Module]:
    modules = dict(detector.named_modules())
    for name in names:
        if name not in modules:
            known = ", ".join(n for n in modules if n.count(".") < 2 and n)
            raise ValueError(
                f"--model.frozen: the detector has no part {name!r}. It has {known} and parts of "
                "these."
            )
        yield modules[name]
