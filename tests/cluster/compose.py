"""What holds of the file for one machine."""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema

from tests.cluster.files import SECRET_NAME, Document, is_pinned

REQUIRED = re.compile(r"\$\{[A-Z_]+:\?[^}]+\}")
"""A variable of the user's, without which Compose refuses to start."""


def validate(document: Document) -> None:
    """Checks the file against the Compose Specification's own schema.

    Args:
        document: the file.

    Raises:
        jsonschema.ValidationError: if it is not valid.
    """
    _validator().validate(document)


@cache
def _validator() -> Any:
    schemas = files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def faults(document: Document) -> list[str]:
    """Lists what is careless in the file, though valid.

    Args:
        document: the file.
    """
    found: list[str] = []
    services, volumes = document["services"], document["volumes"].keys()
    for name, service in services.items():
        if not is_pinned(service["image"]):
            found.append(f"{name} has an image of any version")
        if any(not str(port).startswith("127.0.0.1:") for port in service.get("ports", [])):
            found.append(f"{name} listens to the world")
        for variable, value in service.get("environment", {}).items():
            if SECRET_NAME.search(variable) and not _harmless(variable, value):
                found.append(f"{name} has {variable} written out")
        if "healthcheck" not in service:
            found.append(f"{name} is not asked how it is")
        for other, how in _needs(service).items():
            if how.get("condition") != "service_healthy" or "healthcheck" not in services[other]:
                found.append(f"{name} does not wait for {other}")
        if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
            found.append(f"{name} may do more than it needs")
        if {volume.split(":")[0] for volume in service.get("volumes", [])} - volumes:
            found.append(f"{name} keeps data in what is no volume")
    return found


def _harmless(variable: str, value: Any) -> bool:
    # the name of the one user of the object store
    return variable == "AWS_ACCESS_KEY_ID" or bool(REQUIRED.fullmatch(str(value)))


def _needs(service: Document) -> Document:
    needs = service.get("depends_on", {})
    return needs if isinstance(needs, dict) else {name: {} for name in needs}
