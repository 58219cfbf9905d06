"""Shows what rewiring makes of a backbone, and that its pretrained weights fit before and after.

    python -m re2tal.backbones.rewire swin_t --weights torchvision:swin3d_t/KINETICS400_V1

Nothing is written: rewiring changes connections and no parameter, so finetuning and training take
the pretrained weights as they are, and rewire the backbone that they load them into.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from re2tal.backbones.checkpoint import load_backbone_weights
from re2tal.backbones.convert import BACKBONES
from re2tal.reversible import rewire


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    backbone = BACKBONES[options.backbone]().build()
    try:
        if options.weights is not None:
            load_backbone_weights(backbone, options.weights)
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        report = rewire(backbone)
        if options.weights is not None:
            load_backbone_weights(backbone, options.weights)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    after = backbone.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    sys.stdout.write(f"{report}\n\n{parameters:,} parameters, ")
    sys.stdout.write("each with its name and value\n" if same else "changed\n")
    return 0 if same else 1


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m re2tal.backbones.rewire",
        description=description,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backbone", choices=BACKBONES)
    parser.add_argument("--weights", help="a file, or torchvision:MODEL/WEIGHTS; else random")
    return parser


if __name__ == "__main__":
    sys.exit(main())
