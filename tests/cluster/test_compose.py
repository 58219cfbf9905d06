"""The services for a team on one machine."""

from typing import Any

import jsonschema
import pytest

import re2tal
from tests.cluster.compose import faults, validate
from tests.cluster.files import CLUSTER, ROOT, changed, documents

(DOCUMENT,) = documents(CLUSTER / "compose.yaml")
MLFLOW = "services/mlflow"


def test_the_file_is_valid_and_careful() -> None:
    validate(DOCUMENT)
    assert faults(DOCUMENT) == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (f"{MLFLOW}/port", ["127.0.0.1:5000:5000"]),
        (f"{MLFLOW}/depends_on/postgres/condition", "healthy"),
        ("services/postgres/healthcheck/every", "5s"),
        ("volumes", ["postgres"]),
    ],
)
def test_a_wrong_file_is_not_valid(where: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(changed(DOCUMENT, where, value))


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        (f"{MLFLOW}/ports", ["5000:5000"], "world"),
        (f"{MLFLOW}/ports", ["0.0.0.0:5000:5000"], "world"),
        (f"{MLFLOW}/environment/PGPASSWORD", "hunter2", "written out"),
        (f"{MLFLOW}/environment/AWS_SECRET_ACCESS_KEY", "${KEY:-hunter2}", "written out"),
        (f"{MLFLOW}/environment/MLFLOW_FLASK_SERVER_SECRET_KEY", "${KEY}", "written out"),
        (f"{MLFLOW}/depends_on", ["postgres", "objectstore"], "wait"),
        (f"{MLFLOW}/read_only", False, "more than it needs"),
        ("services/postgres/image", "postgres:latest", "version"),
        ("services/objectstore/healthcheck", ..., "asked"),
        ("services/postgres/volumes", ["./data:/var/lib/postgresql/data"], "no volume"),
    ],
)
def test_a_careless_file_is_found(where: str, value: Any, fault: str) -> None:
    document = changed(DOCUMENT, where, value)
    validate(document)
    assert any(fault in found for found in faults(document))


def test_it_builds_the_image_of_this_version() -> None:
    service = DOCUMENT["services"]["mlflow"]
    assert service["image"] == f"re2tal:{re2tal.__version__}"
    context = CLUSTER / service["build"]["context"]
    assert context.resolve() == ROOT
    assert (context / service["build"]["dockerfile"]).exists()


def test_both_ways_run_the_same_images() -> None:
    manifests = "".join(path.read_text() for path in (CLUSTER / "kuberay").glob("*.yaml"))
    for name in ("postgres", "objectstore"):
        assert f"image: {DOCUMENT['services'][name]['image']}\n" in manifests
