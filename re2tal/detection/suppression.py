"""Many groups of segments suppressed side by side: one step takes one segment of every group.

A group is what is suppressed together: the detections of one class in one video. Sequentially,
its best detection (of equals the first) is taken, the others are weakened or removed by how much
they overlap it, and so on. Groups do not see one another, so all of them take a step at once, in
padded tables `(G, L)`. What a row of a table computes depends on nothing beside it: the result of
a group is the same, bit for bit, whatever it is suppressed together with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

REMOVED = float("-inf")

# Elements of a table: the tables of a step then stay in the cache, and memory stays bounded.
_TABLE = 1 << 17

Weaken = Callable[[Tensor, Tensor], Tensor]
"""From scores and overlaps with what was taken, both `(G, L)`, to the scores after it. A score
may fall but not rise, and `REMOVED` must stay."""


def gaussian(sigma: float) -> Weaken:
    """Soft-NMS (Bodla et al., ICCV 2017, section 3): scores times `exp(-tIoU^2 / sigma)`."""

    def weaken(scores: Tensor, overlaps: Tensor) -> Tensor:
        weakened = overlaps.square_().div_(-sigma).exp_().mul_(scores)
        return torch.where(scores == REMOVED, REMOVED, weakened)  # -inf x 0 is no number

    return weaken


def hard(iou: float) -> Weaken:
    """Classic NMS: what overlaps by at least `iou` is removed."""
    return lambda scores, overlaps: scores.masked_fill(overlaps >= iou, REMOVED)


def suppress(
    segments: Tensor,
    scores: Tensor,
    groups: Tensor,
    *,
    weaken: Weaken,
    min_score: float,
    picks: int,
) -> Tensor:
    """Scores after suppression within groups.

    Args:
        segments: `(N, 2)`, finite and not reversed.
        scores: `(N,)`, finite and not negative, of the same precision.
        groups: `(N,)` int64, any numbers.
        weaken: what a taken segment does to the others.
        min_score: a score below it is removed.
        picks: a group's segments that are taken at most.

    Returns:
        `(N,)` what is left of each score when its segment is taken; `REMOVED` if it is not.
    """
    result = torch.full_like(scores, REMOVED)
    # What is too weak from the start is never taken, and what is not taken weakens nothing.
    candidates = (scores >= min_score).nonzero()[:, 0]
    for index, filled in _tables(groups[candidates]):
        members = candidates[index[filled]]
        table = scores.new_full(index.shape, REMOVED)
        table[filled] = scores[members]
        starts, ends = segments.new_zeros(2, *index.shape)
        starts[filled], ends[filled] = segments[members].unbind(dim=1)
        taken = _take(starts, ends, table, weaken, min_score, picks)
        result[members] = taken[filled]
    return result


def _tables(groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of the members of the groups, in order: tables `(G, L)` and where they are filled.

    Groups of like size share a table, so that little of it is padding.
    """
    _, group, counts = groups.unique(return_inverse=True, return_counts=True)
    by_size = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(by_size)
    rank[by_size] = torch.arange(len(by_size), device=groups.device)
    members = rank[group].argsort(stable=True)  # group by group, the largest first
    sizes = counts[by_size].tolist()
    row = first = 0
    while row < len(sizes):
        width = sizes[row]
        rows = sizes[row : row + max(1, _TABLE // width)]
        lengths = torch.tensor(rows, device=groups.device)
        filled = torch.arange(width, device=groups.device) < lengths[:, None]
        index = groups.new_zeros(filled.shape)
        index[filled] = members[first : first + sum(rows)]
        yield index, filled
        row, first = row + len(rows), first + sum(rows)


def _take(
    starts: Tensor, ends: Tensor, scores: Tensor, weaken: Weaken, min_score: float, picks: int
) -> Tensor:
    """Takes segments until no group has any left: the scores they were taken with, `(G, L)`."""
    taken = torch.full_like(scores, REMOVED)
    lengths = ends - starts
    instants = bool(((lengths == 0) & (scores != REMOVED)).any())
    for _ in range(min(scores.shape[1], picks)):
        score, pick = scores.max(dim=1, keepdim=True)  # of equals the first
        going = score >= min_score
        if not bool(going.any()):
            break
        taken.scatter_(1, pick, torch.where(going, score, taken.gather(1, pick)))
        scores.scatter_(1, pick, REMOVED)
        overlaps = _overlaps(starts, ends, lengths, pick, instants=instants)
        scores = weaken(scores, overlaps)
    return taken


def _overlaps(
    starts: Tensor, ends: Tensor, lengths: Tensor, pick: Tensor, *, instants: bool
) -> Tensor:
    """`tiou` of the picked `(G, 1)` with their groups `(G, L)`, in half the operations.

    Padding and groups without segments may get any number.
    """
    start, end = starts.gather(1, pick), ends.gather(1, pick)
    shared = (torch.minimum(ends, end) - torch.maximum(starts, start)).clamp_(min=0)
    union = (lengths + lengths.gather(1, pick)).sub_(shared)
    if not instants:
        return shared.div_(union)
    empty = union == 0
    overlaps = shared.div_(union.masked_fill_(empty, 1))
    return torch.where(empty, (starts == start).to(overlaps.dtype), overlaps)
