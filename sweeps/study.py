"""Optuna's study of a sweep, stored so that a killed sweep can continue."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from pipelines.config.recipe import Recipe
from pipelines.core.metric_names import EPOCH
from re2tal.errors import UserError
from sweeps.constraints import MEASURED, Constraint, excesses, measured
from sweeps.epoch_reports import RUN_ID
from sweeps.suggestions import Suggestions, override
from sweeps.sweep import Sweep, SweepConfig
from sweeps.trial import FINISHED, TrialConfig
from sweeps.warm_start import WARM

_INTERRUPTED = "interrupted"  # attribute of a study: numbers of trials that a kill interrupted
BASE = "base"  # attribute of the trial that trains the base recipe
_TRIED = 100  # random draws that check a space before a sweep
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class SweepSearch(OptunaSearch):
    """Ray Tune's Optuna searcher, which reports pruned trials to Optuna as pruned.

    Ray itself would report them as complete, with the value of their last epoch.

    Args:
        constraints: constraints of the sweep; Optuna gets each trial's violations.
    """

    def __init__(self, *args: Any, constraints: Sequence[Constraint] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._constraints = constraints
        self._told: set[tuple[str, int]] = set()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report a trial's value after an epoch to Optuna, if there is a single objective."""
        epoch = result[EPOCH]
        if isinstance(self.metric, str) and (trial_id, epoch) not in self._told:
            self._told.add((trial_id, epoch))
            self._ot_trials[trial_id].report(result[self.metric], epoch)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report the end of a trial to Optuna, with its last result."""
        if result and RUN_ID in result:
            self._ot_trials[trial_id].set_user_attr(RUN_ID, result[RUN_ID])
        if result and result.get(FINISHED):
            self._set_measures(self._ot_trials[trial_id], measured(result))
        else:
            if result and EPOCH in result:  # not reported yet: the one at which Ray Tune stopped it
                self.on_trial_result(trial_id, result)
            result = None
        super().on_trial_complete(trial_id, result, error)

    def _set_measures(self, trial: optuna.Trial, values: Mapping[str, float]) -> None:
        trial.set_user_attr(MEASURED, dict(values))
        for text, excess in excesses(self._constraints, values).items():
            trial.set_constraint(text, excess)


def check_space(sweep: Sweep, base: Recipe) -> dict[str, Any]:
    """Draw from a space many times, so that an error in it is found before the sweep starts.

    Returns:
        Optuna's proposals for the base recipe.

    Raises:
        UserError: the space names a field that does not exist, or values that the field cannot
            have; the message names the field.
    """
    own = Suggestions(base)
    try:
        sweep.space(own, base)
        override(base, own.values)
        study = optuna.create_study(sampler=RandomSampler(seed=0))
        for _ in range(_TRIED):
            sweep.space(Suggestions(base, study.ask()), base)
    except (ValueError, UserError) as problem:
        raise UserError(f"The search space of {sweep.name}: {problem}") from problem
    if not own.base_point:
        raise UserError(f"The search space of {sweep.name} is empty.")
    return own.base_point


# packages that samplers need in addition to Optuna
_OPTIONAL = {"cmaes": ("cmaes",), "auto": ("optunahub", "cmaes")}


def check_sampler(sweep: Sweep, config: SweepConfig) -> None:
    """Check that the sampler is installed, and supports the sweep's objectives and constraints.

    Raises:
        UserError: it is not, or does not.
    """
    missing = [name for name in _OPTIONAL.get(config.sampler, ()) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--sampler {config.sampler} needs {' and '.join(missing)}, not installed here: "
            f"`pip install {' '.join(missing)}`, or use another sampler."
        )
    if config.sampler == "cmaes" and (len(sweep.objectives) > 1 or config.constraint):
        raise UserError(
            "--sampler cmaes supports only one objective and no constraints: use tpe or gp."
        )


def sampler_of(config: SweepConfig, existing: int = 0) -> BaseSampler:
    """Make the sampler that a configuration names.

    Args:
        config: configuration of the sweep.
        existing: number of trials in the study.

    Raises:
        UserError: OptunaHub's sampler cannot be loaded.
    """
    # another seed for a continued sweep, which would otherwise draw the same values again
    seed, by_chance = config.seed + existing, max(4, min(10, config.trials // 3))
    if config.sampler == "random":
        return RandomSampler(seed=seed)
    if config.sampler == "gp":  # conditional parameters are drawn at random
        return GPSampler(seed=seed, n_startup_trials=by_chance, warn_independent_sampling=False)
    if config.sampler == "cmaes":
        return CmaEsSampler(seed=seed, n_startup_trials=by_chance, warn_independent_sampling=False)
    if config.sampler == "auto":
        return _auto(seed)
    return TPESampler(seed=seed, n_startup_trials=by_chance)


def _auto(seed: int) -> BaseSampler:
    import optunahub  # optional: see `_OPTIONAL`

    try:  # from OptunaHub's registry, or the local copy of an earlier use
        loaded = optunahub.load_module("samplers/auto_sampler")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"--sampler auto: OptunaHub's auto sampler cannot be loaded ({reason}). Its registry "
            "must be reachable at the first use: connect to it, or use another sampler."
        ) from error
    sampler: BaseSampler = loaded.AutoSampler(seed=seed)
    return sampler


def open_study(
    sweep: Sweep,
    config: SweepConfig,
    *,
    storage: BaseStorage,
    name: str,
    base_point: Mapping[str, Any],
    earlier: Sequence[FrozenTrial] = (),
) -> optuna.Study:
    """Open the study of a sweep, or create it with the base recipe as its first trial.

    Trials that a kill interrupted are tried again first. `base_point` comes from `check_space`, and
    `earlier`, the trials of an earlier sweep for a new study, from `trials_of`.
    """
    directions: list[Literal["maximize", "minimize"]]
    directions = ["maximize" if o.mode == "max" else "minimize" for o in sweep.objectives]
    study = optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True
    )
    trials = study.get_trials(deepcopy=False)
    study.sampler = sampler_of(config, len(trials))
    if not trials:
        study.enqueue_trial(dict(base_point))
        study.add_trials(earlier)
        if earlier:
            print(f"starting from {len(earlier)} trials of the sweep {earlier[0].user_attrs[WARM]}")
    interrupted = [trial for trial in trials if trial.state == TrialState.RUNNING]
    for trial in interrupted:
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    numbers = [trial.number for trial in interrupted]
    study.set_user_attr(_INTERRUPTED, [*study.user_attrs.get(_INTERRUPTED, ()), *numbers])
    return study


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """List the trials of a sweep that finished, were pruned or failed.

    Trials of an earlier sweep (`--warm-start`) are not listed.
    """
    interrupted = study.user_attrs.get(_INTERRUPTED, ())
    trials = study.get_trials(deepcopy=False, states=_ENDED)
    own = (trial for trial in trials if WARM not in trial.user_attrs)
    return [trial for trial in own if trial.number not in interrupted]


def searcher(
    sweep: Sweep,
    study: optuna.Study,
    base: Recipe,
    *,
    storage: BaseStorage,
    constraints: Sequence[Constraint] = (),
) -> SweepSearch:
    """Make the searcher that proposes an open study's trials to Ray Tune."""
    metrics: Sequence[str] = [o.metric for o in sweep.objectives]
    modes: Sequence[str] = [o.mode for o in sweep.objectives]
    several = len(metrics) > 1
    return SweepSearch(
        space=_Proposal(sweep.space, base),
        metric=[*metrics] if several else metrics[0],
        mode=[*modes] if several else modes[0],
        sampler=study.sampler,
        study_name=study.study_name,
        storage=storage,
        constraints=constraints,
    )


class _Proposal:
    """Search space in the form that `OptunaSearch` needs, a picklable function of a trial."""

    def __init__(self, space: Callable[[Suggestions, Recipe], None], base: Recipe) -> None:
        self._space, self._base = space, base

    def __call__(self, trial: optuna.Trial) -> dict[str, TrialConfig]:
        suggestions = Suggestions(self._base, trial)
        self._space(suggestions, self._base)
        point = {name: trial.params[name] for name in suggestions.base_point}
        config = TrialConfig(
            number=trial.number,
            values=suggestions.values,
            point=point,
            base=point == suggestions.base_point,
        )
        if config.base:
            trial.set_user_attr(BASE, value=True)
        return {"trial": config}
