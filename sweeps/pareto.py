"""Search for the highest mAP and the lowest memory at once, and draw the Pareto front.

On the toy data, on two CPU cores. Memory is the predicted peak of a worker's activations there, and
the measured peak on a GPU:

  python sweeps/pareto.py
  python sweeps/pareto.py RECIPE --base.data.annotations A --base.data.videos FOLDER

The search covers frames, resolution, size of pieces, reversible connections or not, and the sizes
of Video Swin with torchvision's Kinetics-400 weights.
"""

from pipelines.config.recipe import Recipe
from re2tal.backbones.table import backbones
from re2tal.backbones.weights import PREFIX
from sweeps.models import choose_backbone, like
from sweeps.search import main
from sweeps.suggestions import Suggestions
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, Sweep, one_worker


def space(suggest: Suggestions, base: Recipe) -> None:
    """Ask for frames, resolution, size of the backbone, size of pieces."""
    frames, size = base.data.window.frames, base.data.size
    suggest.choice("data.window.frames", (frames // 2, frames * 3 // 4, frames))
    # half and three quarters of the size, rounded down to multiples of 16
    suggest.choice("data.size", [size * part // 4 // 16 * 16 for part in (2, 3)])
    _size(suggest, base)
    if suggest.choice("model.reversible", (True, False)):
        suggest.choice("model.slice_mb", (None, 1, 4))


def _size(suggest: Suggestions, base: Recipe) -> None:
    """Ask for a size from the backbone's family with torchvision weights, if it is one of these."""
    own = base.model.backbone
    family = [
        entry
        for entry in backbones().values()
        if any(name.startswith(PREFIX) for name in entry.weights)
        and type(entry.make()) is type(own)
    ]
    if len(family) > 1 and own in like(own, family).values():
        choose_backbone(suggest, base, family)


SWEEP = Sweep(
    name="pareto",
    space=space,
    objectives=(HIGHEST_MAP, LOWEST_MEMORY),
    epochs=lambda base: max(1, base.epochs // 2),
    prepare=one_worker,
)

if __name__ == "__main__":
    main(SWEEP, __doc__ or "")
