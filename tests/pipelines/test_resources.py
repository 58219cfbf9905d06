"""What a cluster has, and may grow to."""

import pytest
import ray
from ray._private.state import state

from pipelines.resources import ResourceError, capacity, require_resources


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without CPUs, whose autoscaler may start four nodes with two GPUs each."""
    most = {"CPU": 64.0, "GPU": 8.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: most)


def test_what_may_be_started_counts(grows: None) -> None:
    assert capacity() == {"memory": 1e9, "CPU": 64.0, "GPU": 8.0}
    require_resources(cpus=64, gpus=8, who="the run", advice="Less.")
    with pytest.raises(ResourceError, match=r"the run need 9 GPUs \(it has 8\)"):
        require_resources(cpus=1, gpus=9, who="the run", advice="Less.")


def test_without_an_autoscaler_what_is_there_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    assert capacity() == {"CPU": 2.0}
    with pytest.raises(ResourceError, match=r"3 CPUs \(it has 2\)"):
        require_resources(cpus=3, gpus=0, who="the run", advice="Less.")
