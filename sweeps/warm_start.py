"""Trials of an earlier sweep, from which a new sweep starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from pipelines.config.recipe import Recipe
from pipelines.core.storage import database_file, database_url
from re2tal.errors import UserError
from sweeps.constraints import MEASURED, excesses
from sweeps.suggestions import Primitive, Suggestions
from sweeps.sweep import Sweep, SweepConfig

WARM = "of an earlier sweep"  # attribute of a trial: name of the study that it was copied from


class _OtherSpaceError(Exception):
    """Error of a trial of another sweep that lies outside this sweep's space."""


class _Replayed:
    """Proposer that replays a trial's values, and records the requested distributions."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        found: float = self._of(name, optuna.distributions.FloatDistribution(low, high, log=log))
        return found

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        found: int = self._of(name, optuna.distributions.IntDistribution(low, high, step=step))
        return found

    def suggest_categorical(self, name: str, choices: Sequence[Primitive]) -> Any:
        return self._of(name, optuna.distributions.CategoricalDistribution(choices))

    def _of(self, name: str, asked: Any) -> Any:
        self.distributions[name] = asked
        if name not in self._params:
            raise _OtherSpaceError(f"it has no {name}")
        value = self._params[name]
        try:
            inside = asked._contains(asked.to_internal_repr(value))
        except (TypeError, ValueError):
            inside = False
        if not inside:
            raise _OtherSpaceError(f"{name} of {value} is not in this sweep's space")
        return value


def trials_of(sweep: Sweep, config: SweepConfig, base: Recipe) -> list[FrozenTrial]:
    """List the finished trials of the sweep that `--warm-start` names, if they fit this space.

    Raises:
        UserError: there is no such sweep, it has other objectives, or none of its trials fits.
    """
    assert config.warm_start is not None
    study = _study(config.warm_start, config)
    wanted = ["MAXIMIZE" if one.mode == "max" else "MINIMIZE" for one in sweep.objectives]
    if [direction.name for direction in study.directions] != wanted:
        raise UserError(
            f"--warm-start {config.warm_start}: that sweep has {len(study.directions)} objectives, "
            f"this one {len(wanted)}, or their directions (max, min) differ. Name a sweep with the "
            "same objectives."
        )
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    fitting, reasons = [], []
    for trial in finished:
        try:
            fitting.append(_fitted(trial, sweep, config, base, study.study_name))
        except _OtherSpaceError as reason:
            reasons.append(str(reason))
    if not fitting:
        why = f"{len(finished)} finished; the first: {reasons[0]}" if reasons else "none finished"
        raise UserError(
            f"--warm-start {config.warm_start}: no trial of that sweep fits this one ({why}). "
            "Name a sweep of the same script around a recipe of the same kind."
        )
    if reasons:
        left = f"{len(reasons)} of {len(finished)} trials of {study.study_name} are left out"
        print(f"{left}; the first: {reasons[0]}", flush=True)
    return fitting


def _fitted(
    trial: FrozenTrial, sweep: Sweep, config: SweepConfig, base: Recipe, name: str
) -> FrozenTrial:
    """Copy a trial with this sweep's distributions and constraints."""
    replayed = _Replayed(trial.params)
    asked = Suggestions(base, replayed)
    sweep.space(asked, base)
    if more := trial.params.keys() - replayed.distributions.keys():
        raise _OtherSpaceError(f"{min(more)} is not searched here")
    values: dict[str, float] = trial.user_attrs.get(MEASURED, {})
    if unknown := [one.name for one in config.constraints if one.name not in values]:
        raise _OtherSpaceError(f"it did not measure {unknown[0]}, which has a constraint")
    copy = create_trial(
        values=trial.values,
        params={one: trial.params[one] for one in replayed.distributions},
        distributions=replayed.distributions,
        user_attrs={WARM: name, MEASURED: values},
    )
    for text, excess in excesses(config.constraints, values).items():
        copy.set_constraint(text, excess)
    return copy


def _study(name: str, config: SweepConfig) -> optuna.Study:
    """Open the study of another sweep by the id of its MLflow run, by folder, file or URL."""
    folder = Path(name if "/" in name or Path(name).exists() else f"{config.output}/{name}")
    file = folder / "optuna.db" if folder.is_dir() else folder
    kept = database_file(name) if "://" in name else None
    if "://" in name and (kept is None or kept.is_file()):  # Optuna would create a missing file
        url, wanted = name, None
    elif "://" not in name and file.is_file():
        url, wanted = database_url(file), None
    elif config.storage is not None and "/" not in name:
        url, wanted = config.storage, name
    else:
        raise UserError(
            f"--warm-start {name}: there is neither {kept or folder / 'optuna.db'} nor a file of "
            "that name. Give the id of a sweep's MLflow run, its folder, its optuna.db, or the URL "
            "of a storage; for a sweep in a shared database, its id and --storage."
        )
    try:
        storage = RDBStorage(url)
        names = [one.study_name for one in storage.get_all_studies()]
    except (SQLAlchemyError, StorageInternalError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--warm-start {name}: Optuna cannot read it ({reason}).") from error
    if wanted is None and len(names) == 1:
        (wanted,) = names
    if wanted not in names:
        listed = ", ".join(names) or "none"
        raise UserError(
            f"--warm-start {name}: its sweeps are {listed}. Name one of them by its id, with "
            "--storage if they share a database."
        )
    return optuna.load_study(study_name=wanted, storage=storage)
