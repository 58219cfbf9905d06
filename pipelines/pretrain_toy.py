"""Pretrain a small plain backbone on the trimmed toy clips, from random weights.

  python pipelines/pretrain_toy.py
  python pipelines/pretrain_toy.py --backbone videomae_toy --lr 1e-3
  python pipelines/pretrain_toy.py --steps 400

The first two commands made the weights of the toy recipes' Swin and VideoMAE that the repository
ships. Clips are made in data/toy_trimmed if they are missing.

finetune_backbone.py pretrains other backbones, without rewiring, on class labels alone. From random
weights, however, a network learns motion very slowly from labels: after 700 steps the Swin was
still at chance. This script therefore also supervises the actor's place and motion, which the toy
data provide; then the Swin's accuracy exceeds 80 % after 350 steps.

"held out" is measured on the validation clips, which look like the untrimmed toy videos.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import tyro

from pipelines.config.choices import choices_help, import_own, take
from pipelines.config.command_line import told_shortly
from pipelines.training.pretraining import PretrainingConfig, pretrain
from re2tal.backbones.table import entry_of


def parse(arguments: Sequence[str]) -> PretrainingConfig:
    """Read the configuration of a pretraining from the command line.

    Raises:
        UserError: there is no such backbone or module.
    """
    names, rest = take("--backbone", import_own(arguments))
    default = PretrainingConfig()
    if names:
        default = replace(default, backbone=entry_of(names[-1]).make())
    return tyro.cli(
        PretrainingConfig,
        default=default,
        args=rest,
        description=f"{__doc__}\n\n{choices_help('--backbone')}",
    )


if __name__ == "__main__":
    with told_shortly():
        pretrain(parse(sys.argv[1:]))
