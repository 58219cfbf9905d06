"""Other values for fields of a recipe."""

from dataclasses import replace
from typing import Any

import pytest

from pipelines.config.recipes import toy
from pipelines.config.recipes.thumos import thumos_re2_swin_t_vsgn
from re2tal.backbones.swin import swin_s
from re2tal.errors import UserError
from re2tal.localizers.vsgn import VSGNConfig
from sweeps.suggestions import override, value_of


def test_fields_at_any_depth_change_together() -> None:
    changed = override(
        toy(),
        {
            "seed": 3,
            "optim.clip": 0.5,
            "model.localizer.width": 64,
            "model.localizer.heads": 8,
            "model.frozen": ("backbone.patch_embed",),
            "data.window.fps": None,
        },
    )
    recipe = toy()
    localizer: Any = recipe.model.localizer
    assert changed == replace(
        recipe,
        seed=3,
        optim=replace(recipe.optim, clip=0.5),
        model=replace(
            recipe.model,
            localizer=replace(localizer, width=64, heads=8),
            frozen=("backbone.patch_embed",),
        ),
        data=replace(recipe.data, window=replace(recipe.data.window, fps=None)),
    )


def test_a_component_changes_whole_and_then_in_part() -> None:
    recipe = thumos_re2_swin_t_vsgn()
    changed = override(recipe, {"model.backbone": swin_s(), "model.backbone.drop_path": 0.3})
    assert changed.model.backbone == replace(swin_s(), drop_path=0.3)
    other = override(toy(), {"model.localizer.match_tiou": 0.6, "model.localizer": VSGNConfig()})
    assert other.model.localizer == VSGNConfig(match_tiou=0.6)


def test_nothing_to_change_changes_nothing() -> None:
    assert override(toy(), {}) == toy()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "optim.backbonelr",
            1.0,
            "no field optim.backbonelr: OptimConfig has no 'backbonelr'; did",
        ),
        ("optimizer.lr", 1.0, "no field optimizer.lr: Recipe has no 'optimizer'"),
        ("seed.value", 1, "no field seed.value: a int has no fields"),
        ("model.localizer.match_tiou", 0.6, "ActionFormerConfig has no 'match_tiou'"),
        ("epochs", "many", "epochs cannot be 'many'"),
        ("epochs", 2.5, "epochs cannot be 2.5"),
        ("resume", 1, "resume cannot be 1"),
        ("optim.precision", "float8", "optim.precision cannot be 'float8'"),
        ("model.frozen", ["backbone"], "model.frozen cannot be"),
        ("model.backbone", "swin", "model.backbone cannot be 'swin'"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        override(toy(), {name: value})
    assert message in str(refused.value)


def test_values_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 5 heads"):
        override(toy(), {"model.localizer.heads": 5})


def test_a_value_is_found_by_its_name() -> None:
    assert value_of(toy(), "optim.clip") == toy().optim.clip
    with pytest.raises(UserError, match=r"no field optim\.clap"):
        value_of(toy(), "optim.clap")
