"""Writes published weights as safetensors, with our names, and prints what became of each.

    python -m re2tal.backbones.convert SOURCE TARGET --backbone swin_t

SOURCE is a file of torchvision, mmaction2, PyTorchVideo or OpenTAD, or the name of weights of
torchvision (torchvision:swin3d_t/KINETICS400_V1). Training takes SOURCE itself, too: conversion
makes a file that is loaded without PyTorch's pickles, and shows that everything fits. If anything
does not, all of it is listed and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from re2tal.backbones.checkpoint import load_backbone_weights, save_backbone_weights
from re2tal.backbones.published import WeightsMismatchError
from re2tal.backbones.slowfast import (
    SlowFastConfig,
    pytorchvideo_slowfast_50,
    pytorchvideo_slowfast_101,
    re2_slowfast_101,
    slowfast_50,
    slowfast_101,
    slowfast_toy,
)
from re2tal.backbones.swin import SwinConfig, swin_b, swin_s, swin_t, swin_toy

BACKBONES: dict[str, Callable[[], SwinConfig | SlowFastConfig]] = {
    make.__name__: make
    for make in (
        swin_t,
        swin_s,
        swin_b,
        swin_toy,
        slowfast_50,
        slowfast_101,
        slowfast_toy,
        pytorchvideo_slowfast_50,
        pytorchvideo_slowfast_101,
        re2_slowfast_101,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    backbone = BACKBONES[options.backbone]().build()
    try:
        report = load_backbone_weights(backbone, options.source)
    except WeightsMismatchError as error:
        listed = "".join(f"  {problem}\n" for problem in error.problems)
        sys.stderr.write(f"{str(error).splitlines()[0]}\n{listed}")
        return 1
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    facts = {"layout": report.layout, "source": Path(options.source).name}
    save_backbone_weights(backbone, options.target, facts)
    sys.stdout.write(f"{report}\n{options.target} is written.\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m re2tal.backbones.convert",
        description=description,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a file, or torchvision:MODEL/WEIGHTS")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the .safetensors file")
    parser.add_argument(
        "--backbone", required=True, choices=BACKBONES, help="what the weights are for"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
