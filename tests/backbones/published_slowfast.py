"""SlowFast once more, from the paper's table 1, with the published names of its weights.

It knows nothing of our modules: weights are made here, of random numbers, and used here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Pair = tuple[str, str]  # names of a convolution and of its norm


@dataclass(frozen=True)
class Shape:
    depths: tuple[int, ...] = (2, 3, 1, 2)
    width: int = 8
    alpha: int = 4
    ratio: int = 4
    fusion_kernel: int = 7
    fusion_norm: bool = False
    stride: int = 4  # frames of a feature


@dataclass(frozen=True)
class Names:
    """Names by pathway (0 is the slow one), stage (from 0), block and convolution (0 to 2)."""

    stem: Callable[[int], Pair]
    lateral: Callable[[int], Pair]  # before a stage
    convolution: Callable[[int, int, int, int], Pair]
    skip: Callable[[int, int], Pair]


def _both(name: str) -> Pair:
    return f"{name}.conv", f"{name}.bn"


_PATHS = ("slow_path", "fast_path")


def _lateral(stage: int) -> Pair:
    return _both(f"slow_path.layer{stage}_lateral" if stage else "slow_path.conv1_lateral")


MMACTION2 = Names(
    stem=lambda path: _both(f"{_PATHS[path]}.conv1"),
    lateral=_lateral,
    convolution=lambda path, stage, block, i: _both(
        f"{_PATHS[path]}.layer{stage + 1}.{block}.conv{i + 1}"
    ),
    skip=lambda path, stage: _both(f"{_PATHS[path]}.layer{stage + 1}.0.downsample"),
)


def _opentad(path: int, stage: int, block: int, i: int) -> Pair:
    inner = "inv_block.Fm" if block else "Fm"
    return _both(f"{_PATHS[path]}.layer{stage + 1}.blocks.{block}.{inner}.conv{i + 1}")


OPENTAD = Names(
    stem=MMACTION2.stem,
    lateral=MMACTION2.lateral,
    convolution=_opentad,
    skip=lambda path, stage: _both(f"{_PATHS[path]}.layer{stage + 1}.blocks.0.downsample"),
)


def _pytorchvideo(path: int, stage: int, block: int, i: int) -> Pair:
    place = f"blocks.{stage + 1}.multipathway_blocks.{path}.res_blocks.{block}.branch2"
    return f"{place}.conv_{'abc'[i]}", f"{place}.norm_{'abc'[i]}"


def _pytorchvideo_skip(path: int, stage: int) -> Pair:
    place = f"blocks.{stage + 1}.multipathway_blocks.{path}.res_blocks.0.branch1"
    return f"{place}_conv", f"{place}_norm"


PYTORCHVIDEO = Names(
    stem=lambda path: (
        f"blocks.0.multipathway_blocks.{path}.conv",
        f"blocks.0.multipathway_blocks.{path}.norm",
    ),
    lateral=lambda stage: (
        f"blocks.{stage}.multipathway_fusion.conv_fast_to_slow",
        f"blocks.{stage}.multipathway_fusion.norm",
    ),
    convolution=_pytorchvideo,
    skip=_pytorchvideo_skip,
)


def random_weights(shape: Shape, names: Names) -> State:
    """Weights of the published layout, without what comes before all names."""
    torch.manual_seed(1)
    state: State = {}

    def add(pair: Pair, outputs: int, inputs: int, kernel: tuple[int, int, int]) -> None:
        fan = inputs * kernel[0] * kernel[1] * kernel[2]
        state[f"{pair[0]}.weight"] = torch.randn(outputs, inputs, *kernel) * (2 / fan) ** 0.5
        if ("fusion" in pair[1] or "lateral" in pair[1]) and not shape.fusion_norm:
            return
        state[f"{pair[1]}.weight"] = 1 + 0.2 * torch.randn(outputs)
        state[f"{pair[1]}.bias"] = 0.2 * torch.randn(outputs)
        state[f"{pair[1]}.running_mean"] = 0.2 * torch.randn(outputs)
        state[f"{pair[1]}.running_var"] = 0.5 + torch.rand(outputs)
        state[f"{pair[1]}.num_batches_tracked"] = torch.tensor(7)

    for path, width in enumerate((shape.width, shape.width // shape.ratio)):
        add(names.stem(path), width, 3, (1 if path == 0 else 5, 7, 7))
        inputs = width
        for stage, depth in enumerate(shape.depths):
            inner = width * 2**stage
            if path == 0:
                fast = inputs // shape.ratio
                add(names.lateral(stage), 2 * fast, fast, (shape.fusion_kernel, 1, 1))
                inputs += 2 * fast
            time = 3 if path == 1 or stage >= 2 else 1  # table 1: res2 and res3 see no time
            add(names.skip(path, stage), 4 * inner, inputs, (1, 1, 1))
            for block in range(depth):
                into = 4 * inner if block else inputs
                add(names.convolution(path, stage, block, 0), inner, into, (time, 1, 1))
                add(names.convolution(path, stage, block, 1), inner, inner, (1, 3, 3))
                add(names.convolution(path, stage, block, 2), 4 * inner, inner, (1, 1, 1))
            inputs = 4 * inner
    return state


def applied(
    state: State, pair: Pair, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1)
) -> Tensor:
    weight = state[f"{pair[0]}.weight"]
    x = F.conv3d(x, weight, stride=stride, padding=[(size - 1) // 2 for size in weight.shape[2:]])
    if f"{pair[1]}.weight" not in state:
        return x
    column = {key: state[f"{pair[1]}.{key}"][:, None, None, None] for key in _STATISTICS}
    centred = (x - column["running_mean"]) / (column["running_var"] + 1e-5).sqrt()
    return centred * column["weight"] + column["bias"]


_STATISTICS = ("running_mean", "running_var", "weight", "bias")


def network(state: State, shape: Shape, names: Names, video: Tensor, *, coupled: bool) -> Tensor:
    """Features of both pathways, averaged over space, at one rate `(B, C, T / stride)`.

    In the coupled form a ReLU ends each branch and none follows a sum; after its first block, a
    stage has two streams, ``x_i = x_{i-2} + F_i(x_{i-1})``, that are averaged at its end.
    """
    paths = [video[:, :, :: shape.alpha], video]
    for path, x in enumerate(paths):
        stem = applied(state, names.stem(path), x, (1, 2, 2)).relu()
        paths[path] = F.max_pool3d(stem, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage in range(len(shape.depths)):
        told = applied(state, names.lateral(stage), paths[1], (shape.alpha, 1, 1))
        told = told.relu() if shape.fusion_norm else told
        paths[0] = torch.cat((paths[0], told), dim=1)
        paths = [
            in_stage(state, shape, names, path, stage, x, coupled=coupled)
            for path, x in enumerate(paths)
        ]
    length = video.shape[2] // shape.stride
    return torch.cat([F.interpolate(x.mean((3, 4)), length, mode="linear") for x in paths], dim=1)


def in_stage(
    state: State, shape: Shape, names: Names, path: int, stage: int, x: Tensor, *, coupled: bool
) -> Tensor:
    stride = (1, 2, 2) if stage else (1, 1, 1)

    def branch(block: int, x: Tensor) -> Tensor:
        x = applied(state, names.convolution(path, stage, block, 0), x).relu()
        middle = names.convolution(path, stage, block, 1)
        x = applied(state, middle, x, (1, 1, 1) if block else stride).relu()
        return applied(state, names.convolution(path, stage, block, 2), x)

    skip = applied(state, names.skip(path, stage), x, stride)
    if not coupled:
        x = (skip + branch(0, x)).relu()
        for block in range(1, shape.depths[stage]):
            x = (x + branch(block, x)).relu()
        return x
    before = last = skip + branch(0, x).relu()
    for block in range(1, shape.depths[stage]):
        before, last = last, before + branch(block, last).relu()
    return (before + last) / 2
