"""Top-k accuracy and mean class accuracy of a classification."""

import torch
from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of classes before the right one; of equal scores the lower class number is first.

    Args:
        scores: `(N, K)`, finite.
        labels: `(N,)` class numbers.

    Returns:
        int64 `(N,)`, 0 where the right class is the best.

    Raises:
        ValueError: scores are not finite, so that their order is undefined.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("Scores of classes must be finite to be compared.")
    right = scores.gather(1, labels[:, None])
    number = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > right) | ((scores == right) & (number < labels[:, None]))
    return before.sum(dim=1)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of samples whose class is among the `k` with the highest scores.

    Args:
        scores: `(N, K)`, N at least 1.
        labels: `(N,)` class numbers.
        k: number of classes in an answer; with fewer classes every answer is right.
    """
    return float((label_ranks(scores, labels) < k).double().mean())


def mean_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of each class that has samples, averaged over these classes.

    Args:
        scores: `(N, K)`, N at least 1.
        labels: `(N,)` class numbers.
    """
    right = (label_ranks(scores, labels) == 0).double()
    there = [right[labels == label].mean() for label in labels.unique()]
    return float(torch.stack(there).mean())
