"""Reduces KubeRay's CRDs to the facts that say which fields its resources have.

  python -m tests.cluster.kuberay_schema FOLDER_WITH_CRDS OUTPUT.json

The folder holds the operator's `rayclusters.yaml` and `rayjobs.yaml`, under these names or with
`ray.io_` before them. What remains of a field is its name, its type, its permitted values and which
of its own fields are required, and nothing of what it means; a pod template, which is most of a CRD
and is Kubernetes' own, becomes a marker.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

OPERATOR = "1.7.0"
"""The version of KubeRay whose CRDs the committed file was made from."""

POD_TEMPLATE = {"x-pod-template": True}
"""Stands where a pod template may stand."""

KINDS = {"rayclusters": "RayCluster", "rayjobs": "RayJob"}
CLUSTER = "RayClusterSpec"

_KEPT = ("type", "enum", "required")


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a JSON schema with the same fields as an OpenAPI one and no others.

    Args:
        schema: of a CRD, or of a field in it.
    """
    fields = schema.get("properties", {})
    if "containers" in fields.get("spec", {}).get("properties", {}):
        return POD_TEMPLATE
    result = {name: schema[name] for name in _KEPT if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if "items" in schema:
        result["items"] = reduced(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = reduced(schema["additionalProperties"])
    elif fields:
        result["properties"] = {name: reduced(field) for name, field in sorted(fields.items())}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    return result


def resource_schema(crd: dict[str, Any]) -> dict[str, Any]:
    """Returns the reduced schema of a resource as a user writes it.

    Args:
        crd: the definition.

    Raises:
        ValueError: if it has no version v1.
    """
    versions = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    if not versions:
        raise ValueError(f"{crd['metadata']['name']} has no version v1.")
    schema = reduced(versions[0]["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status")  # the operator's, not a user's
    return schema | {"required": ["apiVersion", "kind", "metadata", "spec"]}


def schemas(folder: Path) -> dict[str, Any]:
    """Returns the reduced schemas of all kinds.

    Args:
        folder: with the CRDs.

    Raises:
        FileNotFoundError: if one is missing.
    """
    kinds = {}
    for name, kind in KINDS.items():
        path = next(iter(folder.glob(f"*{name}.yaml")), folder / f"{name}.yaml")
        kinds[kind] = resource_schema(yaml.safe_load(path.read_text()))
    # a job describes its cluster as a cluster does
    cluster = kinds["RayCluster"]["properties"]["spec"]
    job = kinds["RayJob"]["properties"]["spec"]["properties"]
    reference = {"$ref": f"#/$defs/{CLUSTER}"}
    if job["rayClusterSpec"] == cluster:
        job["rayClusterSpec"] = reference
    kinds["RayCluster"]["properties"]["spec"] = reference
    return {"operator": OPERATOR, "$defs": {CLUSTER: cluster}, "kinds": kinds}


def main(arguments: list[str]) -> None:
    """Writes the reduced schemas.

    Args:
        arguments: the folder and the file to write.
    """
    folder, output = map(Path, arguments)
    text = json.dumps(schemas(folder), indent=1, sort_keys=True)
    output.write_text(f"{text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
