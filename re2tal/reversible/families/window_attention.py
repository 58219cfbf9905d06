"""Attention within windows, with a relative position bias, for processors without fused kernels.

Where the bias of all heads is large, it is never there as a whole, nor is its gradient: a few heads
at a time are taken from the table of offsets, and back to it.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from re2tal.reversible.branches import Places

MASKED = -100
"""Added by torchvision to the scores of tokens that the cyclic shift brought together."""

_LARGE = 2**20
"""Bytes of the bias of all heads from which on it is taken from the table by groups of heads."""

_GROUP = 5 * 2**18
"""Bytes of the scores of a group of heads, which stay in a processor's cache."""

_KEPT = 2**21
"""Bytes of the weights of all heads of a window up to which they are kept for the backward, where
heads have groups. Otherwise they are computed anew, which takes a quarter of the attention's time.
"""


def in_groups(heads: int, tokens: int) -> bool:
    """Tell whether the bias of a window is so large that heads are computed in groups."""
    return 4 * heads * tokens**2 >= _LARGE


@dataclass(frozen=True, slots=True)
class Offsets:
    """Offsets between the tokens of a window.

    Attributes:
        own: window whose offsets are numbered.
        window: window in use; it may be shorter along the first axis.
        index: number of the offset of each pair of tokens of one place of the first axis, without
            that axis, of all pairs in a row; None where nothing is looked up.
    """

    own: tuple[int, ...]
    window: tuple[int, ...]
    index: Tensor | None = None

    @staticmethod
    def of_one_place(index: Tensor, own: tuple[int, ...]) -> Tensor:
        """Choose ``index`` from that of all pairs of the own window."""
        tokens, offsets = prod(own[1:]), prod(2 * length - 1 for length in own[1:])
        pairs = index.view(own[0], tokens, own[0], tokens)[0, :, 0]
        return (pairs - (own[0] - 1) * offsets).flatten()

    def bias(self, rows: Tensor, heads: slice = slice(None)) -> Tensor:
        """Look up the bias of some heads, ``(heads, tokens, tokens)``.

        Only one block of each offset along the first axis is gathered, and then copied.

        Args:
            rows: ``(heads, offsets)``.
            heads: the heads.
        """
        assert self.index is not None
        length, tokens = self.window[0], prod(self.window[1:])
        rows = rows[heads].unflatten(1, (2 * self.own[0] - 1, -1))
        # A key that is one place further on has the next block.
        rows = rows.narrow(1, self.own[0] - length, 2 * length - 1).flip(1)
        blocks = rows.flatten(0, 1).index_select(1, self.index)
        blocks = blocks.view(len(rows), -1, tokens, tokens)
        bias = rows.new_empty(len(rows), length, tokens, length, tokens)
        for query in range(length):
            block = blocks.narrow(1, length - 1 - query, length)
            bias.select(1, query).copy_(block.transpose(1, 2))
        return bias.flatten(3).flatten(1, 2)

    def summed(self, gradient: Tensor) -> Tensor:
        """Sum over the pairs of each offset: ``(heads, tokens, tokens)`` to ``(heads, offsets)``.

        It is the sum over a diagonal of each axis, many times as fast as the scattered additions
        of an index, and always in the same order.
        """
        axes = len(self.window)
        sums = gradient.view(-1, *self.window, *self.window)
        for axis, (own, length) in enumerate(zip(self.own, self.window, strict=True)):
            # (heads, offsets so far, queries.., keys..)
            query, key = 1 + axis, 1 + axes
            shape = list(sums.shape)
            del shape[key]
            shape[query] = 2 * own - 1
            # Sums over pieces are float32 as well, whatever the scores are.
            dtype = torch.promote_types(sums.dtype, torch.float32)
            found = sums.new_zeros(shape, dtype=dtype)
            for place in range(length):
                found.narrow(query, own - 1 - place, length).add_(sums.select(key, place))
            sums = found
        return sums.flatten(1)


class RelativeBias(torch.autograd.Function):
    """Bias between all pairs of tokens of a window, from the table of offsets."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        table: Tensor, index: Tensor, own: tuple[int, ...], window: tuple[int, ...]
    ) -> Tensor:
        """Look up the bias, ``(1, heads, tokens, tokens)``.

        Args:
            table: ``(offsets, heads)`` over all axes of the module's own window.
            index: ``(tokens, tokens)`` of the own window: the row of each pair.
            own: the module's own window.
            window: the window in use; it may be shorter along the first axis.
        """
        tokens = prod(window)
        pairs = index.view(prod(own), prod(own))[:tokens, :tokens]
        return Places(pairs).take(table).permute(2, 0, 1).unsqueeze(0).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Only shapes are needed in the backward."""
        ctx.offsets = Offsets(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Compute the gradient of the table."""
        # FSDP takes gradients of any dtype; those of stored activations have the parameter's.
        found = ctx.offsets.summed(gradients[0][0]).t().to(gradients[0].dtype)
        return found, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Attend with PyTorch's operators, ``(windows, heads, tokens, C / heads)``."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)) + bias
    return torch.matmul(torch.dropout(scores.softmax(-1), dropout, train=dropout > 0), v)


@dataclass(frozen=True, slots=True)
class _Part:
    """Windows and heads that are computed together: all, or some heads of one window."""

    windows: slice
    heads: slice

    def of_qkv(self, qkv: Tensor) -> Tensor:
        """Return ``(3, batch, tokens, C / heads)``; a view, in the memory of `_empty`."""
        return qkv[self.windows, :, :, self.heads].permute(2, 0, 3, 1, 4).flatten(1, 2)

    def of_result(self, y: Tensor) -> Tensor:
        """Return ``(batch, tokens, C / heads)``, likewise."""
        return y[self.windows, :, self.heads].transpose(1, 2).flatten(0, 1)


def _parts(qkv: Tensor, *, grouped: bool) -> list[_Part]:
    windows, tokens, _, heads, _ = qkv.shape
    if not grouped:
        return [_Part(slice(None), slice(None))]
    groups = -(-heads // max(1, _GROUP // (4 * tokens**2)))
    edges = [-(-heads * i // groups) for i in range(groups + 1)]
    parts = [
        _Part(slice(window, window + 1), slice(start, stop))
        for window in range(windows)
        for start, stop in pairwise(edges)
    ]
    # They need the same memory, one after the other; and a prediction meets thousands.
    return parts[:1] if isinstance(qkv, FakeTensor) else parts


def _empty(like: Tensor, *shape: int, grouped: bool) -> Tensor:
    """Make an empty ``(windows, tokens, .., heads, C / heads)``, of which parts are views."""
    if grouped or shape[0] == 1:
        return like.new_empty(shape)
    windows, tokens, *more, heads, width = shape
    memory = like.new_empty(*more, windows, heads, tokens, width)
    return memory.movedim((-4, -2, -3), (0, 1, -2))


class WindowAttention(torch.autograd.Function):
    """Attention of windows, which stores little more than the softmax's results.

    What is large is computed in place. Gradients of gradients pass through `attend`.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, offsets: Offsets | None, apart: Tensor | None
    ) -> Tensor:
        """Attend.

        Args:
            ctx: node of autograd.
            qkv: queries, keys and values, ``(windows, tokens, 3, heads, C / heads)``.
            bias: ``(1, heads, tokens, tokens)``, or with offsets ``(heads, offsets)``.
            offsets: offsets between the tokens of a window, for attention by groups of heads.
            apart: ``(windows or 1, 1, tokens, tokens)``, true for pairs that are masked.

        Returns:
            ``(windows, tokens, heads, C / heads)``.
        """
        grouped, pairs = offsets is not None, qkv.shape[3] * qkv.shape[1] ** 2
        keeps = any(ctx.needs_input_grad) and (not grouped or 4 * pairs <= _KEPT)
        y = _empty(qkv, *qkv.shape[:2], *qkv.shape[3:], grouped=grouped)
        ctx.kept = []
        for part in _parts(qkv, grouped=grouped):
            q, k, v = part.of_qkv(qkv)
            weights = _weights(part, q, k, bias, offsets, apart)
            torch.bmm(weights, v, out=part.of_result(y))
            ctx.kept += [weights] if keeps else []
        if grouped and keeps and isinstance(qkv, FakeTensor):
            others = qkv.shape[0] * qkv.shape[3] - len(ctx.kept[0])
            ctx.kept.append(ctx.kept[0].new_empty(others, *ctx.kept[0].shape[1:]))
        ctx.save_for_backward(qkv, bias)
        ctx.offsets, ctx.apart = offsets, apart
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Compute the gradients of queries, keys, values and bias."""
        qkv, bias = ctx.saved_tensors
        offsets, apart = ctx.offsets, ctx.apart
        if torch.is_grad_enabled():
            y = _plainly(qkv, bias, offsets, apart)
            to_qkv, to_bias = torch.autograd.grad(y, (qkv, bias), gradients[0], create_graph=True)
            return to_qkv, to_bias, None, None
        scale, grouped = qkv.shape[-1] ** -0.5, offsets is not None
        to_qkv = _empty(qkv, *qkv.shape, grouped=grouped)
        dtype = torch.promote_types(bias.dtype, torch.float32)
        to_bias = torch.zeros_like(bias, dtype=dtype) if grouped else bias
        for part in _parts(qkv, grouped=grouped):
            q, k, v = part.of_qkv(qkv)
            # Given back one by one, and computed again by a second backward.
            kept = ctx.kept.pop(0) if ctx.kept else None
            weights = _weights(part, q, k, bias, offsets, apart) if kept is None else kept
            to_q, to_k, to_v = part.of_qkv(to_qkv)
            to_y = part.of_result(gradients[0])
            torch.bmm(weights.transpose(1, 2), to_y, out=to_v)
            to_scores = torch.bmm(to_y, v.transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(
                to_scores, weights, -1, to_scores.dtype, grad_input=to_scores
            )
            del weights, kept
            to_q.baddbmm_(to_scores, k, beta=0, alpha=scale)
            to_k.baddbmm_(to_scores.transpose(1, 2), q, beta=0, alpha=scale)
            if offsets is not None:
                to_bias[part.heads] += offsets.summed(to_scores)
            elif len(qkv) == 1:
                to_bias = to_scores.unsqueeze(0)
            else:
                to_bias = to_scores.unflatten(0, (len(qkv), -1)).sum(0, keepdim=True)
            del to_scores  # before those of the next part
        return to_qkv, to_bias.to(bias.dtype), None, None


def _weights(
    part: _Part,
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    offsets: Offsets | None,
    apart: Tensor | None,
) -> Tensor:
    """Compute the softmax's result, ``(batch, tokens, tokens)``."""
    if offsets is not None:
        scores = offsets.bias(bias, part.heads)
        if apart is not None:
            scores.add_(apart[part.windows if len(apart) > 1 else slice(1)][0], alpha=MASKED)
    elif apart is not None:
        scores = torch.add(bias, apart, alpha=MASKED).flatten(0, 1)
    else:
        scores = bias[0]
    if (apart is None and offsets is None) or len(scores) < len(q):
        scores = scores.repeat(len(q) // len(scores), 1, 1)
    scores.baddbmm_(q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1, out=scores)


def _plainly(qkv: Tensor, bias: Tensor, offsets: Offsets | None, apart: Tensor | None) -> Tensor:
    if offsets is not None:
        bias = offsets.bias(bias).unsqueeze(0)
    if apart is not None:
        bias = torch.add(bias, apart, alpha=MASKED)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attend(q, k, v, bias).transpose(1, 2)
