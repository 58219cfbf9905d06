"""What a run trains a detector for: all that the training loop does not know by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pipelines.checkpoints import TrainingState
from pipelines.classification.plan import ClassificationPlan
from pipelines.classification.recipe import ClassificationRecipe
from pipelines.plan import Plan
from pipelines.recipe import Recipe
from re2tal.trained import DetectorSpec
from re2tal.videos.windows import Window

if TYPE_CHECKING:
    from pipelines.loop import Runtime


AnyRecipe: TypeAlias = Recipe | ClassificationRecipe
AnyPlan: TypeAlias = Plan | ClassificationPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an epoch ends with.

    Attributes:
        metrics: name to value, those that MLflow gets.
        write: puts what is to be kept of it into the folder of the checkpoint, on rank 0.
    """

    metrics: dict[str, float]
    write: Callable[[Path], None]


class Task(Protocol):
    """What a detector is trained for. It travels to the workers."""

    @property
    def score(self) -> str:
        """The metric that makes a checkpoint the best."""

    @property
    def recipe(self) -> AnyRecipe:
        """The run's configuration."""

    @property
    def plan(self) -> AnyPlan:
        """What it works on."""

    @property
    def spec(self) -> DetectorSpec:
        """What the detector is built of."""

    def build(self, weights: str | Path | None) -> Any:
        """The detector.

        Args:
            weights: file or name of weights for its backbone, or None.

        Raises:
            ValueError: if the weights do not fit.
        """

    def windows(self, *, stride: int, epoch: int) -> list[Window]:
        """The windows of an epoch, of all workers, in order; a function of seed and epoch.

        Args:
            stride: frames per feature, of the backbone.
            epoch: from 0; each has as many.
        """

    def before_step(self, state: TrainingState, *, done: int, steps: int) -> dict[str, float]:
        """Is called before each step, and may change the detector as a function of the step.

        Args:
            state: of the run.
            done: steps before this one, as many as with today's number of workers all along.
            steps: of an epoch.

        Returns:
            Metrics of the step.
        """

    def evaluate(self, state: TrainingState, runtime: "Runtime", *, steps: int) -> Evaluation:
        """Evaluates the average of an epoch's end; every rank calls it.

        Args:
            state: of the run.
            runtime: gives the frames and shows progress.
            steps: of an epoch.

        Raises:
            UnusableVideosError: if too many videos could not be decoded.
        """
