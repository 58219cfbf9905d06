"""Training loop in one process, without Ray: for notebooks, debuggers and tests."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pipelines.config.recipe import RunConfig
from pipelines.data.batches import Batch, decode_batches
from pipelines.data.clip_plan import AnyPlan
from pipelines.data.feature_stream import feature_stream
from re2tal.videos.windows import Window


class LocalRuntime:
    """`Runtime` of one worker that decodes in its own process and keeps everything in memory.

    Attributes:
        history: step and metrics of each call of `log`, in order.
        lines: lines of progress.
    """

    rank = 0
    world_size = 1
    evaluates = True  # no task evaluates beside it

    def __init__(
        self, recipe: RunConfig, plan: AnyPlan, folder: Path, *, device: torch.device | str = "cpu"
    ) -> None:
        """Keep the newest checkpoint of the run in `folder`."""
        self.device = torch.device(device)
        self.history: list[tuple[int, dict[str, float]]] = []
        self.lines: list[str] = []
        self._recipe, self._plan = recipe, plan
        self._checkpoint = folder / "checkpoint"

    def stream(self, windows: Sequence[Window], *, size: int, name: str = "") -> Iterator[Batch]:  # noqa: ARG002
        """Decode windows in this process and yield them in batches, in order."""
        features = feature_stream(self._plan)
        if features is not None:
            return features.batches(windows, batch_size=self._recipe.batch_size)
        return decode_batches(
            windows, self._plan.uris, size=size, batch_size=self._recipe.batch_size
        )

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append to `history`."""
        self.history.append((step, dict(metrics)))

    def say(self, line: str) -> None:
        """Append to `lines`."""
        self.lines.append(line)

    def report(self, metrics: Mapping[str, float], checkpoint: Path) -> None:  # noqa: ARG002
        """Keep the checkpoint, and remove the one before."""
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        shutil.copytree(checkpoint, self._checkpoint)

    def settle(self) -> None:
        """Do nothing: `report` has kept the checkpoint."""

    def preempted(self) -> bool:
        """Return False: this process is on no node that may be preempted."""
        return False

    def checkpoints(self) -> Sequence[AbstractContextManager[Path]]:
        """Return the checkpoint that an earlier run left in the folder, if any."""
        return [nullcontext(self._checkpoint)] if self._checkpoint.exists() else []
