"""Evaluation of a classifier on trimmed videos, shared by the workers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipelines.data import Batch
from re2tal.accuracy import mean_class_accuracy, top_k_accuracy
from re2tal.classifier import Classifier, class_scores
from re2tal.videos.trimmed import TrimmedVideo


@torch.inference_mode()
def score_videos(
    classifier: Classifier, batches: Iterable[Batch]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Averages the scores of the views of each video.

    Args:
        classifier: in evaluation mode.
        batches: views; a video's may lie in several batches.

    Returns:
        Video id to its mean probabilities `(K,)`, float64, over the views that could be decoded;
        video id to reason where one could not.
    """
    device = next(classifier.parameters()).device
    views: dict[str, list[Tensor]] = defaultdict(list)
    failures: dict[str, str] = {}
    for batch in batches:
        failures |= batch.failures
        scores = class_scores(classifier, batch.frames.to(device), batch.mask.to(device))
        shown = batch.mask.any(dim=1).tolist()
        for window, of_view, there in zip(batch.windows, scores.cpu(), shown, strict=True):
            if there:
                views[window.video_id].append(of_view.double())
    return {video_id: torch.stack(of).mean(dim=0) for video_id, of in views.items()}, failures


def accuracy_metrics(
    scores: Mapping[str, Tensor], videos: Sequence[TrimmedVideo], *, prefix: str
) -> dict[str, float]:
    """How often the classes of videos are recognised.

    Args:
        scores: video id to scores `(K,)`; videos without count nothing.
        videos: with their labels; at least one has scores.
        prefix: of the metrics' names.

    Returns:
        `<prefix>/top1`, `<prefix>/top5`, `<prefix>/mean_class_accuracy`.
    """
    scored = [video for video in videos if video.video_id in scores]
    of_all = torch.stack([scores[video.video_id] for video in scored])
    labels = torch.tensor([video.label for video in scored])
    return {
        f"{prefix}/top1": top_k_accuracy(of_all, labels, 1),
        f"{prefix}/top5": top_k_accuracy(of_all, labels, 5),
        f"{prefix}/mean_class_accuracy": mean_class_accuracy(of_all, labels),
    }
