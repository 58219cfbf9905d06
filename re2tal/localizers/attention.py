"""Self-attention over time within a local window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length one dense attention with a band mask is faster than blocks (CPU and GPU).
DENSE_LENGTH = 128


def local_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int) -> Tensor:
    """Scaled dot-product attention of each time step to the valid steps near it.

    Step i attends to the valid steps j with `|i - j| <= window // 2`, and always to itself, so
    that the results at padded steps are finite (and mean nothing).

    Args:
        query: `(B, H, T, D)`.
        key: `(B, H, T, D)`.
        value: `(B, H, T, D)`.
        mask: `(B, T)` bool, true at valid steps.
        window: an odd width, or 0 to attend to all valid steps.

    Returns:
        `(B, H, T, D)`.
    """
    length = query.shape[2]
    reach = length if window == 0 else window // 2
    if window == 0 or length <= max(DENSE_LENGTH, 2 * window):
        step = torch.arange(length, device=query.device)
        allowed = _allowed(step[:, None], step[None, :], mask[:, None, :], reach)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None])
    return _attention_in_blocks(query, key, value, mask, reach)


def _allowed(query_step: Tensor, key_step: Tensor, key_mask: Tensor, reach: int) -> Tensor:
    distance = query_step - key_step
    return ((distance.abs() <= reach) & key_mask) | (distance == 0)


def _attention_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, reach: int
) -> Tensor:
    """The same in O(T x window): blocks of queries against the keys of the block and around it.

    A block holds at least twice the reach in queries, so that half or more of what is computed is
    used.
    """
    batch, heads, length, size = query.shape
    block = max(2 * reach, 32)  # tiny blocks do not fill a kernel
    count = -(-length // block)
    tail = count * block - length
    span = block + 2 * reach

    def around(x: Tensor, steps: int) -> Tensor:
        """`(..., T, D)` to `(..., count, span, D)`, from `reach` steps before each block."""
        padded = F.pad(x, (0, 0, reach, reach + tail))
        return padded.unfold(steps, span, block).transpose(-1, -2)

    queries = F.pad(query, (0, 0, 0, tail)).view(batch, heads, count, block, size)
    # SDPA wants four dimensions for its fused kernels: (B x count, H, steps, D).
    queries = queries.transpose(1, 2).flatten(0, 1)
    keys = around(key, 2).transpose(1, 2).flatten(0, 1)
    values = around(value, 2).transpose(1, 2).flatten(0, 1)
    key_mask = around(mask[..., None], 1)[..., 0].flatten(0, 1)[:, None, :]
    query_step = torch.arange(block, device=query.device)[:, None] + reach
    key_step = torch.arange(span, device=query.device)[None, :]
    allowed = _allowed(query_step, key_step, key_mask, reach)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed[:, None])
    out = out.view(batch, count, heads, block, size).transpose(1, 2)
    return out.reshape(batch, heads, count * block, size)[:, :, :length]
