"""Pretrain a small plain backbone on the trimmed toy clips, from random weights.

  python pipelines/pretrain_toy.py
  python pipelines/pretrain_toy.py --steps 400

The first command made the weights of the toy recipe's Swin that the repository ships. Clips are
made in data/toy_trimmed if they are missing.

Other backbones are pretrained by finetune_backbone.py without rewiring, on classes alone. From
random weights, though, these teach a network motion very slowly: after 700 steps it was still at
chance. So this network also learns the actor's place and motion, which the toy data know, and with
them it is over 80 % right after 350 steps.

"held out" is measured on the validation clips, which look like the untrimmed toy videos.
"""

import tyro

from pipelines.training.pretraining import PretrainingConfig, pretrain

if __name__ == "__main__":
    pretrain(tyro.cli(PretrainingConfig, description=__doc__))
