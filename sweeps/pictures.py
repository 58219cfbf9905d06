"""Pictures of a sweep, drawn by Optuna with matplotlib."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial
from optuna.visualization import matplotlib as draw

from sweeps.sweep import Objective


def pictures(
    study: optuna.Study, objectives: Sequence[Objective], finished: Sequence[FrozenTrial]
) -> dict[str, Figure]:
    """History, importance and parallel coordinates of each objective, and the front of several.

    Args:
        study: the trials.
        objectives: what they were for.
        finished: the trials that came to their end; with fewer than two there is little to draw.

    Returns:
        Name to picture.
    """
    plt.switch_backend("agg")
    figures = {}
    for index, objective in enumerate(objectives):
        many = len(objectives) > 1
        told: dict[str, Any] = {"target_name": objective.title}
        if many:
            told["target"] = _ValueOf(index)
        prefix = f"{objective.metric.rsplit('/', 1)[-1]}_" if many else ""
        figures[f"{prefix}history"] = _figure(draw.plot_optimization_history, study, **told)
        if len(finished) > 1 and _differ([trial.values[index] for trial in finished]):
            # by variance explained; Optuna's default asks what leads to low values only
            figures[f"{prefix}importance"] = _figure(
                draw.plot_param_importances,
                study,
                evaluator=FanovaImportanceEvaluator(seed=0),
                **told,
            )
            figures[f"{prefix}parallel"] = _figure(draw.plot_parallel_coordinate, study, **told)
    if len(objectives) > 1:
        titles = [objective.title for objective in objectives]
        figures["front"] = _figure(draw.plot_pareto_front, study, target_names=titles)
    return figures


class _ValueOf:
    """The value of one objective of a trial."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __call__(self, trial: FrozenTrial) -> float:
        value: float = trial.values[self._index]
        return value


def _differ(values: Sequence[float]) -> bool:
    return len(set(values)) > 1


def _figure(plot: Callable[..., Any], study: optuna.Study, **told: Any) -> Figure:
    with warnings.catch_warnings():
        # a parameter of which all trials that ended have the same value
        warnings.filterwarnings("ignore", "Attempting to set identical", UserWarning)
        axes = np.ravel(plot(study, **told))[0]
    figure: Figure = axes.figure
    figure.set_size_inches(14, 6)
    plt.close(figure)  # pyplot would keep it
    return figure
