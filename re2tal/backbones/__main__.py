"""Show the table of backbones, convert published weights to ours, or show a rewired backbone.

    python -m re2tal.backbones
    python -m re2tal.backbones convert SOURCE TARGET --backbone swin_t
    python -m re2tal.backbones rewire swin_t --weights torchvision:swin3d_t/KINETICS400_V1

SOURCE is a file of torchvision, mmaction2, PyTorchVideo or OpenTAD, a file or folder of
transformers, or the name of weights of torchvision (torchvision:swin3d_t/KINETICS400_V1) or of the
Hugging Face Hub (hf:MCG-NJU/videomae-base). Training accepts SOURCE too: conversion only makes a
file that loads without PyTorch's pickles, and lists where each weight went. If weights do not fit,
all problems are listed and the exit code is 1.

Rewiring changes connections but no parameters. Finetuning and training load pretrained weights
unchanged and rewire the backbone themselves, so `rewire` only shows the result and writes no file.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.table import backbones
from re2tal.backbones.weights import load_backbone_weights, save_backbone_weights
from re2tal.errors import UserError
from re2tal.reversible import rewire
from re2tal.weights import WeightsMismatchError, without_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command is None:
            return _list()
        return _convert(options) if options.command == "convert" else _rewire(options)
    except WeightsMismatchError as error:
        listed = "".join(f"  {problem}\n" for problem in error.problems)
        sys.stderr.write(f"{str(error).splitlines()[0]}\n{listed}")
    except (UserError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
    return 1


def _list() -> int:
    for name, entry in backbones().items():
        weights = [*entry.weights, *(f"files of {layout.title}" for layout in entry.layouts)]
        try:
            built = without_weights(_shallow(entry.make()).build)
        except UserError as error:  # its library is not installed
            sys.stdout.write(f"{name}: {error}\n")
            continue
        frames = f"{built.multiple} n frames" if built.multiple > 1 else "any number of frames"
        each = f"each {built.temporal_stride}" if built.temporal_stride > 1 else "each frame"
        sys.stdout.write(f"{name}: a {entry.input} of {frames}, a feature for {each}\n")
        sys.stdout.write(f"  mean {entry.mean}, deviation {entry.std}\n")
        sys.stdout.write("".join(f"  weights: {known}\n" for known in weights))
    return 0


def _shallow(config: Any) -> BackboneConfig:
    """Remove blocks that take time to build and do not affect the strides."""
    depths = getattr(config, "depths", None)
    if depths is None:
        shallow: BackboneConfig = config
    else:
        shallow = replace(config, depths=tuple(min(depth, 2) for depth in depths))
    return shallow


def _convert(options: argparse.Namespace) -> int:
    backbone = backbones()[options.backbone].make().build()
    report = load_backbone_weights(backbone, options.source)
    facts = {"layout": report.layout, "source": Path(options.source).name}
    save_backbone_weights(backbone, options.target, facts)
    sys.stdout.write(f"{report}\n{options.target} is written.\n")
    return 0


def _rewire(options: argparse.Namespace) -> int:
    backbone = backbones()[options.backbone].make().build()
    if options.weights is not None:
        load_backbone_weights(backbone, options.weights)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    report = rewire(backbone)
    if options.weights is not None:
        load_backbone_weights(backbone, options.weights)
    after = backbone.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    sys.stdout.write(f"{report}\n\n{parameters:,} parameters, ")
    sys.stdout.write("each with its name and value\n" if same else "changed\n")
    return 0 if same else 1


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m re2tal.backbones",
        description=description,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    convert = commands.add_parser("convert", help="write published weights as safetensors")
    convert.add_argument("source", metavar="SOURCE", help="a file, a folder, or a name")
    convert.add_argument("target", metavar="TARGET", type=Path, help="the .safetensors file")
    convert.add_argument(
        "--backbone", required=True, choices=backbones(), help="backbone of the weights"
    )
    shown = commands.add_parser("rewire", help="show which blocks become reversible")
    shown.add_argument("backbone", choices=backbones())
    shown.add_argument("--weights", help="a file, a folder, or a name; default: random weights")
    return parser


if __name__ == "__main__":
    sys.exit(main())
