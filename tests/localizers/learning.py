"""Whether a localizer learns: it is trained on planted segments, and has to find others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from re2tal.detection import NmsConfig, mean_average_precision, nms
from re2tal.localizers import Targets

Planted = Callable[[int, int], tuple[Tensor, list[Targets]]]


def learnt(model: Any, planted: Planted, *, rate: float, steps: int) -> float:
    """Average mAP on unseen samples after a short training, on one thread.

    Args:
        model: a localizer.
        planted: (number of samples, seed) to features `(B, C, T)` and their targets.
        rate: learning rate of AdamW.
        steps: of 8 samples each.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on several
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        for step in range(steps):
            features, targets = planted(8, step)
            mask = torch.ones(8, features.shape[2], dtype=torch.bool)
            losses = model(features, mask, targets)
            optimizer.zero_grad()
            sum(losses.values(), torch.zeros(())).backward()
            optimizer.step()
        features, targets = planted(8, 1000)
        found = [nms(detections, NmsConfig()) for detections in model.eval()(features, mask)]
    finally:
        torch.set_num_threads(before)
    return mean_average_precision(
        {str(i): target for i, target in enumerate(targets)},
        {str(i): detections for i, detections in enumerate(found)},
        num_classes=model.num_classes,
        thresholds=[0.3, 0.5, 0.7],
    ).average
