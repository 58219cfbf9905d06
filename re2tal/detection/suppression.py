"""Many groups of segments suppressed side by side: one step takes one segment of every group.

A group is what is suppressed together: the detections of one class in one video. Sequentially,
its best detection (of equals the first) is taken, the others are weakened or removed by how much
they overlap it, and so on. Groups do not see one another, so all of them take a step at once, in
padded tables `(G, L)`. What a row of a table computes depends on nothing beside it: the result of
a group is the same, bit for bit, whatever it is suppressed together with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

REMOVED = float("-inf")

# Elements of a table: the tables of a step then stay in the cache, and memory stays bounded.
_TABLE = 1 << 17

Weaken = Callable[[Tensor, Tensor], None]
"""Changes the first, scores `(G, L)`, according to their overlaps `(G, L)` with what was taken; the
second is free to be written to. A score must not rise, and what overlaps nothing must stay."""


def gaussian(sigma: float) -> Weaken:
    """Soft-NMS (Bodla et al., ICCV 2017, section 3): scores times `exp(-tIoU^2 / sigma)`."""

    def weaken(scores: Tensor, overlaps: Tensor) -> None:
        scores.mul_(overlaps.square_().div_(-sigma).exp_())

    return weaken


def hard(iou: float) -> Weaken:
    """Classic NMS: what overlaps by at least `iou` is removed."""

    def weaken(scores: Tensor, overlaps: Tensor) -> None:
        # Arithmetic, here and below: on a CPU a masked assignment takes as long as all the rest.
        removed = (overlaps >= iou).to(scores.dtype)
        scores.sub_(removed.mul_(torch.finfo(scores.dtype).max))

    return weaken


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
        table = _Table.empty(index.shape, like=scores)
        table.starts[filled], table.ends[filled] = segments[members].unbind(dim=1)
        table.lengths[filled] = table.ends[filled] - table.starts[filled]
        table.scores[filled] = scores[members]
        result[members] = _take(table, weaken, min_score, picks)[filled]
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


@dataclass(frozen=True, slots=True)
class _Table:
    """Groups of segments, a row each, all `(G, L)`.

    Where there is no segment, or no longer one, the score is `REMOVED` and the ends lie so that
    the overlap with anything is 0, by the same arithmetic as elsewhere.
    """

    starts: Tensor
    ends: Tensor
    lengths: Tensor
    scores: Tensor

    @staticmethod
    def empty(shape: torch.Size, *, like: Tensor) -> _Table:
        """No segments, in the precision and on the device of `like`."""
        return _Table(*(like.new_full(shape, number) for number in _NOTHING))

    def pop(self, pick: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Removes a segment of each group, `pick` `(G, 1)`: starts, ends and lengths `(G, 1)`."""
        fields = (self.starts, self.ends, self.lengths, self.scores)
        start, end, length, _ = (field.gather(1, pick) for field in fields)
        for field, number in zip(fields, _NOTHING, strict=True):
            field.scatter_(1, pick, number)
        return start, end, length


_NOTHING = (float("inf"), float("-inf"), 1.0, REMOVED)


def _take(table: _Table, weaken: Weaken, min_score: float, picks: int) -> Tensor:
    """Takes segments until no group has any left: the scores they were taken with, `(G, L)`."""
    taken = torch.full_like(table.scores, REMOVED)
    instants = bool((table.lengths == 0).any())
    for _ in range(min(taken.shape[1], picks)):
        score, pick = table.scores.max(dim=1, keepdim=True)  # of equals the first
        going = score >= min_score
        if not bool(going.any()):
            break
        taken.scatter_(1, pick, torch.where(going, score, taken.gather(1, pick)))
        weaken(table.scores, _overlaps(table, *table.pop(pick), instants=instants))
    return taken


def _overlaps(
    table: _Table, start: Tensor, end: Tensor, length: Tensor, *, instants: bool
) -> Tensor:
    """`tiou` of a segment `(G, 1)` with those of its group `(G, L)`, in fewer operations.

    Args:
        table: the groups.
        start: where the segments start.
        end: where they end.
        length: how long they are.
        instants: whether there are segments of no length.
    """
    shared = torch.minimum(table.ends, end).sub_(torch.maximum(table.starts, start)).clamp_(min=0)
    union = (table.lengths + length).sub_(shared)
    if not instants:
        return shared.div_(union)
    empty = union == 0  # two instants, which share everything or nothing
    same = empty & (table.starts == start)
    return shared.div_(union.add_(empty)).add_(same)
