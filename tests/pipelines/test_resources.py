"""Resources that a cluster has, and may grow to."""

from dataclasses import replace

import pytest
import ray

from pipelines.config.recipe import PoolConfig, ScaleConfig
from pipelines.config.recipes import toy
from pipelines.core.resources import (
    CLUSTER_MAX,
    capacity,
    check_resources,
    evaluations_at_a_time,
    pool_for,
    require_resources,
)
from pipelines.training import model
from pipelines.training.model import remarks
from re2tal.errors import UserError
from re2tal.reversible.convolutions import WRONG_GRADIENTS


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head without CPUs, whose autoscaler may start four nodes with two GPUs each."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    monkeypatch.setenv(CLUSTER_MAX, "CPU=64, GPU=8")


def test_an_evaluation_beside_the_training_needs_room_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(CLUSTER_MAX, raising=False)
    cluster = {"CPU": 6.0, "GPU": 4.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    scale = ScaleConfig(workers=2, validation_workers=3)
    check_resources(scale)
    assert evaluations_at_a_time(scale) == 2  # a third has no GPU
    assert evaluations_at_a_time(replace(scale, gpu=False)) == 3
    assert evaluations_at_a_time(replace(scale, gpu=False, cpus_per_worker=1.5)) == 1
    cluster["GPU"] = 2.0
    check_resources(replace(scale, validation_workers=0))
    with pytest.raises(
        UserError,
        match=r"2 workers, an evaluation beside them and the decoding need 3 GPUs \(it has 2\)\. "
        r".*leave out --scale\.validation-workers",
    ):
        check_resources(scale)
    cluster["CPU"] = 3.0
    with pytest.raises(UserError, match=r"need 3\.5 CPUs \(it has 3\)"):
        check_resources(replace(scale, gpu=False))
    with pytest.raises(ValueError, match=r"does not go with --scale\.min-workers"):
        replace(scale, min_workers=1)
    with pytest.raises(ValueError, match="must be at least 0, not -1"):
        replace(scale, validation_workers=-1)


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


@pytest.mark.parametrize(
    ("cluster", "config", "expected"),
    [
        ({"CPU": 8.0}, PoolConfig(), (4, "cpu")),
        ({"CPU": 2.0}, PoolConfig(), (1, "cpu")),
        ({"CPU": 8.0, "GPU": 2.0}, PoolConfig(), (2, "cuda")),
        ({"CPU": 8.0, "GPU": 2.0}, PoolConfig(gpu=False, actors=3), (3, "cpu")),
    ],
)
def test_actors_are_as_many_as_there_is_room_for(
    cluster: dict[str, float],
    config: PoolConfig,
    expected: tuple[int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    pool = pool_for(config, cpu_share=0.5)
    assert (pool.actors, pool.device) == expected
    assert pool_for(config).actors == (expected[0] if "GPU" in cluster else 1)


def test_a_cluster_that_starts_gpus_when_they_are_asked_for_is_asked_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setenv(CLUSTER_MAX, "CPU=66,GPU=8")
    assert (pool_for(PoolConfig()).actors, pool_for(PoolConfig()).gpu) == (1, True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PoolConfig(gpu=True), r"1 actors and the decoding need 1 GPUs \(it has 0\)"),
        (PoolConfig(actors=2), r"need 2\.5 CPUs \(it has 2\)\. Lower --actors"),
    ],
)
def test_a_cluster_that_is_too_small_for_the_actors_is_refused(
    config: PoolConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(UserError, match=message):
        pool_for(config)


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
