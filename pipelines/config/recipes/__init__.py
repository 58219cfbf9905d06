"""Recipes of `train.py`: functions that return the complete, typed configuration of a run.

`train.py RECIPE` selects a function by name; `--field.sub value` and sweeps override single fields.
Nothing else configures a run: no file inheritance, no globals.
"""

from collections.abc import Callable

from pipelines.config.recipe import Recipe
from pipelines.config.recipes.activitynet import (
    anet_re2_slowfast_101_actionformer,
    anet_re2_swin_t_actionformer,
    anet_re2_swin_t_vsgn,
    anet_re2_videomae_b_actionformer,
    anet_re2_videomae_l_actionformer,
    anet_re2_videomae_s_actionformer,
    anet_re2_videomae_v2_g_actionformer,
    fineaction_re2_videomae_s_actionformer,
    hacs_re2_videomae_s_actionformer,
)
from pipelines.config.recipes.egocentric import (
    ego4d_re2_videomae_l_actionformer,
    epic100_re2_videomae_l_actionformer,
)
from pipelines.config.recipes.thumos import (
    multithumos_re2_videomae_s_actionformer,
    thumos_re2_slowfast_101_actionformer,
    thumos_re2_swin_t_actionformer,
    thumos_re2_swin_t_tridet,
    thumos_re2_swin_t_vsgn,
    thumos_re2_videomae_b_actionformer,
    thumos_re2_videomae_l_actionformer,
    thumos_re2_videomae_s_actionformer,
    thumos_re2_videomae_v2_g_actionformer,
)
from pipelines.config.recipes.toys import toy, toy_tridet, toy_videomae, toy_vsgn

__all__ = ["RECIPES", "toy"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        toy,
        toy_tridet,
        toy_vsgn,
        toy_videomae,
        thumos_re2_swin_t_actionformer,
        thumos_re2_slowfast_101_actionformer,
        thumos_re2_swin_t_tridet,
        thumos_re2_swin_t_vsgn,
        thumos_re2_videomae_s_actionformer,
        thumos_re2_videomae_b_actionformer,
        thumos_re2_videomae_l_actionformer,
        thumos_re2_videomae_v2_g_actionformer,
        multithumos_re2_videomae_s_actionformer,
        anet_re2_swin_t_actionformer,
        anet_re2_slowfast_101_actionformer,
        anet_re2_swin_t_vsgn,
        anet_re2_videomae_s_actionformer,
        anet_re2_videomae_b_actionformer,
        anet_re2_videomae_l_actionformer,
        anet_re2_videomae_v2_g_actionformer,
        hacs_re2_videomae_s_actionformer,
        fineaction_re2_videomae_s_actionformer,
        epic100_re2_videomae_l_actionformer,
        ego4d_re2_videomae_l_actionformer,
    )
}
