"""Video Swin once more, written down from the paper, with the published names of its weights.

It knows nothing of our modules: weights are made here, of random numbers, and used here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    patch: tuple[int, int, int] = (2, 4, 4)
    channels: int = 8
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 2, 4)
    window: tuple[int, int, int] = (2, 3, 3)


def plain_names(stage: int, block: int) -> tuple[str, str]:
    """Names of a block's attention and MLP in mmaction2."""
    name = f"layers.{stage}.blocks.{block}."
    return name, name


def coupled_names(stage: int, block: int) -> tuple[str, str]:
    """Names of a block's attention and MLP in OpenTAD."""
    name = f"layers.{stage}.blocks.{block}.inv_block."
    return f"{name}Fm.", f"{name}Gm."


Names = Callable[[int, int], tuple[str, str]]


def random_weights(shape: Shape, names: Names) -> State:
    """Weights of the published layout, without what comes before all names."""
    torch.manual_seed(1)
    state: State = {}

    def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(outputs)

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(size)
        state[f"{name}.bias"] = 0.2 * torch.randn(size)

    size = shape.channels
    state["patch_embed.proj.weight"] = 0.2 * torch.randn(size, 3, *shape.patch)
    state["patch_embed.proj.bias"] = 0.1 * torch.randn(size)
    norm("patch_embed.norm", size)
    rows = 1
    for side in shape.window:
        rows *= 2 * side - 1
    for stage, depth in enumerate(shape.depths):
        size = shape.channels * 2**stage
        for block in range(depth):
            attention, mlp = names(stage, block)
            norm(f"{attention}norm1", size)
            state[f"{attention}attn.relative_position_bias_table"] = torch.randn(
                rows, shape.heads[stage]
            )
            state[f"{attention}attn.relative_position_index"] = position_index(shape.window)
            linear(f"{attention}attn.qkv", size, 3 * size)
            linear(f"{attention}attn.proj", size, size)
            norm(f"{mlp}norm2", size)
            linear(f"{mlp}mlp.fc1", size, 4 * size)
            linear(f"{mlp}mlp.fc2", 4 * size, size)
        if stage < len(shape.depths) - 1:
            linear(f"layers.{stage}.downsample.reduction", 4 * size, 2 * size, bias=False)
            norm(f"layers.{stage}.downsample.norm", 4 * size)
    norm("norm3", size)
    return state


def position_index(window: tuple[int, int, int]) -> Tensor:
    """Row of the bias table for each pair of places in a window."""
    places = [
        (t, h, w) for t in range(window[0]) for h in range(window[1]) for w in range(window[2])
    ]
    _, height, width = (2 * side - 1 for side in window)
    return torch.tensor(
        [
            [
                ((a[0] - b[0] + window[0] - 1) * height + a[1] - b[1] + window[1] - 1) * width
                + a[2]
                - b[2]
                + window[2]
                - 1
                for b in places
            ]
            for a in places
        ]
    )


def network(state: State, shape: Shape, names: Names, video: Tensor, *, coupled: bool) -> Tensor:
    """Features `(B, C, T / patch[0])`, averaged over space.

    In the coupled form each stage has two streams, ``y1 = x1 + F(x2); y2 = x2 + G(y1)``, that begin
    with its input and are averaged at its end.
    """
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv3d(video, weight, bias, stride=shape.patch).permute(0, 2, 3, 4, 1)
    x = normalised(state, "patch_embed.norm", x)
    for stage, depth in enumerate(shape.depths):
        first = second = x
        for block in range(depth):
            of_attention, of_mlp = names(stage, block)
            shift = [(side // 2) * (block % 2) for side in shape.window]
            heads = shape.heads[stage]
            add = attention(state, of_attention, second, heads, shape.window, shift)
            if coupled:
                first = first + add
                second = second + mlp(state, of_mlp, first)
            else:
                second = second + add
                second = second + mlp(state, of_mlp, second)
        x = (first + second) / 2 if coupled else second
        if stage < len(shape.depths) - 1:
            x = merged(state, f"layers.{stage}.downsample", x)
    return normalised(state, "norm3", x).mean(dim=(2, 3)).transpose(1, 2)


def normalised(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(1))


def mlp(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = linear(state, f"{name}mlp.fc1", normalised(state, f"{name}norm2", x))
    return linear(state, f"{name}mlp.fc2", x * (1 + torch.erf(x / 2**0.5)) / 2)


def merged(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Each square of four places becomes one: upper left, lower left, upper right, lower right."""
    x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
    squares = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return linear(
        state, f"{name}.reduction", normalised(state, f"{name}.norm", torch.cat(squares, -1))
    )


def attention(
    state: Mapping[str, Tensor],
    name: str,
    x: Tensor,
    heads: int,
    window: tuple[int, int, int],
    shift: list[int],
) -> Tensor:
    """Attention within windows, one after the other; shifted windows do not look over the edge."""
    sizes = x.shape[1:4]
    sides = [min(side, size) for side, size in zip(window, sizes, strict=True)]
    moves = [0 if size <= side else m for m, size, side in zip(shift, sizes, window, strict=True)]
    x = normalised(state, f"{name}norm1", x)
    beyond = [-size % side for size, side in zip(sizes, sides, strict=True)]
    x = F.pad(x, (0, 0, 0, beyond[2], 0, beyond[1], 0, beyond[0]))
    padded = x.shape[1:4]
    x = torch.roll(x, [-m for m in moves], (1, 2, 3))
    region = torch.zeros(padded)
    for axis, (size, side, move) in enumerate(zip(padded, sides, moves, strict=True)):
        if move:
            part = torch.zeros(size)
            part[size - side : size - move], part[size - move :] = 1, 2
            region = 3 * region + part.reshape([-1 if a == axis else 1 for a in range(3)])
    out = torch.zeros_like(x)
    for t in range(0, padded[0], sides[0]):
        for h in range(0, padded[1], sides[1]):
            for w in range(0, padded[2], sides[2]):
                where = (slice(t, t + sides[0]), slice(h, h + sides[1]), slice(w, w + sides[2]))
                inside = x[:, *where].flatten(1, 3)
                apart = region[where].flatten()
                seen = within(state, name, inside, heads, apart)
                out[:, *where] = seen.unflatten(1, sides)
    out = torch.roll(out, moves, (1, 2, 3))
    return out[:, : sizes[0], : sizes[1], : sizes[2]]


def within(state: Mapping[str, Tensor], name: str, x: Tensor, heads: int, region: Tensor) -> Tensor:
    """Attention of one window's places `(B, N, C)`, those of different regions kept apart."""
    count, width = x.shape[1], x.shape[2] // heads
    queries, keys, values = linear(state, f"{name}attn.qkv", x).chunk(3, dim=-1)
    index = state[f"{name}attn.relative_position_index"][:count, :count]
    results = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = queries[..., part] @ keys[..., part].transpose(1, 2) / width**0.5
        logits = logits + state[f"{name}attn.relative_position_bias_table"][index, head]
        logits = logits - 100.0 * (region[:, None] != region[None, :])
        results.append(logits.softmax(dim=-1) @ values[..., part])
    return linear(state, f"{name}attn.proj", torch.cat(results, dim=-1))
