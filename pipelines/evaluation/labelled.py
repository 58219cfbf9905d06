"""Detections of a file or a detector, with the classes of the annotations they are held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipelines.model import ACTION
from pipelines.plan import Plan, RecipeError
from re2tal.detection.files import read_detections
from re2tal.detection.segments import Detections
from re2tal.detection.video_scores import fuse_videos


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """What is evaluated against what.

    Attributes:
        plan: the annotated videos; of class-agnostic proposals without video scores, all their
            actions have the one class `ACTION`.
        detections: video id to detections in seconds, with the classes of the plan.
        proposals: video id to the same before an external classifier named their classes.
        remarks: what may surprise, a sentence each.
    """

    plan: Plan
    detections: Mapping[str, Detections]
    proposals: Mapping[str, Detections]
    remarks: tuple[str, ...]


def read_labelled(path: Path, plan: Plan, *, top: int) -> Labelled:
    """Reads detections of the plan's videos; those of other videos are left out.

    Args:
        path: JSON in ActivityNet's form, with the classes of the plan or the one class `ACTION`.
        plan: the videos and classes, and the video scores if there are any.
        top: how many classes each proposal is given by them.

    Raises:
        DetectionFileError: with everything that is wrong in the file.
        RecipeError: if proposals and detections with classes are mixed, or there are video scores
            for the latter.
    """
    names = plan.classes if ACTION in plan.classes else (*plan.classes, ACTION)
    found = read_detections(path, names)
    evaluated = {video.annotation.video_id for video in plan.validation}
    proposals = {video_id: one for video_id, one in found.items() if video_id in evaluated}
    remarks = tuple(_remarks(found, proposals, evaluated))
    if not _agnostic(proposals, names, plan.classes, path):
        if plan.video_scores is not None:
            raise RecipeError(
                f"--video-scores gives proposals their classes, but the detections in {path} have "
                "classes already: leave the scores out."
            )
        return Labelled(plan=plan, detections=proposals, proposals=proposals, remarks=remarks)
    if plan.video_scores is not None:
        fused = fuse_videos(proposals, plan.video_scores, top=top)
        return Labelled(plan=plan, detections=fused, proposals=proposals, remarks=remarks)
    whatever = {
        video_id: replace(one, labels=torch.zeros_like(one.labels))
        for video_id, one in proposals.items()
    }
    return Labelled(
        plan=plan.restricted((ACTION,)), detections=whatever, proposals=whatever, remarks=remarks
    )


def _agnostic(
    proposals: Mapping[str, Detections], names: Sequence[str], classes: Sequence[str], path: Path
) -> bool:
    """Whether all detections have the one class that is none of the annotations'."""
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(p.labels for p in proposals.values())])
    without = labels == names.index(ACTION)
    if ACTION in classes or not without.any():
        return False
    if not without.all():
        raise RecipeError(
            f"{int(without.sum())} of the {len(labels)} detections in {path} have the class "
            f"{ACTION!r} of proposals, the others classes of the annotations: evaluate them apart."
        )
    return True


def _remarks(
    found: Mapping[str, Detections], kept: Mapping[str, Detections], evaluated: set[str]
) -> list[str]:
    """What the file holds too much and what it lacks."""
    remarks = []
    if left_out := len(found) - len(kept):
        remarks.append(f"detections of {left_out} videos that are not of the subset are left out")
    if missing := sorted(evaluated - kept.keys()):
        listed = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        remarks.append(f"{len(missing)} videos of the subset have no detections ({listed})")
    return remarks
