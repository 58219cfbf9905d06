"""`torch.compile` for parts of a detector, in place: parameters, names and checkpoints stay."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from pipelines.settings import CompiledPart
from re2tal.detector import Detector
from re2tal.reversible import branches, reversible_stages


def compile_parts(
    detector: Detector,
    parts: Sequence[CompiledPart],
    *,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Has modules compiled when they first run.

    Args:
        detector: the model.
        parts: "branches" are the modules inside the residual branches of a rewired backbone, whose
            stages run as they are; window attention, which runs in pieces, stays uncompiled.
            "localizer" are its submodules.
        backend: of `torch.compile`.

    Raises:
        ValueError: if branches are to be compiled and there are none.
    """
    for module in _modules(detector, parts):
        module.compile(backend=backend)


def _modules(detector: Detector, parts: Sequence[CompiledPart]) -> Iterator[nn.Module]:
    if "localizer" in parts:
        yield from detector.localizer.children()
    if "branches" not in parts:
        return
    stages = [stage for _, stage in reversible_stages(detector.backbone)]
    if not stages:
        raise ValueError(
            "--optim.compile branches needs a rewired backbone, but none of its stages is "
            "reversible: leave it out, or train with --model.reversible."
        )
    for stage in stages:
        for name in stage.rewired:
            for branch in branches(stage.get_submodule(name)):
                yield from branch.modules
