"""Results of a sweep: its best trials, their gain, Optuna's pictures, and a training command."""

import json
import shlex
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as draw
from rich.console import Console
from rich.table import Table

from pipelines.core.checkout import script_command
from pipelines.core.metric_log import log_metrics
from pipelines.core.tables import csv_text
from pipelines.core.tracking import Run
from pipelines.diagnostics.findings import without_password
from pipelines.training.results import page_of
from re2tal.errors import UserError
from sweeps.constraints import MEASURED, MEASURES
from sweeps.epoch_reports import RUN_ID
from sweeps.study import BASE, ended
from sweeps.suppression import Postprocessing, search_postprocessing
from sweeps.sweep import Objective, Sweep, SweepConfig
from sweeps.trial import FIRST_STEP, assignment, children

TRIALS, FINISHED_TRIALS = "sweep/trials", "sweep/finished"
_SHOWN = 10
_POSTPROCESSED = 100  # number of settings of post-processing to try


def report(sweep: Sweep, config: SweepConfig, run: Run, study: optuna.Study) -> None:
    """Log the results of a sweep to its MLflow run, and print them.

    Raises:
        UserError: no trial finished, or none satisfies the constraints.
    """
    trials = ended(study)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    counts: dict[str, float] = {
        TRIALS: len(trials),
        FINISHED_TRIALS: len(finished),
        "sweep/pruned": sum(trial.state == TrialState.PRUNED for trial in trials),
        "sweep/failed": sum(trial.state == TrialState.FAIL for trial in trials),
    }
    of_trials = children(run)
    metrics = [child.data.metrics for child in of_trials]
    overhead = [of_trial[FIRST_STEP] for of_trial in metrics if FIRST_STEP in of_trial]
    if overhead:
        counts[FIRST_STEP] = statistics.median(overhead)
    log_metrics(run, counts, step=0)
    run.client.log_text(run.run_id, _csv(sweep.objectives, trials), "trials.csv")
    if not finished:
        errors = [child.data.tags["error"] for child in of_trials if "error" in child.data.tags]
        first = f" The first error: {errors[0].splitlines()[0]}" if errors else ""
        raise UserError(
            f"No trial finished: {_counted(counts)}.{first} Correct it, and give the same "
            f"command again: it begins a new sweep. The MLflow run is {run.run_id} in {run.uri}."
        )
    for name, figure in pictures(study, sweep.objectives, finished).items():
        whole = {"bbox_inches": "tight"}  # names of parameters are long
        place = f"pictures/{name}.png"
        run.client.log_figure(run.run_id, figure, place, save_kwargs=whole)
    best = best_trials(study, sweep.objectives, finished)
    if not best:
        raise UserError(
            f"No trial satisfies {' and '.join(config.constraint)}: {_nearest(config, finished)}. "
            "Give the same command with more --trials to continue, or another --constraint. The "
            f"MLflow run is {run.run_id} in {run.uri}."
        )
    base = next((t for t in finished if BASE in t.user_attrs), None)
    log_metrics(run, _results(sweep.objectives, best, base), step=0)
    found = _postprocessing(sweep, config, run, best[0])
    command = command_of(config, best[0], found)
    chosen = {
        "run": best[0].user_attrs[RUN_ID],
        "score": dict(zip((o.metric for o in sweep.objectives), best[0].values, strict=True)),
        "values": best[0].params,
        "command": command,
    }
    run.client.log_text(run.run_id, json.dumps(chosen, indent=2), "best.json")
    run.client.set_tag(run.run_id, "best.run", chosen["run"])
    for name, value in best[0].params.items():
        run.client.set_tag(run.run_id, f"best.{name}", str(value))
    table = _table(sweep, best, base, [one.name for one in config.constraints])
    Console(width=max(100, Console().width)).print(table)
    for label, fact in _facts(sweep, best, base, counts, run, found):
        print(f"{label:<20}{fact}")
    print(f"\ntrain the best in full:\n  {command}")


def best_trials(
    study: optuna.Study, objectives: Sequence[Objective], finished: Sequence[FrozenTrial]
) -> list[FrozenTrial]:
    """Sort the finished trials that satisfy all constraints, the best first.

    With several objectives, only the Pareto front is kept.
    """
    first = objectives[0].mode == "max"
    chosen = [t for t in finished if all(excess <= 0 for excess in t.constraints.values())]
    if len(objectives) > 1:  # in a study of its own: `study` may have trials of an earlier sweep
        own = optuna.create_study(directions=study.directions)
        own.add_trials(chosen)
        chosen = [chosen[trial.number] for trial in own.best_trials]
    return sorted(chosen, key=lambda trial: trial.values[0], reverse=first)


def _nearest(config: SweepConfig, finished: Sequence[FrozenTrial]) -> str:
    """Describe the trial that came nearest to satisfying all constraints, by its measures."""
    nearest = min(finished, key=lambda trial: max(trial.constraints.values()))
    values = nearest.user_attrs.get(MEASURED, {})
    told = (
        f"{one.name} {values[one.name]:.4g} {MEASURES[one.name].unit}".strip()
        if one.name in values
        else f"no {one.name}"
        for one in config.constraints
    )
    return f"trial {nearest.number}, the nearest, reported {', '.join(told)}"


def dashboard(url: str) -> str:
    """Name the storage of Optuna's trials, and the command that shows them in a browser."""
    shown = without_password(url)
    return f"{shown} (optuna-dashboard {shlex.quote(shown)}; pip install optuna-dashboard)"


def _postprocessing(
    sweep: Sweep, config: SweepConfig, run: Run, best: FrozenTrial
) -> Postprocessing | None:
    if not sweep.postprocessing:
        return None
    of = Run(uri=run.uri, run_id=best.user_attrs[RUN_ID])
    found = search_postprocessing(of, trials=_POSTPROCESSED, seed=config.seed, parent=run.run_id)
    log_metrics(run, {"best/postprocessed_mAP": found.after}, step=0)
    return found


def command_of(config: SweepConfig, trial: FrozenTrial, found: Postprocessing | None) -> str:
    """Return the command that trains a trial in full, with post-processing if it was searched."""
    words = [*script_command("pipelines/train.py"), "--from-run", trial.user_attrs[RUN_ID]]
    words += ["--epochs", str(config.base.epochs), "--output", config.output]
    if found is not None:
        words += found.options
    return shlex.join(words)


def _results(
    objectives: Sequence[Objective], best: Sequence[FrozenTrial], base: FrozenTrial | None
) -> dict[str, float]:
    metrics = {f"best/{o.metric}": v for o, v in zip(objectives, best[0].values, strict=True)}
    if base is not None:
        for objective, value in zip(objectives, base.values, strict=True):
            metrics[f"base/{objective.metric}"] = value
    return metrics


def _csv(objectives: Sequence[Objective], trials: Sequence[FrozenTrial]) -> str:
    names = sorted({name for trial in trials for name in trial.params})
    metrics = [objective.metric for objective in objectives]
    rows = []
    for trial in trials:
        values = trial.values if trial.state == TrialState.COMPLETE else [None] * len(metrics)
        facts = {"number": trial.number, "state": trial.state.name.lower()}
        found = dict(zip(metrics, values, strict=True))
        told = {**trial.user_attrs.get(MEASURED, {}), **found, **trial.params}
        rows.append({**facts, "run": trial.user_attrs.get(RUN_ID), **told})
    return csv_text(["number", "state", "run", *metrics, *MEASURES, *names], rows)


def _table(
    sweep: Sweep,
    best: Sequence[FrozenTrial],
    base: FrozenTrial | None,
    constrained: Sequence[str],
) -> Table:
    """List the best trials and the base recipe's, with their constrained measures."""
    several = len(sweep.objectives) > 1
    what = "trials of the Pareto front" if several else "best trials"
    table = Table(title=f"{sweep.name}: {what}, each by its best epoch")
    names = list(dict.fromkeys(constrained))
    measures = [", ".join(filter(None, (name, MEASURES[name].unit))) for name in names]
    for heading in ("trial", *(o.title for o in sweep.objectives), *measures, "parameters"):
        table.add_column(heading, justify="left" if heading == "parameters" else "right")
    short = short_names({name for trial in best for name in trial.params})
    shown = [*best[:_SHOWN], *([base] if base is not None and base not in best[:_SHOWN] else [])]
    for trial in shown:
        number = "base" if base is not None and trial.number == base.number else str(trial.number)
        values = [f"{value:.3f}" for value in trial.values]
        found = trial.user_attrs.get(MEASURED, {})
        values += [f"{found[name]:.4g}" if name in found else "-" for name in names]
        params = (assignment(short.get(name, name), v) for name, v in trial.params.items())
        table.add_row(number, *values, ", ".join(params))
    return table


def _counted(counts: Mapping[str, float]) -> str:
    kinds = ("finished", "pruned", "failed")
    return ", ".join(f"{counts[f'sweep/{kind}']:.0f} {kind}" for kind in kinds)


def _facts(
    sweep: Sweep,
    best: Sequence[FrozenTrial],
    base: FrozenTrial | None,
    counts: Mapping[str, float],
    run: Run,
    found: Postprocessing | None,
) -> list[tuple[str, str]]:
    facts = [("trials", _counted(counts))]
    if base is not None and len(sweep.objectives) == 1:
        gained = best[0].values[0] - base.values[0]
        facts.append(("gained", f"{gained:+.3f} over the base recipe's {base.values[0]:.3f}"))
    if found is not None:
        what = f"average mAP {found.before:.3f} to {found.after:.3f} of the best trial's detections"
        facts.append(("post-processing", what))
    if FIRST_STEP in counts:
        facts.append(("to the first step", f"{counts[FIRST_STEP]:.1f} s of a trial (median)"))
    facts.append(("MLflow run", f"{run.run_id} in {run.uri}"))
    facts.append(("its page", page_of(run)))
    return facts


def pictures(
    study: optuna.Study, objectives: Sequence[Objective], finished: Sequence[FrozenTrial]
) -> dict[str, Figure]:
    """Draw each objective's history, importance and parallel coordinates; of several, the front.

    An objective whose finished trials do not differ in value has only a history.
    """
    plt.switch_backend("agg")
    readable = _with_short_names(study, finished)
    figures = {}
    for index, objective in enumerate(objectives):
        many = len(objectives) > 1
        told: dict[str, Any] = {"target_name": objective.title}
        if many:
            told["target"] = _ValueOf(index)
        prefix = f"{objective.metric.rsplit('/', 1)[-1]}_" if many else ""
        history = _figure(draw.plot_optimization_history, study, **told)
        _add_pruned(history, study)
        figures[f"{prefix}history"] = history
        if len(finished) > 1 and _differ([trial.values[index] for trial in finished]):
            # fANOVA: importance by explained variance; Optuna's default looks at low values only
            figures[f"{prefix}importance"] = _figure(
                draw.plot_param_importances,
                readable,
                evaluator=FanovaImportanceEvaluator(seed=0),
                **told,
            )
            parallel = _figure(draw.plot_parallel_coordinate, readable, **told)
            _recolour(parallel, objective)
            figures[f"{prefix}parallel"] = parallel
    if len(objectives) > 1:
        titles = [objective.title for objective in objectives]
        figures["front"] = _figure(draw.plot_pareto_front, study, target_names=titles)
    return figures


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return the shortest ending of each parameter's dotted name that is unique."""
    parts = {name: name.split(".") for name in sorted(names)}
    short = {}
    for name, own in parts.items():
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts.values()) > 1:
            length += 1
        short[name] = ".".join(own[-length:])
    return short


def _with_short_names(study: optuna.Study, finished: Sequence[FrozenTrial]) -> optuna.Study:
    """Copy the finished trials into a study whose parameters have short names.

    Optuna truncates names after twenty characters, which makes names of sibling fields equal.
    """
    short = short_names({name for trial in finished for name in trial.params})
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials(
        optuna.create_trial(
            values=trial.values,
            params={short[name]: value for name, value in trial.params.items()},
            distributions={short[name]: one for name, one in trial.distributions.items()},
        )
        for trial in finished
    )
    return copy


def _add_pruned(history: Figure, study: optuna.Study) -> None:
    """Mark the pruned trials, which Optuna leaves out, at the last score that they reached."""
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    last = [(t.number, t.intermediate_values[t.last_step]) for t in pruned if t.last_step]
    if last:
        axes = history.axes[0]
        axes.scatter(*zip(*last, strict=True), marker="x", color="0.35", label="pruned, last score")
        axes.legend()


def _recolour(parallel: Figure, objective: Objective) -> None:
    """Give each line a visible colour, darker for better trials; Optuna draws the worst in white.

    With several objectives, Optuna does not take their directions into account.
    """
    lines = next(c for c in parallel.axes[0].collections if isinstance(c, LineCollection))
    seen = plt.get_cmap("viridis_r")(np.linspace(0.1, 1, 256))
    lines.set_cmap(ListedColormap(seen if objective.mode == "max" else seen[::-1]))
    for axes in parallel.axes:
        axes.grid(visible=False)
        for label in axes.get_yticklabels():
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    parallel.axes[0].set_facecolor("white")


class _ValueOf:
    """Function from a trial to its value of one objective."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __call__(self, trial: FrozenTrial) -> float:
        value: float = trial.values[self._index]
        return value


def _differ(values: Sequence[float]) -> bool:
    return len(set(values)) > 1


def _figure(plot: Callable[..., Any], study: optuna.Study, **told: Any) -> Figure:
    with warnings.catch_warnings():
        # a parameter may have the same value in all finished trials
        warnings.filterwarnings("ignore", "Attempting to set identical", UserWarning)
        # or no trial satisfies the constraints, so that there is no line of best trials
        warnings.filterwarnings("ignore", "No artists with labels found", UserWarning)
        axes = np.ravel(plot(study, **told))[0]
    figure: Figure = axes.figure
    figure.set_size_inches(14, 6)
    plt.close(figure)  # pyplot would keep it
    return figure
