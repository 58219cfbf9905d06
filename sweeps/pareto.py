"""Searches for the highest mAP and the lowest memory at once, and draws the front between them.

On the toy data, on two CPU cores, where memory is the predicted peak of a worker's activations; on
a GPU it is the measured peak:

  python sweeps/pareto.py
  python sweeps/pareto.py RECIPE --base.data.annotations A --base.data.videos FOLDER

Frames, resolution, how large the pieces of a branch are, whether the backbone is reversible at all,
and for Video Swin of torchvision's sizes which of them, with torchvision's Kinetics-400 weights.
"""

from dataclasses import replace

from pipelines.config.recipe import Recipe
from re2tal.backbones.swin import SwinConfig, swin_b, swin_s, swin_t
from sweeps.search import main
from sweeps.suggestions import Suggestions
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, Sweep, one_worker

_SIZES = {"swin3d_t": swin_t(), "swin3d_s": swin_s(), "swin3d_b": swin_b()}


def space(suggest: Suggestions, base: Recipe) -> None:
    """Ask for frames, resolution, size of the backbone, slice budget."""
    frames, size = base.data.window.frames, base.data.size
    suggest.choice("data.window.frames", (frames // 2, frames * 3 // 4, frames))
    suggest.choice("data.size", [size * part // 4 // 16 * 16 for part in (2, 3)])
    backbone = base.model.backbone
    if isinstance(backbone, SwinConfig):
        _swin(suggest, backbone)
    if suggest.choice("model.reversible", (True, False)):
        suggest.choice("model.slice_mb", (None, 1, 4))


def _swin(suggest: Suggestions, own: SwinConfig) -> None:
    sizes = {
        name: replace(size, drop_path=own.drop_path, pooling=own.pooling)
        for name, size in _SIZES.items()
    }
    if own not in sizes.values():
        return
    chosen = suggest.choice("model.backbone", sizes)
    if chosen != own:
        (name,) = [name for name, size in sizes.items() if size == chosen]
        suggest.set("model.weights", f"torchvision:{name}/KINETICS400_V1")


SWEEP = Sweep(
    name="pareto",
    space=space,
    objectives=(HIGHEST_MAP, LOWEST_MEMORY),
    epochs=lambda base: max(1, base.epochs // 2),
    prepare=one_worker,
)

if __name__ == "__main__":
    main(SWEEP, __doc__ or "")
