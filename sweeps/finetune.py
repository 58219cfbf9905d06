"""Search the settings of end-to-end finetuning of a pretrained backbone for the highest mAP.

On the toy data, on two CPU cores:

  python sweeps/finetune.py

Around another recipe, on your own data, eight GPU trials at a time:

  python sweeps/finetune.py RECIPE --trials 50 --concurrency 8
      --base.data.annotations A --base.data.videos FOLDER --base.model.weights W

To continue a stopped sweep, give the same command again; to extend a finished one, more --trials.
"""

from dataclasses import fields

from pipelines.config.recipe import Recipe
from sweeps.search import main
from sweeps.suggestions import Suggestions
from sweeps.sweep import Sweep, first_layers, one_worker


def space(suggest: Suggestions, base: Recipe) -> None:
    """Ask for learning rates, regularization, frozen layers, coupling, and augmentation."""
    optim = base.optim
    suggest.log_float("optim.backbone_lr", optim.backbone_lr / 10, optim.backbone_lr * 10)
    suggest.log_float("optim.localizer_lr", optim.localizer_lr / 5, optim.localizer_lr * 5)
    suggest.log_float("optim.weight_decay", optim.weight_decay / 10, optim.weight_decay * 4)
    forgotten = 1 - optim.ema  # share of the EMA that a step replaces
    shorter, longer = max(0.0, 1 - 4 * forgotten), 1 - forgotten / 4
    suggest.choice(
        "optim.ema", tuple(dict.fromkeys((round(shorter, 6), optim.ema, round(longer, 6))))
    )
    if "drop_path" in {field.name for field in fields(base.model.backbone)}:  # type: ignore[arg-type]
        suggest.number("model.backbone.drop_path", 0.0, 0.3)
    suggest.choice("model.frozen", ((), first_layers(base, 0), first_layers(base, 0.3)))
    suggest.choice("model.coupling_epochs", (None, base.epochs / 2))
    suggest.choice("batch_size", (max(1, base.batch_size // 2), base.batch_size))
    frames = base.data.window.frames
    suggest.choice("data.window.frames", (frames // 2, frames))
    if suggest.choice("data.augmentation.crop_area", (None, (0.5, 1.0))) is not None:
        suggest.choice("data.augmentation.brightness", (0.0, 0.3))


SWEEP = Sweep(
    name="finetune",
    space=space,
    epochs=lambda base: max(1, base.epochs // 2),
    prepare=one_worker,
)

if __name__ == "__main__":
    main(SWEEP, __doc__ or "")
