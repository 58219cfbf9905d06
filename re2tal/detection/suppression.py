"""Non-maximum suppression of temporal segments, in pure PyTorch, for one video or many.

The sequential definition, for the detections of one class in one video: take the detection with
the highest score (of equals, the first given), keep it, weaken or remove the others by their
overlap with it, and repeat while the best remaining score reaches the minimum. Here all classes of
all videos do that side by side (`suppression`), so a pass takes as many steps as its largest
class has detections, or `top_k`, and not the sum of all.

Differences from the widespread code (a C++ extension of MMCV's lineage):

- it does not compare the first pick of a class with the minimum score, so that a class always
  has a detection, however weak; here every pick is compared. In hard NMS it drops a score that
  equals the minimum; here such a score stays, as in its soft-NMS;
- it adds 1e-6 to each length, so that identical segments overlap a little less than 1 and
  identical instants not at all; here they overlap fully (`tiou`);
- of equal scores it takes any, as its swaps happen to leave them; here the first given;
- it lets segments vote only when all classes are suppressed together; here `voting` also works with
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

# Elements of a table: the tables of a step then stay in the cache, and memory stays bounded.
_TABLE = 1 << 17

Weaken = Callable[[Tensor, Tensor], None]
"""Change the first, scores `(G, L)`, according to their overlaps `(G, L)` with a taken segment; the
second may be overwritten. No score may rise, and a segment without overlap keeps its score."""


def gaussian(sigma: float) -> Weaken:
    """Soft-NMS (Bodla et al., ICCV 2017, section 3): scores times `exp(-tIoU^2 / sigma)`."""

    def weaken(scores: Tensor, overlaps: Tensor) -> None:
        scores.mul_(overlaps.square_().div_(-sigma).exp_())

    return weaken


def hard(iou: float) -> Weaken:
    """Classic NMS: segments that overlap by at least `iou` are removed."""

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
    """Suppress scores within groups.

    Args:
        segments: `(N, 2)`, finite and not reversed.
        scores: `(N,)`, finite and not negative, of the same precision.
        groups: `(N,)` int64, any numbers.
        weaken: effect of a taken segment on the scores of the others.
        min_score: lowest score that is kept.
        picks: largest number of segments taken in a group.

    Returns:
        `(N,)` remaining score of each segment when it is taken; `REMOVED` if it is not.
    """
    result = torch.full_like(scores, REMOVED)
    # A score too low from the start is never taken, and a segment not taken weakens nothing.
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
    """Group members' indices in order: tables `(G, L)` and masks of their filled places.

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

    A place without a segment, or whose segment was taken, has the score `REMOVED` and ends that
    give an overlap of 0 with anything, by the same arithmetic as elsewhere.
    """

    starts: Tensor
    ends: Tensor
    lengths: Tensor
    scores: Tensor

    @staticmethod
    def empty(shape: torch.Size, *, like: Tensor) -> _Table:
        """Return no segments, in the precision and on the device of `like`."""
        return _Table(*(like.new_full(shape, number) for number in _NOTHING))

    def pop(self, pick: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remove a segment of each group, `pick` `(G, 1)`: starts, ends and lengths `(G, 1)`."""
        fields = (self.starts, self.ends, self.lengths, self.scores)
        start, end, length, _ = (field.gather(1, pick) for field in fields)
        for field, number in zip(fields, _NOTHING, strict=True):
            field.scatter_(1, pick, number)
        return start, end, length


_NOTHING = (float("inf"), float("-inf"), 1.0, REMOVED)


def _take(table: _Table, weaken: Weaken, min_score: float, picks: int) -> Tensor:
    """Take segments until no group has any left; return their scores then, `(G, L)`."""
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

    `instants` says whether there are segments of no length.
    """
    shared = torch.minimum(table.ends, end).sub_(torch.maximum(table.starts, start)).clamp_(min=0)
    union = (table.lengths + length).sub_(shared)
    if not instants:
        return shared.div_(union)
    empty = union == 0  # two instants, which overlap fully or not at all
    same = empty & (table.starts == start)
    return shared.div_(union.add_(empty)).add_(same)


# Pairs of a kept segment and a voter that are compared at a time, which bounds the memory.
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
    """Weighted mean of the segments of its group that overlap each kept segment.

    Args:
        kept: `(K, 2)` segments after suppression.
        kept_groups: `(K,)` groups of `kept`.
        voters: `(N, 2)` segments before suppression, including those kept.
        scores: `(N,)` scores of the voters before suppression: the weights.
        groups: `(N,)` groups of the voters; only segments of the same group vote.
        iou: tIoU from which a segment votes.
        by_overlap: true to multiply the weights by the tIoU.

    Returns:
        `(K, 2)` means; a segment whose voters have no weight at all stays.
    """
    means = [kept[:0]]
    step = max(1, _PAIRS // max(1, len(voters)))
    for part, own in zip(kept.split(step), kept_groups.split(step), strict=True):
        overlap = tiou(part[:, None], voters[None])
        votes = (overlap >= iou) & (own[:, None] == groups[None])
        weights = votes * scores
        if by_overlap:
            weights = weights * overlap
        total = weights.sum(dim=1, keepdim=True)
        weighed = total > 0
        # Not a matrix product: its rounding may depend on where its operands lie in memory.
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
            the scores of the others by `exp(-tIoU^2 / sigma)`; "hard": the others go when their
            tIoU reaches `iou`; "none": nothing is suppressed.
        sigma: width of the Gaussian ("soft" only).
        iou: overlap from which a detection is removed ("hard" only).
        per_class: true to suppress within each class, false among all detections (for proposals).
        min_score: lowest score that is kept, also of those that soft-NMS has weakened.
        min_duration: shortest duration that is kept, in the unit of the segments; shorter and
            reversed detections are dropped first.
        top_k: largest number of detections of a video, the best of all classes together.
        voting: weights for moving a kept segment to the weighted mean of the segments that overlap
            it by at least `voting_iou`, itself included: "score_tiou" is score x tIoU (as in
            ActionFormer's code), "score" the score (OpenTAD's), "none" leaves the segment. Scores
            are those before suppression. With `per_class` only segments of the same class vote; the
            published recipes vote without it.
        voting_iou: tIoU from which a segment votes.

    Raises:
        ValueError: a name is unknown, or a number is nan or out of its range; it lists them all.
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
        # Comparisons with nan are false, so that it is out of every range.
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
    """Thin out the detections of one video.

    Deterministic: of equal scores the one given first is taken first, and the result lists equal
    scores in the order given.

    Args:
        detections: N detections in any unit, on any device.
        config: settings of the suppression.

    Returns:
        At most `config.top_k` detections by falling score, on the same device and in the same
        precision.

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
    """Thin out the detections of many videos in one pass.

    The result for a video is that of `nms` for it alone, bit for bit. Beside input and output it
    needs memory for a table of bounded size and for the detections of all videos once more.

    Args:
        detections: detections of each video, by id or in order.
        config: settings of the suppression within each video.

    Returns:
        Remaining detections of each video, in the form given.

    Raises:
        ValueError: a segment is not finite, or a score is not finite or negative, naming the video;
            or the videos lie on different devices or have different precisions.
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
    """Detections of V videos, one after the other, and the index `(N,)` of each one's video."""

    detections: Detections
    videos: Tensor
    count: int

    def pick(self, index: Tensor) -> _Pool:
        """Select by an index `(M,)` or a mask `(N,)`."""
        return _Pool(self.detections[index], self.videos[index], self.count)

    def parts(self) -> Iterator[slice]:
        """Slices of the videos' detections."""
        first = 0
        for size in self.videos.bincount(minlength=self.count).tolist():
            yield slice(first, first + size)
            first += size


def _joined(names: list[str], videos: list[Detections]) -> _Pool:
    """Join all `videos` in one pool, after a check that they can be."""
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
    """Detections that are long enough, in one precision and at least float32."""
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
    """`(N,)` numbers that are equal for detections that suppress one another."""
    if not config.per_class:
        return pool.videos
    classes, of_class = pool.detections.labels.unique(return_inverse=True)
    numbers: Tensor = pool.videos * len(classes) + of_class
    return numbers


def _suppressed(found: Detections, groups: Tensor, config: NmsConfig) -> Tensor:
    """`(N,)` scores after suppression."""
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
    """Indices of the kept detections: video by video, by falling score."""
    kept = ((scores >= config.min_score) & scores.isfinite()).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    kept = kept[pool.videos[kept].argsort(stable=True)]
    counts = pool.videos[kept].bincount(minlength=pool.count)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.arange(len(kept), device=kept.device) - first
    return kept[rank < config.top_k]


def _voted(
    kept: _Pool, kept_groups: Tensor, pool: _Pool, groups: Tensor, config: NmsConfig
) -> Tensor:
    """Kept segments after voting, `(K, 2)`, computed video by video.

    A sum over more addends than a video has would be rounded in another order, and the result of a
    video must not depend on the others.
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
