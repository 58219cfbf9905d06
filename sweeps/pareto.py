"""Search for the highest mAP and the lowest memory at once, and draw the front between them.

On the toy data, on two CPU cores, where memory is the predicted peak of a worker's activations; on
a GPU it is the measured peak:

  python sweeps/pareto.py
  python sweeps/pareto.py RECIPE --base.data.annotations A --base.data.videos FOLDER

The search covers frames, resolution, the size of a branch's pieces, a backbone with and without
reversible connections, and Video Swin's sizes with torchvision's Kinetics-400 weights.
"""

from dataclasses import replace
from typing import Any

from pipelines.config.recipe import Recipe
from re2tal.backbones.table import backbones
from re2tal.backbones.weights import PREFIX
from sweeps.search import main
from sweeps.suggestions import Suggestions
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, Sweep, one_worker


def space(suggest: Suggestions, base: Recipe) -> None:
    """Ask for frames, resolution, size of the backbone, slice budget."""
    frames, size = base.data.window.frames, base.data.size
    suggest.choice("data.window.frames", (frames // 2, frames * 3 // 4, frames))
    suggest.choice("data.size", [size * part // 4 // 16 * 16 for part in (2, 3)])
    _size(suggest, base.model.backbone)
    if suggest.choice("model.reversible", (True, False)):
        suggest.choice("model.slice_mb", (None, 1, 4))


def _size(suggest: Suggestions, own: Any) -> None:
    """Ask for a size of the family that has torchvision weights, if the backbone has one too."""
    kept = {name: getattr(own, name) for name in ("drop_path", "pooling") if hasattr(own, name)}
    sizes, weights = {}, {}
    for entry in backbones().values():
        known = [name.removeprefix(PREFIX) for name in entry.weights if name.startswith(PREFIX)]
        config: Any = entry.make()
        if known and type(config) is type(own):
            name = known[0].partition("/")[0]
            sizes[name] = replace(config, **kept)
            weights[name] = entry.weights[0]
    if len(sizes) < 2 or own not in sizes.values():
        return
    chosen = suggest.choice("model.backbone", sizes)
    if chosen != own:
        (name,) = [name for name, size in sizes.items() if size == chosen]
        suggest.set("model.weights", weights[name])


SWEEP = Sweep(
    name="pareto",
    space=space,
    objectives=(HIGHEST_MAP, LOWEST_MEMORY),
    epochs=lambda base: max(1, base.epochs // 2),
    prepare=one_worker,
)

if __name__ == "__main__":
    main(SWEEP, __doc__ or "")
