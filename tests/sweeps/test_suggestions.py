"""What a search space gets, and what it is refused."""

from typing import Any

import optuna
import pytest

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from re2tal.errors import UserError
from sweeps.suggestions import Suggestions


def _space(suggest: Suggestions, base: Recipe) -> None:
    suggest.log_float("optim.backbone_lr", 1e-5, 1e-2)
    suggest.number("optim.clip", 0.5, 2.0)
    suggest.integer("model.localizer.levels", 3, 7, step=2)
    if suggest.choice("model.frozen", ((), ("backbone.patch_embed",))):
        suggest.choice("optim.ema", (0.9, 0.99))


def test_without_a_proposer_the_values_are_the_base_s() -> None:
    own = Suggestions(toy())
    _space(own, toy())
    assert own.values == {
        "optim.backbone_lr": toy().optim.backbone_lr,
        "optim.clip": 1.0,
        "model.localizer.levels": 5,
        "model.frozen": (),
    }
    # what Optuna has to propose: primitive values only
    assert own.base_point == {**own.values, "model.frozen": "()"}


def test_optuna_s_proposals_become_values_of_fields() -> None:
    frozen: dict[str, Any] = {
        "optim.backbone_lr": 2e-3,
        "optim.clip": 0.7,
        "model.localizer.levels": 3,
    }
    frozen |= {"model.frozen": "('backbone.patch_embed',)", "optim.ema": 0.99}
    asked = Suggestions(toy(), optuna.trial.FixedTrial(frozen))
    _space(asked, toy())
    assert asked.values == {**frozen, "model.frozen": ("backbone.patch_embed",)}
    assert asked.base_point["optim.ema"] == toy().optim.ema


def test_what_a_space_asks_for_may_depend_on_what_it_got() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(30):
        asked = Suggestions(toy(), study.ask())
        _space(asked, toy())
        assert ("optim.ema" in asked.values) == bool(asked.values["model.frozen"])
        assert 1e-5 <= asked.values["optim.backbone_lr"] <= 1e-2
        seen.add(asked.values["model.localizer.levels"])
    assert seen == {3, 5, 7}


def test_the_base_s_own_value_is_always_among_the_choices() -> None:
    own = Suggestions(toy())
    assert own.choice("optim.ema", (0.5, 0.6)) == toy().optim.ema


def test_values_that_follow_from_others_are_checked_too() -> None:
    asked = Suggestions(toy())
    asked.set("model.weights", "torchvision:swin3d_t/KINETICS400_V1")
    assert asked.values == {"model.weights": "torchvision:swin3d_t/KINETICS400_V1"}
    with pytest.raises(UserError, match=r"model.weights cannot be 3"):
        asked.set("model.weights", 3)


def test_ranges_are_checked_at_both_ends_and_hold_the_base() -> None:
    asked = Suggestions(toy())
    with pytest.raises(UserError, match=r"epochs cannot be 0.5"):
        asked.number("epochs", 0.5, 9)
    with pytest.raises(UserError, match=r"optim.clip of 1.0 is not in the search range.*2 to 3"):
        asked.number("optim.clip", 2.0, 3.0)
    with pytest.raises(UserError, match=r"levels of 5 is not one of 2, 4"):
        asked.integer("model.localizer.levels", 2, 8, step=2)
    with pytest.raises(UserError, match=r"optim.precision cannot be 'float8'"):
        asked.choice("optim.precision", ("float8",))
    asked.number("optim.ema", 0.5, 1.0)
    with pytest.raises(UserError, match=r"asks for optim.ema twice"):
        asked.number("optim.ema", 0.5, 1.0)
