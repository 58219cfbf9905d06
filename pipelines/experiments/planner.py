"""The predictions of one profile."""

import copy
from dataclasses import dataclass, field, replace

from re2tal.memory.fit import largest_that_fits
from pipelines.experiments.measured import measured_peak
from pipelines.experiments.subject import Subject
from re2tal.memory.ways import WAYS, residual_blocks
from re2tal.detector import Detector
from re2tal.memory import Breakdown, explain_peak, predict_peak


@dataclass
class Planner:
    """Predicts, and remembers what it has predicted.

    Attributes:
        subject: what is profiled.
    """

    subject: Subject
    _detectors: dict[str, Detector] = field(default_factory=dict)
    _peaks: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def blocks(self) -> list[str]:
        """Names in the detector of the backbone's residual blocks."""
        backbone = self._detector("plain", self.subject.depth).backbone
        return [f"backbone.{name}" for name in residual_blocks(backbone)]

    def explain(self, way: str) -> Breakdown:
        """The peak of the subject's own step.

        Args:
            way: one of `WAYS`.
        """
        work, depth = self.subject.work, self.subject.depth
        found = explain_peak(self._detector(way, depth), *work.inputs(), step=work.step)
        self._peaks[way, work.frames, depth] = found.memory.peak
        return found

    def peak(self, way: str, *, frames: int | None = None, depth: int | None = None) -> int:
        """Bytes at the peak of a step.

        Args:
            way: one of `WAYS`.
            frames: of a window; by default the subject's.
            depth: blocks of the deepest stage; by default the subject's.
        """
        key = way, frames or self.subject.work.frames, depth or self.subject.depth
        if key not in self._peaks:
            work = replace(self.subject.work, frames=key[1])
            detector = self._detector(way, key[2])
            self._peaks[key] = predict_peak(detector, *work.inputs(), step=work.step).peak
        return self._peaks[key]

    def measure(self, way: str) -> int | None:
        """Bytes at the peak of a real step on the GPU; None if it has too few.

        Args:
            way: one of `WAYS`.
        """
        return measured_peak(self._detector(way, self.subject.depth), self.subject.work)

    def frames_that_fit(self, way: str, budget: int) -> int:
        """The longest window, in units of the subject, that fits; 0 if none does.

        Args:
            way: one of `WAYS`.
            budget: bytes.
        """
        unit = self.subject.unit
        return unit * largest_that_fits(
            lambda units: self.peak(way, frames=unit * units),
            budget,
            start=max(1, self.subject.work.frames // unit),
        )

    def against_frames(self, way: str) -> list[tuple[int, int]]:
        """Points of a curve: frames of a window, and bytes.

        Args:
            way: one of `WAYS`.
        """
        unit, frames = self.subject.unit, self.subject.work.frames
        rounded = {max(1, round(share * frames / unit)) * unit for share in (0.25, 0.5, 2.0)}
        return [(n, self.peak(way, frames=n)) for n in sorted(rounded | {frames})]

    def against_depth(self, way: str) -> list[tuple[int, int]]:
        """Points of a curve: blocks of the deepest stage, and bytes.

        Args:
            way: one of `WAYS`.
        """
        depth = self.subject.depth
        return [(n, self.peak(way, depth=n)) for n in (depth, 2 * depth, 3 * depth)]

    def _detector(self, way: str, depth: int) -> Detector:
        if depth != self.subject.depth:
            return self._made(self.subject.build(depth), way)
        if way not in self._detectors:
            plain = self._detectors.setdefault("plain", self.subject.build(depth))
            self._detectors[way] = self._made(copy.deepcopy(plain), way)
        return self._detectors[way]

    def _made(self, plain: Detector, way: str) -> Detector:
        WAYS[way](plain.backbone)
        return plain
