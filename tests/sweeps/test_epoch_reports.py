"""What Ray Tune hears while a trial goes on."""

from typing import Any

import pytest
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.core.metric_names import MAP, UNSCORED
from sweeps import finetune, localizer, models, pareto
from sweeps.epoch_reports import RUN_ID, EpochReports


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is passed on."""
    passed: list[dict[str, Any]] = []
    # what is inherited works in a trial only
    monkeypatch.setattr(TuneReportCallback, "__init__", lambda self: None)
    monkeypatch.setattr(
        TuneReportCallback,
        "after_report",
        lambda self, context, metrics, checkpoint: passed.append(metrics[0]),
    )
    return passed


def test_every_epoch_has_all_that_is_searched_for(heard: list[dict[str, Any]]) -> None:
    EpochReports("run").after_report(None, [{MAP: 0.5, "epoch": 1}], None)
    (passed,) = heard
    assert passed[MAP] == 0.5
    assert passed[RUN_ID] == "run"
    # Ray Tune ends the whole search at a report that lacks one
    for script in (finetune, localizer, models, pareto):
        assert {objective.metric for objective in script.SWEEP.objectives} <= passed.keys()


def test_a_checkpoint_in_the_midst_of_an_epoch_is_no_result(heard: list[dict[str, Any]]) -> None:
    EpochReports("run").after_report(None, [{MAP: UNSCORED, "epoch": 0}], None)
    assert heard == []
