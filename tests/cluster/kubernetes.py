"""What holds of each manifest in `cluster/kuberay/`: it is valid, and nothing in it is careless."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.cluster.files import SECRET_NAME, Document, dictionaries, is_pinned

SCHEMAS = json.loads((Path(__file__).parent / "data" / "kuberay.json").read_text())
KUBERNETES = kubernetes_validate.latest_version()
PROBED_BY_OPERATOR = {"ray-head", "ray-worker", "submitter"}


def validate(document: Document) -> None:
    """Checks a manifest against the schemas of Kubernetes and KubeRay; unknown fields are wrong.

    Args:
        document: the manifest.

    Raises:
        jsonschema.ValidationError: if it is not valid.
    """
    schema = SCHEMAS["kinds"].get(document["kind"])
    if schema is None:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    whole = schema | {"$defs": SCHEMAS["$defs"]}
    jsonschema.Draft202012Validator(whole).validate(document)
    for template in pod_templates(document, whole):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | template
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pod_templates(value: Any, schema: Document) -> Iterator[Document]:
    """Finds the pod templates in one of KubeRay's resources, where its schema has the marker.

    Args:
        value: of the resource, or of a field of it.
        schema: for it.
    """
    if "$ref" in schema:
        schema = SCHEMAS["$defs"][schema["$ref"].rpartition("/")[2]]
    if schema.get("x-pod-template"):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from pod_templates(part, schema.get("items", {}))
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from pod_templates(part, schema.get("properties", {}).get(name, {}))


def pods(document: Document) -> list[Document]:
    """Returns the specifications of all pods that a manifest makes."""
    return [part for part in dictionaries(document) if "containers" in part]


def faults(document: Document) -> list[str]:
    """Lists what is careless in a manifest, though valid.

    Args:
        document: the manifest.
    """
    found = [fault for pod in pods(document) for fault in _pod_faults(pod)]
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "Secret":
        found.append("a secret in a file")
    if kind == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        found.append(f"a service of type {spec['type']}, open to the world")
    if kind == "NetworkPolicy":
        found += ["everybody may come" for rule in spec.get("ingress", []) if not rule.get("from")]
        found += ["addresses may come" for part in dictionaries(spec) if "ipBlock" in part]
    for part in dictionaries(document):
        if SECRET_NAME.search(str(part.get("name", ""))) and "value" in part:
            found.append(f"{part['name']} is written out")
    if document["apiVersion"].startswith("ray.io"):
        found += _ray_faults(spec.get("rayClusterSpec", spec))
    return found


def _pod_faults(pod: Document) -> Iterator[str]:
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "may run as root"
    for container in pod["containers"]:
        name, context = container["name"], container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain privileges"
        if context.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{name} keeps capabilities"
        if not is_pinned(container["image"]):
            yield f"{name} has an image of any version"
        for which in ("requests", "limits"):
            if not {"cpu", "memory"} <= container.get("resources", {}).get(which, {}).keys():
                yield f"{name} has no {which}"
        probes = {"startupProbe", "readinessProbe", "livenessProbe"}
        if name not in PROBED_BY_OPERATOR and not probes <= container.keys():
            yield f"{name} lacks a probe"


def _ray_faults(spec: Document) -> Iterator[str]:
    if spec.get("authOptions") != {"mode": "token"}:
        yield "no token is asked for"
    if not spec.get("enableInTreeAutoscaling"):
        yield "does not scale"
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        store = int(group["rayStartParams"]["object-store-memory"])
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            shm = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
            memory = quantity(container["resources"]["limits"]["memory"])
            if shm.get("medium") != "Memory" or store > quantity(shm["sizeLimit"]):
                yield f"{container['name']} has too small a /dev/shm for its object store"
            elif quantity(shm["sizeLimit"]) > memory / 2:
                yield f"{container['name']} has a /dev/shm that leaves it little memory"


def quantity(text: str) -> int:
    """Returns the bytes of a quantity in binary units."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return int(text[:-2]) * units[text[-2:]]
