"""Experiment `speed`: its steps run, and its verdicts are checked, but not its times."""

import copy
import re
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from matplotlib.figure import Figure

from pipelines.experiments.speed import Speed, against_depth, of_models, quick, verdicts
from re2tal.errors import UserError
from re2tal.memory.ways import WAYS


@pytest.fixture(scope="module")
def results(results_of: Callable[[Speed], dict[str, Any]]) -> dict[str, Any]:
    return results_of(quick())


def test_every_way_takes_its_turn_in_every_round(results: dict[str, Any]) -> None:
    tables = [*results["steps"]["times"].values(), *results["depth"]["times"]]
    assert len(tables) == 1 + len(quick().depths)
    for times in tables:
        assert times.keys() == WAYS.keys()
        assert all(len(seconds) == quick().rounds for seconds in times.values())
        assert min(map(min, times.values())) > 0


def test_memory_hardly_grows_but_for_parameters_and_gradients() -> None:
    # as many tokens as it takes for activations to outweigh the gradients of the parameters
    found = against_depth(depths=(4, 12), grid=(4, 16, 16), rounds=0)
    shallow, deep = found["peaks"]
    few, many = found["parameters"]
    beyond = {way: deep[way] - shallow[way] - 2 * (many - few) for way in WAYS}
    assert abs(beyond["ours"]) < 0.02 * beyond["plain"]
    assert beyond["ours"] < beyond["checkpointed"] < beyond["plain"]
    assert deep["ours"] < deep["checkpointed"] < deep["plain"]


def test_what_the_report_says(results: dict[str, Any]) -> None:
    section = quick().section(results)
    ((step, times),) = results["steps"]["times"].items()
    by_step, deeper = section.tables.values()
    assert [row["training"] for row in by_step] == [way.title for way in WAYS.values()]
    ours = by_step[list(WAYS).index("ours")]
    pairs = zip(times["ours"], times["plain"], strict=True)
    assert ours["of plain"] == median(a / b for a, b in pairs)
    assert ours["lower quartile"] <= ours["of plain"] <= ours["upper quartile"]
    assert ours["rounds"] == quick().rounds
    assert [row["branches"] for row in deeper] == sorted(5 * list(quick().depths))
    assert deeper[-1]["peak, MB"] == results["depth"]["peaks"][-1]["ours, float"] / 1e6
    assert all(isinstance(figure, Figure) for figure in section.figures.values())
    assert section.metrics["speed/toy_swin/plain"] == 1
    # What MLflow takes.
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in section.metrics)
    for finding in section.findings[:2]:
        assert f"{quick().rounds} rounds" in finding.evidence
        assert finding.claim.startswith("toy_swin: ours")
    assert step.startswith("toy_swin, 1x3x8x32x32")


@pytest.mark.parametrize(
    ("ours", "faster", "one_more_forward"),
    [
        ([1.1, 1.2, 1.3], True, True),
        ([1.3, 1.5, 1.7], None, None),
        ([1.6, 1.7, 1.8], False, False),
    ],
)
def test_quartiles_tell_whether_a_limit_is_kept(
    ours: list[float], faster: bool | None, one_more_forward: bool | None
) -> None:
    times = {"plain": [1.0] * 3, "checkpointed": [1.4] * 3, "ours": ours}
    first, second = verdicts("model", times)
    assert first.holds is faster
    assert second.holds is one_more_forward
    assert "checkpointing" in first.evidence
    assert "times plain" in second.evidence


def test_memory_that_grows_as_that_of_plain_training_is_told(results: dict[str, Any]) -> None:
    growing = copy.deepcopy(results)
    for peaks in growing["depth"]["peaks"]:
        peaks["ours"] = peaks["plain"]
    assert quick().section(results).findings[-1].holds
    assert quick().section(growing).findings[-1].holds is False


def test_ratios_are_of_the_same_round() -> None:
    times = {"plain": [1.0, 2.0, 4.0], "ours": [2.0, 4.0, 8.0]}
    (rows,) = of_models({"model": times}).values()
    assert [row["of plain"] for row in rows] == [1, 2]
    assert rows[1]["lower quartile"] == rows[1]["upper quartile"] == 2


def test_time_is_measured_alone() -> None:
    assert all(job.alone for job in Speed().jobs())


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="two branches per Swin block, not 7"):
        Speed(depths=(4, 7))
    with pytest.raises(UserError, match="need 3 rounds, but rounds is 2"):
        Speed(rounds=2)
    with pytest.raises(UserError, match=r"no model resnet\. Choose from: swin3d_t"):
        Speed(models=("resnet",))
