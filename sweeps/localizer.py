"""Search a localizer's shape and losses and, on saved predictions, its post-processing.

On the toy data, on two CPU cores:

  python sweeps/localizer.py

On features of the pretrained backbone (extract_features.py), for many more trials in the same time:

  python sweeps/localizer.py --base.data.features FEATURES --trials 50

Around another recipe, on your own data:

  python sweeps/localizer.py RECIPE --base.data.annotations A --base.data.features FEATURES

Non-maximum suppression and voting need no training: they are searched at the end, on the best
trial's detections (sweeps/postprocessing.py does the same for any run).
"""

from pipelines.config.recipe import Recipe
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.tridet import TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from sweeps.search import main
from sweeps.suggestions import Suggestions
from sweeps.sweep import Sweep, one_worker


def space(suggest: Suggestions, base: Recipe) -> None:
    """Ask for the learning rate and the fields of the base recipe's localizer."""
    rate = base.optim.localizer_lr
    suggest.log_float("optim.localizer_lr", rate / 5, rate * 5)
    localizer = base.model.localizer
    if isinstance(localizer, ActionFormerConfig):
        actionformer(suggest, localizer)
    elif isinstance(localizer, TriDetConfig):
        tridet(suggest, localizer)
    elif isinstance(localizer, VSGNConfig):
        vsgn(suggest, localizer)


def actionformer(suggest: Suggestions, base: ActionFormerConfig) -> None:
    """Ask for pyramid, widths, heads, attention window, positive points, weights of losses."""
    field = "model.localizer."
    if isinstance(base.window, int):  # otherwise there is a window for each level
        suggest.choice(f"{field}levels", (base.levels - 1, base.levels))
        suggest.choice(f"{field}window", (0, 9, 19))
    width = suggest.choice(f"{field}width", (base.width // 2, base.width, base.width * 2))
    heads = [n for n in (base.heads // 2, base.heads, base.heads * 2) if n and width % n == 0]
    suggest.choice(f"{field}heads", heads)
    suggest.choice(f"{field}head_layers", (2, base.head_layers))
    suggest.number(f"{field}centre_radius", 1.0, 3.0)
    suggest.log_float(f"{field}first_range", base.first_range / 2, base.first_range * 2)
    suggest.log_float(f"{field}regression_weight", 0.25, 4.0)
    suggest.number(f"{field}label_smoothing", 0.0, 0.2)
    suggest.number(f"{field}dropout", 0.0, 0.3)


def tridet(suggest: Suggestions, base: TriDetConfig) -> None:
    """Ask for pyramid, widths, windows, bins, positive points, weights of losses."""
    field = "model.localizer."
    suggest.choice(f"{field}levels", (base.levels - 1, base.levels))
    suggest.choice(f"{field}width", (base.width // 2, base.width, base.width * 2))
    suggest.choice(f"{field}head_layers", (2, base.head_layers))
    suggest.choice(f"{field}window", (1, 3, 5))
    suggest.choice(f"{field}widening", (1.5, 5.0))
    suggest.choice(f"{field}bins", (base.bins // 2, base.bins, base.bins * 2))
    suggest.number(f"{field}iou_power", 0.0, 1.0)
    suggest.number(f"{field}centre_radius", 1.0, 3.0)
    suggest.log_float(f"{field}regression_weight", 0.25, 4.0)
    suggest.number(f"{field}label_smoothing", 0.0, 0.2)


def vsgn(suggest: Suggestions, base: VSGNConfig) -> None:
    """Ask for pyramid, width, graph, anchors, their matching, weight of supplementary losses."""
    field = "model.localizer."
    suggest.choice(f"{field}levels", (base.levels - 1, base.levels))
    suggest.choice(f"{field}width", (base.width // 2, base.width))
    suggest.choice(f"{field}head_layers", (2, base.head_layers))
    if suggest.choice(f"{field}graph", (True, False)):
        suggest.choice(f"{field}neighbours", (6, 12))
    suggest.choice(f"{field}anchor_scales", ((1.0, 1.5), (1.5, 3.0)))
    suggest.number(f"{field}match_tiou", 0.4, 0.7)
    suggest.log_float(f"{field}supplementary_weight", 0.05, 1.0)


SWEEP = Sweep(
    name="localizer",
    space=space,
    epochs=lambda base: max(1, base.epochs // 2),
    prepare=one_worker,
    postprocessing=True,
)

if __name__ == "__main__":
    main(SWEEP, __doc__ or "")
