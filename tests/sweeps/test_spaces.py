"""The sweeps that come with the product, around the recipes that come with it."""

from dataclasses import replace

import optuna
import pytest

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES, toy
from pipelines.training.model import build_detector
from re2tal.errors import UserError
from sweeps.finetune import SWEEP as FINETUNE
from sweeps.localizer import SWEEP as LOCALIZER
from sweeps.models import SWEEP as MODELS
from sweeps.models import fitting, localizers
from sweeps.pareto import SWEEP as PARETO
from sweeps.study import check_space
from sweeps.suggestions import Suggestions, override
from sweeps.sweep import Sweep, first_layers, one_worker


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "sweep", [FINETUNE, LOCALIZER, MODELS, PARETO], ids=lambda sweep: sweep.name
)
def test_every_draw_is_a_recipe_and_the_base_is_one_of_them(sweep: Sweep, recipe: str) -> None:
    made = sweep.prepare(RECIPES[recipe]())
    base = replace(made, epochs=sweep.epochs(made))
    own = check_space(sweep, base)
    assert len(own) >= 3
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = set()
    for _ in range(20):
        asked = Suggestions(base, study.ask())
        sweep.space(asked, base)
        drawn.add(str(override(base, asked.values)))
    assert len(drawn) > 10


def test_frozen_layers_are_those_before_a_block() -> None:
    assert first_layers(toy(), 0) == ("backbone.patch_embed",)
    assert first_layers(toy(), 0.5) == (
        "backbone.patch_embed",
        "backbone.features.0",
    )


def test_a_trial_without_gpus_has_one_worker() -> None:
    assert one_worker(toy()).scale.workers == 1
    assert one_worker(RECIPES["thumos_re2_swin_t_vsgn"]()) == RECIPES["thumos_re2_swin_t_vsgn"]()


def _pairs(base: Recipe) -> set[tuple[str, str]]:
    """Pairs of backbones and localizers that random draws of the models' space give."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = set()
    for _ in range(60):
        asked = Suggestions(base, trial := study.ask())
        MODELS.space(asked, base)
        names = (trial.params.get("model.backbone", "none"), trial.params["model.localizer"])
        if names not in drawn and "toy" in names[0]:
            # each can be built, and take the base's window
            recipe = override(base, asked.values)
            detector = build_detector(recipe, ["a", "b"], recipe.model.weights)
            assert recipe.data.window.frames % detector.multiple == 0
        drawn.add(names)
    return drawn


def test_every_pair_of_models_takes_the_weights_and_the_window_of_the_base() -> None:
    kinds = {"actionformer", "tridet", "vsgn"}
    for recipe in ("toy", "toy_vsgn"):
        drawn = _pairs(RECIPES[recipe]())
        assert drawn == {(name, kind) for name in ("swin_toy", "videomae_toy") for kind in kinds}
    base = toy()
    features = _pairs(replace(base, data=replace(base.data, features="features")))
    assert features == {("none", kind) for kind in kinds}
    thumos = RECIPES["thumos_re2_swin_t_actionformer"]()
    published = replace(thumos, model=replace(thumos.model, weights="hf:owner/model"))
    assert {"swin_s", "mvit_v2_s"} < {entry.name for entry in fitting(thumos)}
    assert {"videomae_b", "vjepa2_l"} < {entry.name for entry in fitting(published)}
    chosen = {"model.backbone": "base", "model.localizer": "tridet"}
    rates = {
        f"optim.{part}_lr": getattr(published.optim, f"{part}_lr")
        for part in ("backbone", "localizer")
    }
    asked = Suggestions(published, optuna.trial.FixedTrial(chosen | rates))
    MODELS.space(asked, published)
    assert "model.weights" not in asked.values, "a file of its own stays with the base's backbone"


@pytest.mark.parametrize("recipe", ["toy", "toy_tridet", "toy_vsgn"])
def test_localizers_of_a_size_are_the_base_s_and_two_like_it(recipe: str) -> None:
    own = RECIPES[recipe]().model.localizer
    found = localizers(own)
    assert own in found.values()
    assert {made.multiple for made in found.values()} == {16}
    assert {made.width for made in found.values()} == {96}


def _unknown(suggest: Suggestions, base: Recipe) -> None:
    suggest.number("optim.clip", 0.5, 2.0)
    suggest.number("optim.momentum", 0.5, 0.9)


def _rarely_wrong(suggest: Suggestions, base: Recipe) -> None:
    if suggest.number("optim.clip", 0.0, 1.0) < 0.1:
        suggest.choice("optim.ema", ("high",))


def _incompatible(suggest: Suggestions, base: Recipe) -> None:
    suggest.set("model.localizer.heads", 7)
    suggest.number("optim.clip", 0.5, 2.0)


def _empty(suggest: Suggestions, base: Recipe) -> None:
    suggest.set("optim.clip", 1.0)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (_unknown, "search space of mine: There is no field optim.momentum"),
        (_rarely_wrong, "optim.ema cannot be 'high'"),
        (_incompatible, "cannot be cut into 7 heads"),
        (_empty, "is empty"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_the_first_trial(
    space: object, message: str
) -> None:
    sweep = replace(FINETUNE, name="mine", space=space)  # type: ignore[arg-type]
    with pytest.raises(UserError) as refused:
        check_space(sweep, toy())
    assert message in str(refused.value)
