"""Names of the weights of mmaction2's and PyTorchVideo's SlowFasts, and of OpenTAD's Re2SlowFast.

Facts from their sources, beside the names:

- mmaction2 has our names and our network.
- PyTorchVideo's network has a norm and a ReLU after each lateral convolution (`fusion_norm=True`),
  and with 101 layers a `fusion_kernel` of 5: `pytorchvideo_slowfast_50()` and `..._101()`. It was
  trained on frames of mean 0.45 and deviation 0.225 in every colour. Its slow frames are evenly
  spaced from the first to the last; in mmaction2, OpenTAD and here they are every fourth.
- OpenTAD's network is mmaction2's, rewired. Blocks that change the shape cannot be rewired; in
  these, the ReLU is applied to the branch before the sum, as in rewired blocks
  (`relu_before_sum=True`): `re2_slowfast_101()`.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from re2tal.backbones.table import Layout
from re2tal.weights import Colour

_COUNTER = "num_batches_tracked"
_PATHWAYS = ("slow_path", "fast_path")
_CONVOLUTIONS = {"a": "conv1", "b": "conv2", "c": "conv3"}
_PARTS = {"conv": "conv", "norm": "bn"}

_OURS = re.compile(r"(?:slow|fast)_path\.(?:conv1(?:_lateral)?|layer\d(?:_lateral|\.\d+))\..+")

_STEM = re.compile(r"blocks\.0\.multipathway_blocks\.([01])\.(conv|norm)\.(\w+)")
_FUSION = re.compile(r"blocks\.(\d)\.multipathway_fusion\.(conv|norm)(?:_fast_to_slow)?\.(\w+)")
_BRANCH = re.compile(
    r"blocks\.([1-9])\.multipathway_blocks\.([01])\.res_blocks\.(\d+)"
    r"\.branch2\.(conv|norm)_([abc])\.(\w+)"
)
_SKIP = re.compile(
    r"blocks\.([1-9])\.multipathway_blocks\.([01])\.res_blocks\.(\d+)"
    r"\.branch1_(conv|norm)\.(\w+)"
)

_AROUND = re.compile(r"(?:slow|fast)_path\.(?:conv1(?:_lateral)?|layer\d_lateral)\..+")
_COUPLED = re.compile(
    r"((?:slow|fast)_path\.layer\d)\.blocks"
    r"\.(?:(0)\.(?:Fm\.)?|(\d+)\.inv_block\.Fm\.)((?:conv[123]|downsample)\..+)"
)


def _mmaction2(name: str) -> str | None:
    return name if _OURS.fullmatch(name) else None


def _pytorchvideo(name: str) -> str | None:
    if match := _STEM.fullmatch(name):
        pathway, part, leaf = match.groups()
        return f"{_PATHWAYS[int(pathway)]}.conv1.{_PARTS[part]}.{leaf}"
    if match := _FUSION.fullmatch(name):
        stage, part, leaf = match.groups()
        before = "conv1" if stage == "0" else f"layer{stage}"
        return f"slow_path.{before}_lateral.{_PARTS[part]}.{leaf}"
    if match := _BRANCH.fullmatch(name):
        stage, pathway, block, part, letter, leaf = match.groups()
        place = f"{_PATHWAYS[int(pathway)]}.layer{stage}.{block}"
        return f"{place}.{_CONVOLUTIONS[letter]}.{_PARTS[part]}.{leaf}"
    if match := _SKIP.fullmatch(name):
        stage, pathway, block, part, leaf = match.groups()
        place = f"{_PATHWAYS[int(pathway)]}.layer{stage}.{block}"
        return f"{place}.downsample.{_PARTS[part]}.{leaf}"
    return None


def _opentad(name: str) -> str | None:
    if _AROUND.fullmatch(name):
        return name
    if match := _COUPLED.fullmatch(name):
        layer, first, later, part = match.groups()
        return f"{layer}.{first or later}.{part}"
    return None


def _wants_relu_before_sum(backbone: nn.Module, weights: Mapping[str, Tensor]) -> str | None:  # noqa: ARG001
    if getattr(backbone, "relu_before_sum", False):
        return None
    return (
        "the network of these weights has the ReLU before the sum in blocks that change the shape, "
        "this one after it (use re2_slowfast_101(), or relu_before_sum=True)"
    )


MMACTION2_SLOWFAST = Layout(
    title="mmaction2's SlowFast",
    mark=re.compile(r"(|.*\.)slow_path\.layer1\.0\.conv1\.conv\.weight"),
    rename=_mmaction2,
    may_lack=(_COUNTER,),
)

PYTORCHVIDEO_MEAN: Colour = (0.45, 0.45, 0.45)
PYTORCHVIDEO_STD: Colour = (0.225, 0.225, 0.225)
PYTORCHVIDEO_SLOWFAST = Layout(
    title="PyTorchVideo's SlowFast",
    mark=re.compile(r"(|.*\.)blocks\.0\.multipathway_blocks\.0\.conv\.weight"),
    rename=_pytorchvideo,
    classifier=re.compile(r"blocks\.\d+\.proj\."),
    may_lack=(_COUNTER,),
    note="They were trained on frames of mean 0.45 and deviation 0.225 in every colour.",
    mean=PYTORCHVIDEO_MEAN,
    std=PYTORCHVIDEO_STD,
)

OPENTAD_SLOWFAST = Layout(
    title="OpenTAD's Re2SlowFast",
    mark=re.compile(r"(|.*\.)slow_path\.layer1\.blocks\.0\.Fm\.conv1\.conv\.weight"),
    rename=_opentad,
    may_lack=(_COUNTER,),
    note="They were finetuned in the rewired network: rewire the backbone.",
    objection=_wants_relu_before_sum,
)
