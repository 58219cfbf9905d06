"""Search for the best pair of backbone and localizer on your own data, in your GPU's memory.

On the toy data, on two CPU cores, with the backbones whose weights the repository ships:

  python sweeps/models.py

Around another recipe, on your own data, with a GPU's memory as the bound:

  python sweeps/models.py RECIPE --constraint "memory <= 20GiB" --trials 40
      --base.data.annotations A --base.data.videos FOLDER
      --base.model.weights torchvision:swin3d_t/KINETICS400_V1

The search covers backbones whose pretrained weights have the same source as the base recipe's
(torchvision, also if the base has no weights or a local file; Hugging Face, hf:...; or this
project) and that can take the recipe's window. A pair that does not fit into memory is a failed
trial, and the search continues.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.config.recipe import Recipe
from re2tal.backbones.swin import TOY_WEIGHTS
from re2tal.backbones.table import Entry, backbones
from re2tal.backbones.weights import PREFIX
from re2tal.errors import UserError
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.tridet import TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.weights import without_weights
from sweeps.search import main
from sweeps.suggestions import Suggestions
from sweeps.sweep import Sweep, one_worker

# Fields that mean the same in all localizers that have them.
_SHARED = ("width", "stem_layers", "head_width", "first_range", "drop_path", "initial_normalizer")


def space(suggest: Suggestions, base: Recipe) -> None:
    """Ask for the two parts of the detector, and their learning rates."""
    optim = base.optim
    suggest.choice("model.localizer", localizers(base.model.localizer))
    suggest.log_float("optim.localizer_lr", optim.localizer_lr / 5, optim.localizer_lr * 5)
    if base.data.features is None:
        choose_backbone(suggest, base, fitting(base))
        suggest.log_float("optim.backbone_lr", optim.backbone_lr / 5, optim.backbone_lr * 5)


def choose_backbone(suggest: Suggestions, base: Recipe, entries: Sequence[Entry]) -> None:
    """Ask for a backbone of the table, with its weights and normalization, or the base's own."""
    own = base.model.backbone
    options = like(own, entries)
    chosen = suggest.choice(
        "model.backbone", options if own in options.values() else {"base": own, **options}
    )
    if chosen == own:
        return
    (entry,) = [one for one in entries if options[one.name] == chosen]
    suggest.set("model.weights", entry.weights[0])
    suggest.set("model.mean", entry.mean)
    suggest.set("model.std", entry.std)
    # the frozen modules of the base's backbone do not exist in another one
    frozen = (name for name in base.model.frozen if name.split(".")[0] != "backbone")
    suggest.set("model.frozen", tuple(frozen))


def like(own: Any, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return backbones of the table by name, with the drop path and pooling of `own`."""
    kept = {name: getattr(own, name) for name in ("drop_path", "pooling") if hasattr(own, name)}
    made: dict[str, Any] = {entry.name: entry.make() for entry in entries}
    return {
        name: replace(config, **{k: value for k, value in kept.items() if hasattr(config, k)})
        for name, config in made.items()
    }


def fitting(base: Recipe) -> list[Entry]:
    """List the backbones with weights from the base's source that can take its window."""
    localizer: Any = base.model.localizer
    source = _source(base.model.weights or PREFIX)
    frames = base.data.window.frames
    return [
        entry
        for entry in backbones().values()
        if entry.input == "window"
        and any(_source(weights) == source for weights in entry.weights)
        and (shape := _strides(entry.name)) is not None
        # a multiple for the backbone in frames, and for the localizer in features
        and frames % math.lcm(shape[0], shape[1] * localizer.multiple) == 0
    ]


def _source(weights: str) -> str:
    shipped = Path(weights).parent == Path(TOY_WEIGHTS).parent
    return "shipped" if shipped else "hf" if weights.startswith("hf:") else PREFIX


@cache
def _strides(name: str) -> tuple[int, int] | None:
    """Return multiple and temporal stride of a backbone; None if its library is not installed."""
    try:
        built: Any = without_weights(backbones()[name].make().build)
    except UserError:
        return None
    return built.multiple, built.temporal_stride


def localizers(own: Any) -> dict[str, Any]:
    """Return the localizers by name, with the base's width, pyramid and head width."""
    levels = own.multiple.bit_length()  # each level halves the features: multiple = 2**(levels - 1)
    found: dict[str, Any] = {}
    for name, kind in (("actionformer", ActionFormerConfig), ("tridet", TriDetConfig)):
        found[name] = _like(own, kind, levels=levels)
    found["vsgn"] = _like(own, VSGNConfig, levels=levels - 1, stem_stride=1)
    return {name: own if type(made) is type(own) else made for name, made in found.items()}


def _like(own: Any, kind: type[Any], **shape: int) -> Any:
    known = {field.name for field in fields(kind)}
    shared = {name: getattr(own, name) for name in _SHARED if name in known and hasattr(own, name)}
    return kind(**shared, **shape)


SWEEP = Sweep(
    name="models",
    space=space,
    epochs=lambda base: max(1, base.epochs // 2),
    prepare=one_worker,
)

if __name__ == "__main__":
    main(SWEEP, __doc__ or "")
