"""Example inputs for a block, guessed from the shapes of its parts; `proof.py` tries them."""

import inspect
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 3
_MOST_TOKENS = 4096
_GRIDS = ("thw", "feat_size", "hw_shape", "input_dimensions", "spatial_shape", "size")
_HEIGHTS, _WIDTHS = ("H", "Hp", "h", "height"), ("W", "Wp", "w", "width")
_PIXELS = ("resolution",)
_ROTARY = ("position_embeddings", "rotary_pos_emb", "rotary_embeddings")


def example_inputs(block: nn.Module) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield inputs of the shapes that the parts of a block suggest, and its keyword arguments."""
    like = next(block.parameters(), torch.empty(0))
    generator = torch.Generator(like.device).manual_seed(0)
    _, _, *others = inspect.signature(type(block).forward).parameters.values()
    needed = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [p.name for p in others if p.name in (*_ROTARY, *_PIXELS) and p.name not in needed]
    seen = set[tuple[int, ...]]()
    for shape, grid in _shapes(block):
        if shape in seen or math.prod(shape[1:]) > 2**22:
            continue
        seen.add(shape)
        x = torch.randn(shape, generator=generator, device=like.device)
        given = {name: _argument(name, grid) for name in needed}
        yield x, given
        if wanted:  # optional by the signature, but the forward may need them
            yield x, given | {name: _optional(block, name, x, grid) for name in wanted}


def _optional(block: nn.Module, name: str, x: Tensor, grid: tuple[int, ...]) -> Any:
    if name in _PIXELS:
        patch = vars(block).get("patch_size", 1)
        return tuple(length * patch for length in grid)
    widths = (vars(module).get("head_dim") for module in block.modules())
    width: int = next((w for w in widths if isinstance(w, int)), x.shape[-1])
    angles = torch.linspace(0, 3, x.shape[1] * width, device=x.device).view(x.shape[1], width)
    return angles.cos(), angles.sin()


def _argument(name: str, grid: tuple[int, ...]) -> Any:
    if name in _GRIDS:
        return grid
    if name in _HEIGHTS or name in _WIDTHS:
        return grid[-2 if name in _HEIGHTS else -1]
    return None


def _shapes(block: nn.Module) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield shapes to try, each with its grid of tokens, the likeliest first."""
    planes, volumes = _convolves(block, nn.Conv2d), _convolves(block, nn.Conv3d)
    widths = _widths(block)
    grids = _grids(block)
    lengths = _lengths(block)
    for c in widths:
        for t, (h, w) in product((2, 4) if volumes else (), grids[:3]):
            yield (_BATCH, c, t, h, w), (t, h, w)
            yield (_BATCH, t, h, w, c), (t, h, w)
    kinds = ["channels first", "tokens", "channels last"]
    norms = [m for m in block.modules() if isinstance(m, nn.LayerNorm)]
    if not planes or norms:
        kinds = ["tokens", "channels last", "channels first"]
    for c, kind, (h, w) in product(widths, kinds, grids):
        if kind == "tokens":
            yield (_BATCH, h * w, c), (h, w)
            yield (_BATCH, h * w + 1, c), (h, w)  # with a class token
        else:
            yield (_BATCH, *((c, h, w) if kind == "channels first" else (h, w, c))), (h, w)
    for c, n in product(widths, lengths):
        yield (_BATCH, n, c), (n, 1)
    for c in widths:
        yield (_BATCH, c), (1, 1)


def _convolves(block: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(m, kind) for m in block.modules())


def _widths(block: nn.Module) -> list[int]:
    """List the numbers of channels that the block's first layers take, at most four."""
    found: list[int] = []
    for module in block.modules():
        for name in ("normalized_shape", "num_features", "num_channels", "in_channels"):
            value = getattr(module, name, None)
            if isinstance(value, tuple) and value:
                value = value[-1]
            if isinstance(value, int):
                found.append(value)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            found.append(module.in_features)
        found += [p.numel() for p in module._parameters.values() if p is not None and p.dim() == 1]
    return list(dict.fromkeys(found))[:4]


def _grids(block: nn.Module) -> list[tuple[int, int]]:
    """List grids of tokens ``(h, w)``: the largest from the block's settings, then common ones."""
    found: list[tuple[int, int]] = []
    for module in block.modules():
        for name, value in vars(module).items():
            if not any(word in name for word in ("resolution", "window", "size", "shape")):
                continue
            pair = (value, value) if type(value) is int else value
            if (
                isinstance(pair, tuple | list)
                and len(pair) == 2
                and all(type(v) is int for v in pair)
            ):
                found.append((pair[0], pair[1]))
    found = sorted({g for g in found if 4 <= math.prod(g) <= _MOST_TOKENS}, key=math.prod)
    return list(dict.fromkeys([*found[::-1][:3], (8, 6), (8, 8), (7, 7), *found, (14, 14)]))


def _lengths(block: nn.Module) -> list[int]:
    """List numbers of tokens from shapes of weights, for mixers and position tables."""
    held = (*block.parameters(), *block.buffers())
    return sorted({n for t in held if t.dim() > 1 for n in t.shape if 1 < n <= _MOST_TOKENS})[:40]
