"""Attention within windows with a relative position bias, for CPUs, which have no fused kernel.

For each window and head (arXiv 2103.14030), with ``N`` tokens of ``d = C / heads`` channels,

    P = softmax(S),    S = Q K^T / sqrt(d) + B + M,    Y = P V

``B`` is the relative position bias, and ``M`` is -100 for pairs of tokens that the cyclic shift
brought together, 0 for others. The gradients, with ``dX`` for that of ``X``, are

    dV = P^T dY,    dP = dY V^T,    dS = P * (dP - rowsum(P * dP)),
    dQ = dS K / sqrt(d),    dK = dS^T Q / sqrt(d),    dB = sum of dS over windows

A large bias is computed for a few heads at a time from its table, and its gradient goes back to the
table at once, so that neither exists for all heads together.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from re2tal.reversible.layouts import Places

MASKED = -100
"""Value that torchvision adds to the scores of tokens that the cyclic shift brought together."""

_LARGE = 2**20
"""Bytes of the bias of all heads from which on heads are computed in groups."""

_GROUP = 5 * 2**18
"""Bytes of the scores of a group of heads, small enough for a processor's cache."""

_KEPT = 2**21
"""With groups of heads: bytes of ``P`` of all heads of a window up to which it is kept for the
backward. A larger one is recomputed, which takes a quarter of the attention's time."""


def in_groups(heads: int, tokens: int) -> bool:
    """Tell whether the bias of a window is so large that heads are computed in groups."""
    return 4 * heads * tokens**2 >= _LARGE  # 4 bytes of float32


@dataclass(frozen=True, slots=True)
class Offsets:
    """Offsets between the tokens of a window, by which the bias table is indexed.

    A window of lengths ``(L_1, L_2, ...)`` has ``(2 L_1 - 1) (2 L_2 - 1) ...`` offsets.

    Attributes:
        own: window of the module, to which the table belongs.
        window: window in use; it may be shorter along the first axis.
        index: offset along the other axes of each pair of tokens at one place of the first axis,
            flattened, ``(L_2^2 L_3^2 ...)``; None if no bias is looked up.
    """

    own: tuple[int, ...]
    window: tuple[int, ...]
    index: Tensor | None = None

    @staticmethod
    def of_one_place(index: Tensor, own: tuple[int, ...]) -> Tensor:
        """Compute ``index`` from the module's own index of all pairs of tokens."""
        tokens, offsets = prod(own[1:]), prod(2 * length - 1 for length in own[1:])
        # Query and key both at place 0 of the first axis, whose offset is stored as own[0] - 1.
        pairs = index.view(own[0], tokens, own[0], tokens)[0, :, 0]
        return (pairs - (own[0] - 1) * offsets).flatten()

    def bias(self, rows: Tensor, heads: slice = slice(None)) -> Tensor:
        """Look up the bias of some heads, ``(heads, tokens, tokens)``.

        The bias depends on the first axis only by the offset ``t_q - t_k``. So one block ``(tokens
        of a place, tokens of a place)`` is gathered per offset, and copied to all its pairs of
        places.

        Args:
            rows: the table, transposed, ``(heads, offsets)``.
            heads: the heads.
        """
        assert self.index is not None
        length, tokens = self.window[0], prod(self.window[1:])
        rows = rows[heads].unflatten(1, (2 * self.own[0] - 1, -1))
        # Only the offsets of the window in use. Flipped, so that the blocks of one query, for keys
        # at places 0, 1, ..., are adjacent.
        rows = rows.narrow(1, self.own[0] - length, 2 * length - 1).flip(1)
        blocks = rows.flatten(0, 1).index_select(1, self.index)
        blocks = blocks.view(len(rows), -1, tokens, tokens)
        # (heads, place of query, its token, place of key, its token)
        bias = rows.new_empty(len(rows), length, tokens, length, tokens)
        for query in range(length):
            block = blocks.narrow(1, length - 1 - query, length)
            bias.select(1, query).copy_(block.transpose(1, 2))
        return bias.flatten(3).flatten(1, 2)

    def summed(self, gradient: Tensor) -> Tensor:
        """Sum over the pairs of each offset: ``(heads, tokens, tokens)`` to ``(heads, offsets)``.

        This is the transpose of `bias`. It sums over the diagonals of one axis after the other,
        which is many times as fast as a scatter-add by index, and has a fixed order.
        """
        axes = len(self.window)
        sums = gradient.view(-1, *self.window, *self.window)
        for axis, (own, length) in enumerate(zip(self.own, self.window, strict=True)):
            # (heads, offsets of axes done, query places of the others, key places of the others)
            query, key = 1 + axis, 1 + axes
            shape = list(sums.shape)
            del shape[key]
            shape[query] = 2 * own - 1
            # At least float32, as the sums over pieces are, whatever the dtype of the scores.
            dtype = torch.promote_types(sums.dtype, torch.float32)
            found = sums.new_zeros(shape, dtype=dtype)
            # A key at `place` and queries at 0 ... length - 1 have the offsets from -place on.
            for place in range(length):
                found.narrow(query, own - 1 - place, length).add_(sums.select(key, place))
            sums = found
        return sums.flatten(1)


class RelativeBias(torch.autograd.Function):
    """Relative position bias of all pairs of tokens, ``B[h, q, k] = table[index[q, k], h]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        table: Tensor, index: Tensor, own: tuple[int, ...], window: tuple[int, ...]
    ) -> Tensor:
        """Look up the bias, ``(1, heads, tokens, tokens)``.

        Args:
            table: ``(offsets, heads)`` over all axes of the module's own window.
            index: row of the table for each pair of tokens of the own window, flattened or not.
            own: the module's own window.
            window: the window in use; it may be shorter along the first axis.
        """
        tokens = prod(window)
        pairs = index.view(prod(own), prod(own))[:tokens, :tokens]
        return Places(pairs).take(table).permute(2, 0, 1).unsqueeze(0).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Keep shapes; the backward needs no values."""
        ctx.offsets = Offsets(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Compute the gradient of the table."""
        # In the dtype of the parameter, as with stored activations: autograd would cast it, but
        # FSDP takes gradients of any dtype.
        found = ctx.offsets.summed(gradients[0][0]).t().to(gradients[0].dtype)
        return found, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute ``softmax(Q K^T / sqrt(d) + bias) V`` with PyTorch's operators.

    Args:
        q: queries, ``(windows, heads, tokens, C / heads)``; keys and values likewise.
        k: keys.
        v: values.
        bias: ``(windows or 1, heads or 1, tokens, tokens)``, masks included.
        dropout: probability of dropout of the attention weights.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)) + bias
    return torch.matmul(torch.dropout(scores.softmax(-1), dropout, train=dropout > 0), v)


@dataclass(frozen=True, slots=True)
class _Part:
    """Windows and heads that are computed together: all, or a group of heads of one window."""

    windows: slice
    heads: slice

    def of_qkv(self, qkv: Tensor) -> Tensor:
        """Return ``(3, windows * heads, tokens, C / heads)``; a view of memory from `_empty`."""
        return qkv[self.windows, :, :, self.heads].permute(2, 0, 3, 1, 4).flatten(1, 2)

    def of_result(self, y: Tensor) -> Tensor:
        """Return ``(windows * heads, tokens, C / heads)``, likewise."""
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
    # On fake tensors one part is enough to predict memory: there may be thousands, and each needs
    # the same.
    return parts[:1] if isinstance(qkv, FakeTensor) else parts


def _empty(like: Tensor, *shape: int, grouped: bool) -> Tensor:
    """Make an empty ``(windows, tokens, ..., heads, C / heads)`` of which parts are views.

    For a part with all windows, heads come before tokens in memory, so that `_Part` can flatten
    windows and heads without a copy.
    """
    if grouped or shape[0] == 1:
        return like.new_empty(shape)
    windows, tokens, *more, heads, width = shape
    memory = like.new_empty(*more, windows, heads, tokens, width)
    return memory.movedim((-4, -2, -3), (0, 1, -2))


class WindowAttention(torch.autograd.Function):
    """Attention within windows as one autograd node, which keeps ``qkv``, the bias and ``P``.

    Scores, masks and softmax use the same memory, and so do ``dP`` and ``dS``. The equations are at
    the top of this file. Gradients of gradients go through `attend`.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, offsets: Offsets | None, apart: Tensor | None
    ) -> Tensor:
        """Compute the attention.

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
        if grouped and keeps and isinstance(qkv, FakeTensor):  # count what the other parts keep
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
            # Taken off the list, so that each P is freed after its part; a second backward
            # recomputes it.
            kept = ctx.kept.pop(0) if ctx.kept else None
            weights = _weights(part, q, k, bias, offsets, apart) if kept is None else kept
            to_q, to_k, to_v = part.of_qkv(to_qkv)
            to_y = part.of_result(gradients[0])
            torch.bmm(weights.transpose(1, 2), to_y, out=to_v)
            to_scores = torch.bmm(to_y, v.transpose(1, 2))
            # In place, from dP to dS.
            torch.ops.aten._softmax_backward_data.out(
                to_scores, weights, -1, to_scores.dtype, grad_input=to_scores
            )
            del weights, kept
            to_q.baddbmm_(to_scores, k, beta=0, alpha=scale)
            to_k.baddbmm_(to_scores.transpose(1, 2), q, beta=0, alpha=scale)
            # The bias is shared by all windows: sum dS over them.
            if offsets is not None:
                to_bias[part.heads] += offsets.summed(to_scores)
            elif len(qkv) == 1:
                to_bias = to_scores.unsqueeze(0)
            else:
                to_bias = to_scores.unflatten(0, (len(qkv), -1)).sum(0, keepdim=True)
            del to_scores  # before the next part makes its own
        return to_qkv, to_bias.to(bias.dtype), None, None


def _weights(
    part: _Part,
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    offsets: Offsets | None,
    apart: Tensor | None,
) -> Tensor:
    """Compute ``P = softmax(Q K^T / sqrt(d) + B + M)``, ``(windows * heads, tokens, tokens)``."""
    if offsets is not None:
        scores = offsets.bias(bias, part.heads)
        if apart is not None:
            scores.add_(apart[part.windows if len(apart) > 1 else slice(1)][0], alpha=MASKED)
    elif apart is not None:
        scores = torch.add(bias, apart, alpha=MASKED).flatten(0, 1)
    else:
        scores = bias[0]
    # Softmax will overwrite the scores. Without masks and offsets they are the bias itself here,
    # and one bias or mask may serve many windows: then copy it, once per window.
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
