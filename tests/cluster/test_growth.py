"""What the files say that a cluster may come to have is what they let it start."""

from typing import Any

import pytest

from pipelines.core.resources import CLUSTER_MAX
from tests.cluster.files import CLUSTER, documents

CPUS_OF_A_MACHINE = {"g6.4xlarge": 16, "g2-standard-16": 16}


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_of_the_launcher(cloud: str) -> None:
    (config,) = documents(CLUSTER / f"{cloud}.yaml")
    workers = {name: t for name, t in config["available_node_types"].items() if name != "head"}
    nodes = min(config["max_workers"], sum(node["max_workers"] for node in workers.values()))
    machines = {
        node["node_config"].get("InstanceType", node["node_config"].get("machineType"))
        for node in workers.values()
    }
    (cpus,) = {CPUS_OF_A_MACHINE[machine] for machine in machines}
    option = f"--env {CLUSTER_MAX}=CPU={nodes * cpus},GPU={nodes}"
    assert option in config["docker"]["run_options"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_of_kuberay(name: str) -> None:
    found = [
        document["spec"].get("rayClusterSpec", document["spec"])
        for document in documents(CLUSTER / "kuberay" / f"{name}.yaml")
        if document["kind"] in ("RayCluster", "RayJob")
    ]
    (spec,) = found
    cpus = gpus = 0
    for group in spec["workerGroupSpecs"]:
        limits = _container(group)["resources"]["limits"]
        cpus += group["maxReplicas"] * int(limits["cpu"])
        gpus += group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    environment = {
        item["name"]: item.get("value") for item in _container(spec["headGroupSpec"])["env"]
    }
    assert environment[CLUSTER_MAX] == f"CPU={cpus},GPU={gpus}"


def _container(group: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return container
