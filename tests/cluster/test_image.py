"""The image, as far as it can be told without building it."""

import re

import pytest

from tests.cluster.dockerfile import faults, ignored, instructions
from tests.cluster.files import CLUSTER, ROOT

TEXT = (CLUSTER / "Dockerfile").read_text()
IGNORE = (ROOT / ".dockerignore").read_text()


def test_the_dockerfile_is_careful() -> None:
    assert faults(TEXT, IGNORE, ROOT) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("USER 1000:1000", "USER root", "root"),
        ("USER 1000:1000", "USER ray", "root"),
        ("USER 1000:1000\n", "", "root"),
        ("--require-hashes ", "", "nobody"),
        ("--compile ", "", "byte code"),
        ("--editable .", "--editable . boto3", "nobody"),
        ("python:3.11-slim-bookworm\n", "python:latest\n", "version"),
        ("ENV HOME", "ENV AWS_SECRET_ACCESS_KEY=x HOME", "stay"),
        ("WORKDIR", "ARG MLFLOW_PASSWORD\nWORKDIR", "stay"),
        ("COPY --chown=ray:ray sweeps", "COPY --chown=ray:ray swoops", "not there"),
        ("COPY --chown=ray:ray sweeps", "COPY --chown=ray:ray tests", "ignored"),
        ("COPY requirements.txt", "COPY re2tal requirements.txt", "before"),
    ],
)
def test_a_careless_dockerfile_is_found(old: str, new: str, fault: str) -> None:
    changed = TEXT.replace(old, new)
    assert changed != TEXT
    assert any(fault in found for found in faults(changed, IGNORE, ROOT))


def test_a_file_that_is_needed_and_ignored_is_found() -> None:
    found = faults(TEXT, IGNORE.replace("!pipelines\n", ""), ROOT)
    assert found == ["pipelines is ignored"]


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".env",
        "data/toy/annotations.json",
        "runs/mlflow.db",
        "cluster/aws.yaml",
        "cluster/mlflow/team.env",
        "pipelines/__pycache__/train.cpython-311.pyc",
        "re2tal/x.pyc",
    ],
)
def test_what_has_no_business_in_the_image_stays_out(path: str) -> None:
    assert ignored(path, IGNORE)


@pytest.mark.parametrize("path", ["pipelines/train.py", "cluster/mlflow/serve.py", "LICENSE"])
def test_what_the_image_needs_gets_in(path: str) -> None:
    assert not ignored(path, IGNORE)


def test_launcher_and_operator_find_what_they_call() -> None:
    """rsync, ssh and HOME are the launcher's, wget is older operators'."""
    installed = " ".join(arguments for name, arguments in instructions(TEXT) if name == "RUN")
    assert {"rsync", "openssh-client", "wget"} <= set(installed.split())
    assert "ENV HOME=/home/ray" in TEXT
    assert "PATH=/opt/venv/bin:$PATH" in TEXT
    assert "useradd --create-home --uid 1000" in installed


def test_every_package_has_hashes() -> None:
    lines = (ROOT / "requirements.txt").read_text().replace("\\\n", " ").splitlines()
    packages = [line for line in lines if re.match(r"\w", line)]
    assert packages
    assert [line.split()[0] for line in packages if "--hash=sha256:" not in line] == []
