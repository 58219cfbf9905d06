"""What a cluster has, and may grow to."""

from dataclasses import replace

import pytest
import ray

from pipelines.config.recipes import toy
from pipelines.core.resources import CLUSTER_MAX, capacity, require_resources
from pipelines.training import model
from pipelines.training.model import remarks
from re2tal.errors import UserError
from re2tal.reversible.convolutions import WRONG_GRADIENTS


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without CPUs, whose autoscaler may start four nodes with two GPUs each."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    monkeypatch.setenv(CLUSTER_MAX, "CPU=64, GPU=8")


def test_what_may_be_started_counts(grows: None) -> None:
    assert capacity() == {"memory": 1e9, "CPU": 64.0, "GPU": 8.0}
    require_resources(cpus=64, gpus=8, who="the run", advice="Less.")
    with pytest.raises(UserError, match=r"the run need 9 GPUs \(it has 8\)"):
        require_resources(cpus=1, gpus=9, who="the run", advice="Less.")


def test_without_an_autoscaler_what_is_there_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.delenv(CLUSTER_MAX, raising=False)
    assert capacity() == {"CPU": 2.0}
    with pytest.raises(UserError, match=r"3 CPUs \(it has 2\)"):
        require_resources(cpus=3, gpus=0, who="the run", advice="Less.")


@pytest.mark.parametrize("stated", ["GPU", "GPU=many", "GPU=1=2"])
def test_what_cannot_be_read_is_said(stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setenv(CLUSTER_MAX, stated)
    with pytest.raises(UserError, match=f"{CLUSTER_MAX}={stated} cannot be read"):
        capacity()


@pytest.mark.parametrize("wrong", [True, False])
def test_a_run_whose_gradients_would_be_wrong_on_this_processor_says_so_once(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "wrong_gradients", lambda: wrong)
    recipe = toy()
    bfloat16 = replace(recipe, optim=replace(recipe.optim, precision="bfloat16"))
    assert remarks(bfloat16, []) == [WRONG_GRADIENTS] * wrong
    assert remarks(replace(bfloat16, scale=replace(recipe.scale, gpu=True)), []) == []
    assert remarks(replace(recipe, optim=replace(recipe.optim, precision="float32")), []) == []
