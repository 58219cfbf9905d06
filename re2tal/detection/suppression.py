"""Non-maximum suppression of temporal segments, in pure PyTorch, for one video or many.

The sequential definition, for the detections of one class in one video: pick the remaining
detection with the highest score (on ties, the first given), keep it, lower or remove the others
according to their overlap with it, and repeat while the best remaining score reaches the minimum.
Here all classes of all videos run in parallel (`suppress`), so the number of steps is that of the
largest class, at most `top_k`, and not the sum over all classes.

Differences from the widespread code (a C++ extension of MMCV's lineage):

- It does not compare the first pick of a class with the minimum score, so a class always has a
  detection, however weak; here every pick is compared. In its hard NMS a score equal to the minimum
  is dropped; here it is kept, as in its soft-NMS.
- It adds 1e-6 to each length, so identical segments overlap slightly less than 1 and identical
  instants not at all; here they overlap fully (`tiou`).
- Its order among equal scores is arbitrary; here the first given is picked first.
- It allows voting only when all classes are suppressed together; here `voting` also works with
  `per_class`, among the segments of the class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from re2tal.detection.segments import Detections, tiou

REMOVED = float("-inf")

# Greatest number of elements of a table, so that a step stays in the cache and memory is bounded.
_TABLE = 1 << 17

Weaken = Callable[[Tensor, Tensor], None]
"""Function that lowers scores `(G, L)` in place, given overlaps `(G, L)` with the picked segments.

It may overwrite the overlaps. No score may rise, and a segment without overlap keeps its score."""


def gaussian(sigma: float) -> Weaken:
    """Soft-NMS (Bodla et al., ICCV 2017, section 3): scores times `exp(-tIoU^2 / sigma)`."""

    def weaken(scores: Tensor, overlaps: Tensor) -> None:
        scores.mul_(overlaps.square_().div_(-sigma).exp_())

    return weaken


def hard(iou: float) -> Weaken:
    """Hard NMS: segments that overlap by at least `iou` are removed."""

    def weaken(scores: Tensor, overlaps: Tensor) -> None:
        # Arithmetic instead of masked assignment, which on a CPU takes as long as all the rest.
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
    """Suppress scores within groups.

    Args:
        segments: `(N, 2)`, finite and not reversed.
        scores: `(N,)`, finite and not negative, of the same precision.
        groups: `(N,)` int64, any numbers.
        weaken: effect of a picked segment on the scores of the others.
        min_score: lowest score that is kept.
        picks: greatest number of picks in a group.

    Returns:
        `(N,)` score of each segment at the time of its pick; `REMOVED` if it is not picked.
    """
    result = torch.full_like(scores, REMOVED)
    # Segments below the minimum are never picked, and what is not picked suppresses nothing.
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
    """Yield tables `(G, L)` of the indices of each group's members, and masks of filled places.

    Groups of similar size share a table, so that little of it is padding.
    """
    _, group, counts = groups.unique(return_inverse=True, return_counts=True)
    by_size = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(by_size)  # the inverse permutation
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
        index[filled] = members[first : first + sum(rows)]  # row by row, as in `members`
        yield index, filled
        row, first = row + len(rows), first + sum(rows)


@dataclass(frozen=True, slots=True)
class _Table:
    """Groups of segments, one per row, all `(G, L)`.

    A place that is empty, or whose segment was picked, has the score `REMOVED`, start +inf and end
    -inf: the usual arithmetic then gives an overlap of 0 with any segment.
    """

    starts: Tensor
    ends: Tensor
    lengths: Tensor
    scores: Tensor

    @staticmethod
    def empty(shape: torch.Size, *, like: Tensor) -> _Table:
        """Make an empty table, in the precision and on the device of `like`."""
        return _Table(*(like.new_full(shape, number) for number in _NOTHING))

    def pop(self, pick: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remove segment `pick` `(G, 1)` of each group; return starts, ends, lengths `(G, 1)`."""
        fields = (self.starts, self.ends, self.lengths, self.scores)
        start, end, length, _ = (field.gather(1, pick) for field in fields)
        for field, number in zip(fields, _NOTHING, strict=True):
            field.scatter_(1, pick, number)
        return start, end, length


# Start, end, length and score of an empty place; length 1 keeps the union above 0.
_NOTHING = (float("inf"), float("-inf"), 1.0, REMOVED)


def _take(table: _Table, weaken: Weaken, min_score: float, picks: int) -> Tensor:
    """Pick segments until no group has any left; return the scores `(G, L)` at their picks."""
    taken = torch.full_like(table.scores, REMOVED)
    instants = bool((table.lengths == 0).any())
    for _ in range(min(taken.shape[1], picks)):
        score, pick = table.scores.max(dim=1, keepdim=True)  # the first one on ties
        going = score >= min_score  # (G, 1)
        if not bool(going.any()):
            break
        # Groups that are done still have a pick, which must not change `taken`.
        taken.scatter_(1, pick, torch.where(going, score, taken.gather(1, pick)))
        weaken(table.scores, _overlaps(table, *table.pop(pick), instants=instants))
    return taken


def _overlaps(
    table: _Table, start: Tensor, end: Tensor, length: Tensor, *, instants: bool
) -> Tensor:
    """Compute `tiou` of a segment `(G, 1)` and its group's `(G, L)`, in fewer operations.

    `instants` is true if there are segments of zero length.
    """
    shared = torch.minimum(table.ends, end).sub_(torch.maximum(table.starts, start)).clamp_(min=0)
    union = (table.lengths + length).sub_(shared)
    if not instants:
        return shared.div_(union)
    empty = union == 0  # two instants, which overlap fully or not at all
    same = empty & (table.starts == start)
    return shared.div_(union.add_(empty)).add_(same)


# Pairs of a kept segment and a voter that are compared at once, which bounds the memory.
_PAIRS = 1 << 21


def vote(
    kept: Tensor,
    kept_groups: Tensor,
    voters: Tensor,
    scores: Tensor,
    groups: Tensor,
    *,
    iou: float,
    by_overlap: bool,
) -> Tensor:
    """Replace each kept segment by the weighted mean of its group's segments that overlap it.

    Args:
        kept: `(K, 2)` segments after suppression.
        kept_groups: `(K,)` groups of `kept`.
        voters: `(N, 2)` segments before suppression, including the kept ones.
        scores: `(N,)` scores of the voters before suppression: the weights.
        groups: `(N,)` groups of the voters; only segments of the same group vote.
        iou: least tIoU of a voter.
        by_overlap: true to multiply the weights by the tIoU.

    Returns:
        `(K, 2)` means; a segment stays if the weights of its voters sum to 0.
    """
    means = [kept[:0]]
    step = max(1, _PAIRS // max(1, len(voters)))
    for part, own in zip(kept.split(step), kept_groups.split(step), strict=True):
        overlap = tiou(part[:, None], voters[None])  # (step, N)
        votes = (overlap >= iou) & (own[:, None] == groups[None])
        weights = votes * scores
        if by_overlap:
            weights = weights * overlap
        total = weights.sum(dim=1, keepdim=True)
        weighed = total > 0
        # Not a matrix product, whose rounding may depend on the memory alignment of its operands.
        sums = torch.stack([(weights * side).sum(dim=1) for side in voters.unbind(dim=1)], dim=1)
        means.append(torch.where(weighed, sums / torch.where(weighed, total, 1), part))
    return torch.cat(means)


Method = Literal["soft", "hard", "none"]
Voting = Literal["none", "score_tiou", "score"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsConfig:
    """Settings of non-maximum suppression for one video.

    Attributes:
        method: "soft": Gaussian soft-NMS (Bodla et al., ICCV 2017, section 3), which multiplies
            the scores of the others by `exp(-tIoU^2 / sigma)`; "hard": others whose tIoU reaches
            `iou` are removed; "none": nothing is suppressed.
        sigma: width of the Gaussian ("soft" only).
        iou: least tIoU at which a detection is removed ("hard" only).
        per_class: true to suppress within each class, false among all detections (for proposals).
        min_score: lowest score that is kept, before and after soft-NMS.
        min_duration: shortest duration that is kept, in the unit of the segments; shorter and
            reversed detections are dropped first.
        top_k: greatest number of detections of a video, the best of all classes together.
        voting: whether a kept segment is moved to the weighted mean of the segments that overlap it
            by at least `voting_iou`, itself included. Weights are score x tIoU ("score_tiou", as in
            ActionFormer's code) or the score ("score", as in OpenTAD's), always before suppression;
            "none" does not move it. With `per_class` only segments of the same class vote; the
            published recipes vote without it.
        voting_iou: least tIoU of a voter.

    Raises:
        ValueError: a name is unknown, or a number is NaN or out of range; the message lists all.
    """

    method: Method = "soft"
    sigma: float = 0.5
    iou: float = 0.5
    per_class: bool = True
    min_score: float = 0.001
    min_duration: float = 0.0
    top_k: int = 200
    voting: Voting = "none"
    voting_iou: float = 0.7

    def __post_init__(self) -> None:
        # Comparisons with NaN are false, so NaN is out of every range.
        ranges = (
            ("method", f"one of {', '.join(get_args(Method))}", self.method in get_args(Method)),
            ("sigma", "above 0", self.sigma > 0),
            ("iou", "above 0 and at most 1", 0 < self.iou <= 1),
            ("min_score", "at least 0 and finite", 0 <= self.min_score < math.inf),
            ("min_duration", "at least 0 and finite", 0 <= self.min_duration < math.inf),
            ("top_k", "at least 1", self.top_k >= 1),
            ("voting", f"one of {', '.join(get_args(Voting))}", self.voting in get_args(Voting)),
            ("voting_iou", "above 0 and at most 1", 0 < self.voting_iou <= 1),
        )
        wrong = [
            f"{name} must be {allowed}, not {getattr(self, name)!r}"
            for name, allowed, fits in ranges
            if not fits
        ]
        if wrong:
            raise ValueError(f"NmsConfig cannot be used: {'; '.join(wrong)}.")


def nms(detections: Detections, config: NmsConfig) -> Detections:
    """Apply non-maximum suppression to the detections of one video.

    Deterministic: among equal scores the first given is picked first, and the result keeps their
    order.

    Args:
        detections: N detections in any unit, on any device.
        config: settings of the suppression.

    Returns:
        At most `config.top_k` detections by falling score, with unchanged device and precision.

    Raises:
        ValueError: a segment is not finite, or a score is not finite or negative.
    """
    return _thin([""], [detections], config)[0]


@overload
def nms_videos(
    detections: Mapping[str, Detections], config: NmsConfig
) -> dict[str, Detections]: ...


@overload
def nms_videos(detections: Sequence[Detections], config: NmsConfig) -> list[Detections]: ...


def nms_videos(
    detections: Mapping[str, Detections] | Sequence[Detections], config: NmsConfig
) -> dict[str, Detections] | list[Detections]:
    """Apply non-maximum suppression to the detections of many videos in one pass.

    Each video's result equals that of `nms`, bit for bit. Beside input and output, this needs
    memory for one more copy of all detections and for a table of bounded size.

    Args:
        detections: detections of each video, by id or in order.
        config: settings of the suppression within each video.

    Returns:
        Remaining detections of each video, in the form given.

    Raises:
        ValueError: a segment is not finite, or a score is not finite or negative; the message names
            the video. Or devices or precisions of the videos differ.
    """
    if isinstance(detections, Mapping):
        names = [f", in video {video_id!r}" for video_id in detections]
        return dict(zip(detections, _thin(names, [*detections.values()], config), strict=True))
    names = [f", in video number {i}" for i in range(len(detections))]
    return _thin(names, list(detections), config)


@torch.no_grad()
def _thin(names: list[str], videos: list[Detections], config: NmsConfig) -> list[Detections]:
    """Suppress the detections of each video; errors name a video by `names`."""
    filled = [i for i, video in enumerate(videos) if len(video)]
    result = [video[:0] for video in videos]
    if filled:
        given = _joined([names[i] for i in filled], [videos[i] for i in filled])
        for i, kept in zip(filled, _thin_pool(given, config), strict=True):
            result[i] = kept
    return result


@dataclass(frozen=True, slots=True)
class _Pool:
    """Detections of V videos, one after the other, and the index `(N,)` of their videos."""

    detections: Detections
    videos: Tensor
    count: int

    def pick(self, index: Tensor) -> _Pool:
        """Select by an index `(M,)` or a mask `(N,)`."""
        return _Pool(self.detections[index], self.videos[index], self.count)

    def parts(self) -> Iterator[slice]:
        """Yield the slice of each video's detections."""
        first = 0
        for size in self.videos.bincount(minlength=self.count).tolist():
            yield slice(first, first + size)
            first += size


def _joined(names: list[str], videos: list[Detections]) -> _Pool:
    """Check all `videos` and join them in one pool."""
    kinds = {f"{v.segments.dtype}, {v.scores.dtype} on {v.scores.device}" for v in videos}
    if len(kinds) > 1:
        raise ValueError(
            "NMS of many videos needs all of them on one device and in one precision, but got "
            f"{'; '.join(sorted(kinds))}."
        )
    pool = Detections.concat(videos)
    sizes = torch.tensor([len(video) for video in videos], device=pool.scores.device)
    of_video = torch.arange(len(videos), device=sizes.device).repeat_interleave(sizes)
    usable = pool.segments.isfinite().all(dim=1) & pool.scores.isfinite() & (pool.scores >= 0)
    if not bool(usable.all()):
        wrong = int((~usable).nonzero()[0, 0])
        raise ValueError(
            f"NMS got a detection that cannot be ranked{names[int(of_video[wrong])]}: segment "
            f"{pool.segments[wrong].tolist()}, score {float(pool.scores[wrong])}. Segments must be "
            "finite; scores too, and not negative (probabilities, not logits)."
        )
    return _Pool(pool, of_video, len(videos))


def _thin_pool(given: _Pool, config: NmsConfig) -> list[Detections]:
    """Suppress the detections of each video of a pool."""
    precisions = given.detections.segments.dtype, given.detections.scores.dtype
    pool = _computable(given, config)
    groups = _groups(pool, config)
    scores = _suppressed(pool.detections, groups, config)
    best = _best(scores, pool, config)
    kept = pool.pick(best)
    segments = kept.detections.segments
    if config.voting != "none":
        segments = _voted(kept, groups[best], pool, groups, config)
    segments, left = segments.to(precisions[0]), scores[best].to(precisions[1])
    labels = kept.detections.labels
    return [
        Detections(segments=segments[part], scores=left[part], labels=labels[part])
        for part in kept.parts()
    ]


def _computable(pool: _Pool, config: NmsConfig) -> _Pool:
    """Select detections of sufficient duration, in a common precision of at least float32."""
    found = pool.detections
    common = torch.promote_types(found.segments.dtype, found.scores.dtype)
    precision = torch.promote_types(common, torch.float32)
    found = Detections(
        segments=found.segments.to(precision),
        scores=found.scores.to(precision),
        labels=found.labels,
    )
    lengths = found.segments[:, 1] - found.segments[:, 0]
    return _Pool(found, pool.videos, pool.count).pick(lengths >= config.min_duration)


def _groups(pool: _Pool, config: NmsConfig) -> Tensor:
    """Number the groups `(N,)` within which detections suppress one another."""
    if not config.per_class:
        return pool.videos
    # by rank among the labels that occur: labels themselves may be any integers
    classes, of_class = pool.detections.labels.unique(return_inverse=True)
    numbers: Tensor = pool.videos * len(classes) + of_class
    return numbers


def _suppressed(found: Detections, groups: Tensor, config: NmsConfig) -> Tensor:
    """Compute the scores `(N,)` after suppression."""
    if config.method == "none":
        return found.scores
    return suppress(
        found.segments,
        found.scores,
        groups,
        weaken=gaussian(config.sigma) if config.method == "soft" else hard(config.iou),
        min_score=config.min_score,
        # The k-th pick of a group is at most the k-th best of its video.
        picks=config.top_k,
    )


def _best(scores: Tensor, pool: _Pool, config: NmsConfig) -> Tensor:
    """Find the indices of the kept detections: video by video, by falling score."""
    kept = ((scores >= config.min_score) & scores.isfinite()).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    kept = kept[pool.videos[kept].argsort(stable=True)]  # stable: within a video by score
    counts = pool.videos[kept].bincount(minlength=pool.count)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)  # first place of each video
    rank = torch.arange(len(kept), device=kept.device) - first
    return kept[rank < config.top_k]


def _voted(
    kept: _Pool, kept_groups: Tensor, pool: _Pool, groups: Tensor, config: NmsConfig
) -> Tensor:
    """Compute the kept segments after voting, `(K, 2)`, video by video.

    A sum over all videos' segments would round in another order, and a video's result must not
    depend on the other videos.
    """
    return torch.cat(
        [
            vote(
                kept.detections.segments[part],
                kept_groups[part],
                pool.detections.segments[all_of_it],
                pool.detections.scores[all_of_it],
                groups[all_of_it],
                iou=config.voting_iou,
                by_overlap=config.voting == "score_tiou",
            )
            for part, all_of_it in zip(kept.parts(), pool.parts(), strict=True)
        ]
    )
