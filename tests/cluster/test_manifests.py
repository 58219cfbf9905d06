"""The manifests for KubeRay and what it needs beside it."""

import re
import shlex
from typing import Any

import jsonschema
import pytest

from tests.cluster.files import CLUSTER, Document, changed, documents, pinned
from tests.cluster.kuberay_schema import OPERATOR, POD_TEMPLATE, reduced
from tests.cluster.kubernetes import SCHEMAS, faults, pods, validate

FOLDER = CLUSTER / "kuberay"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
ALL = {
    f"{document['kind']}/{document['metadata']['name']}": document
    for path in FILES
    for document in documents(path)
}
HEAD = "spec/headGroupSpec/template/spec"
POD = "spec/template/spec"


@pytest.mark.parametrize("name", ALL)
def test_a_manifest_is_valid_and_careful(name: str) -> None:
    validate(ALL[name])
    assert faults(ALL[name]) == []
    assert ALL[name]["metadata"].get("namespace", "re2tal") == "re2tal"


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("RayCluster/re2tal", "spec/enableAutoscaling", True),
        ("RayCluster/re2tal", "spec/authOptions/mode", "tokens"),
        ("RayCluster/re2tal", "spec/autoscalerOptions/version", "v3"),
        ("RayCluster/re2tal", "spec/headGroupSpec/template", ...),
        ("RayCluster/re2tal", "spec/workerGroupSpecs/0/minReplicas", "0"),
        ("RayCluster/re2tal", "spec/workerGroupSpecs/0/rayStartParams/num-cpus", 4),
        ("RayCluster/re2tal", f"{HEAD}/containers/0/enviroment", []),
        ("RayCluster/re2tal", f"{HEAD}/securityContext/runAsUser", "ray"),
        ("RayJob/train", "spec/backoffLimit", "three"),
        ("RayJob/train", "spec/rayClusterSpec/rayversion", "2.60.0"),
        ("RayJob/train", "spec/submitterPodTemplate/spec/restart", "Never"),
        ("RayJob/train", "spec/rayClusterSpec/workerGroupSpecs/1/template/spec/containers", ...),
        ("Deployment/mlflow", "spec/replicas", "one"),
        ("Deployment/mlflow", f"{POD}/containers/0/livenessProbe/path", "/health"),
        ("StatefulSet/postgres", "spec/selector", ...),
        ("Service/objectstore", "spec/ports/0/targetport", "s3"),
        ("NetworkPolicy/ray", "spec/ingres", []),
    ],
)
def test_a_wrong_manifest_is_not_valid(name: str, where: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(changed(ALL[name], where, value))


@pytest.mark.parametrize(
    ("name", "where", "value", "fault"),
    [
        ("RayCluster/re2tal", "spec/authOptions/mode", "disabled", "token"),
        ("RayCluster/re2tal", "spec/enableInTreeAutoscaling", False, "scale"),
        ("RayCluster/re2tal", f"{HEAD}/volumes/0/emptyDir/sizeLimit", "1Gi", "too small"),
        ("RayCluster/re2tal", f"{HEAD}/volumes/0/emptyDir/sizeLimit", "15Gi", "little memory"),
        ("RayCluster/re2tal", f"{HEAD}/volumes/0/emptyDir/medium", "", "too small"),
        ("RayJob/train", "spec/submitterPodTemplate/spec/securityContext", {}, "root"),
        ("RayJob/train", "spec/rayClusterSpec/authOptions", ..., "token"),
        ("Deployment/mlflow", f"{POD}/containers/0/securityContext", {}, "privileges"),
        ("Deployment/mlflow", f"{POD}/containers/0/resources/limits", {"cpu": "1"}, "limits"),
        ("Deployment/mlflow", f"{POD}/containers/0/image", "re2tal:latest", "version"),
        ("StatefulSet/postgres", f"{POD}/containers/0/image", "postgres", "version"),
        ("StatefulSet/postgres", f"{POD}/containers/0/livenessProbe", ..., "probe"),
        (
            "StatefulSet/postgres",
            f"{POD}/containers/0/env",
            [{"name": "POSTGRES_PASSWORD", "value": "x"}],
            "written out",
        ),
        ("Service/mlflow", "spec/type", "LoadBalancer", "world"),
        ("NetworkPolicy/postgres", "spec/ingress", [{"ports": [{"port": 5432}]}], "everybody"),
        (
            "NetworkPolicy/ray",
            "spec/ingress",
            [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}],
            "addresses",
        ),
    ],
)
def test_a_careless_manifest_is_found(name: str, where: str, value: Any, fault: str) -> None:
    document = changed(ALL[name], where, value)
    validate(document)
    assert any(fault in found for found in faults(document))


def test_all_but_the_job_are_applied_together() -> None:
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    together = set(kustomization["resources"])
    assert together == {path.name for path in FILES} - {"rayjob.yaml"}


def test_the_job_has_the_cluster_that_stays() -> None:
    assert ALL["RayJob/train"]["spec"]["rayClusterSpec"] == ALL["RayCluster/re2tal"]["spec"]


def test_the_versions_are_those_that_were_tested() -> None:
    assert ALL["RayCluster/re2tal"]["spec"]["rayVersion"] == pinned("ray")
    assert SCHEMAS["operator"] == OPERATOR


def test_the_job_ends_its_cluster_and_tries_again() -> None:
    spec = ALL["RayJob/train"]["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0


@pytest.mark.slow
def test_the_jobs_command_can_be_run() -> None:
    from pipelines.train import parse

    python, script, *arguments = shlex.split(ALL["RayJob/train"]["spec"]["entrypoint"])
    assert (python, script) == ("python", "pipelines/train.py")
    recipe = parse(arguments)
    groups = ALL["RayCluster/re2tal"]["spec"]["workerGroupSpecs"]
    assert recipe.scale.workers <= max(group["maxReplicas"] for group in groups)
    assert recipe.scale.min_workers == 1
    assert recipe.output.startswith("s3://")


def test_gpu_workers_come_and_go() -> None:
    groups = ALL["RayCluster/re2tal"]["spec"]["workerGroupSpecs"]
    assert {group["groupName"] for group in groups} == {"gpu", "gpu-spot"}
    for group in groups:
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        keys = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        assert "nvidia.com/gpu" in keys
        assert ("cloud.google.com/gke-spot" in keys) == (group["groupName"] == "gpu-spot")


def _labelled() -> list[tuple[Document, Document]]:
    """Labels and specifications of all pods; the operator labels those of Ray."""
    found = []
    for document in ALL.values():
        for pod in pods(document):
            name = pod["containers"][0]["name"]
            if name.startswith("ray-"):
                kind = name.removeprefix("ray-")
                labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind}
            elif name == "submitter":
                labels = document["spec"]["submitterPodTemplate"]["metadata"]["labels"]
            else:
                labels = document["spec"]["template"]["metadata"]["labels"]
            found.append((labels, pod))
    elsewhere = (
        {"app.kubernetes.io/component": "kuberay-operator"},
        {"app.kubernetes.io/name": "prometheus"},
    )
    return [*found, *((labels, {"containers": []}) for labels in elsewhere)]


def _selected(labels: Document) -> list[Document]:
    return [pod for have, pod in _labelled() if labels.items() <= have.items()]


def _ports(pod: Document) -> set[str | int]:
    listed = [port for container in pod["containers"] for port in container.get("ports", [])]
    return {port[key] for port in listed for key in ("name", "containerPort")}


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("NetworkPolicy/")])
def test_a_policy_is_about_pods_and_ports_that_are_there(name: str) -> None:
    spec = ALL[name]["spec"]
    chosen = _selected(spec["podSelector"].get("matchLabels", {}))
    assert chosen
    for rule in spec.get("ingress", []):
        for source in rule["from"]:
            assert _selected(source["podSelector"]["matchLabels"])
        for port in rule.get("ports", []):
            assert all(port["port"] in _ports(pod) for pod in chosen)


def test_what_no_policy_lets_in_stays_out() -> None:
    spec = ALL["NetworkPolicy/nobody"]["spec"]
    assert spec == {"podSelector": {}, "policyTypes": ["Ingress"]}


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("Service/")])
def test_a_service_leads_to_a_port_of_its_pods(name: str) -> None:
    spec = ALL[name]["spec"]
    (pod,) = _selected(spec["selector"])
    assert all(port["targetPort"] in _ports(pod) for port in spec["ports"])


def _references() -> set[tuple[str, str]]:
    return {
        (part["secretKeyRef"]["name"], part["secretKeyRef"]["key"])
        for document in ALL.values()
        for pod in pods(document)
        for container in pod["containers"]
        for variable in container.get("env", [])
        for part in [variable.get("valueFrom", {})]
        if "secretKeyRef" in part
    }


def test_the_readme_makes_the_secrets_that_are_used() -> None:
    text = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    made = set()
    for line in re.findall(r"create secret generic (.*)", text):
        name, *options = line.split()
        keys = re.findall(r"--from-(?:file|literal)=([a-z-]+)=", " ".join(options))
        made |= {(name, key) for key in keys}
    assert made == _references()


def test_a_crd_is_reduced_to_its_fields() -> None:
    template = {
        "type": "object",
        "properties": {
            "metadata": {"type": "object"},
            "spec": {"type": "object", "properties": {"containers": {"type": "array"}}},
        },
    }
    schema = {
        "type": "object",
        "description": "left out",
        "required": ["mode"],
        "properties": {
            "mode": {"type": "string", "enum": ["a", "b"], "description": "left out"},
            "size": {"x-kubernetes-int-or-string": True, "pattern": "left out"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "template": template,
        },
    }
    assert reduced(schema) == {
        "type": "object",
        "required": ["mode"],
        "additionalProperties": False,
        "properties": {
            "mode": {"type": "string", "enum": ["a", "b"]},
            "size": {"type": ["integer", "string"]},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "template": POD_TEMPLATE,
        },
    }
