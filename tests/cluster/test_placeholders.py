"""What the README says of the files is so."""

import re
import shlex

import pytest

from tests.cluster.files import CLUSTER, PLACEHOLDER

TEXT = (CLUSTER / "README.md").read_text()


def table(section: str) -> list[list[str]]:
    """Returns the cells of a section's table, without its head."""
    lines = f"\n{TEXT}".split(f"\n{section}\n")[1].split("\n## ")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_table_lists_the_placeholders_that_are_there() -> None:
    listed = {
        name: set(re.findall(r"`([^`]+)`", where))
        for names, _, where in table("## Placeholders")
        for name in PLACEHOLDER.findall(names)
    }
    there: dict[str, set[str]] = {}
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix not in (".md", ".pyc"):
            parts = path.relative_to(CLUSTER).parts
            where = parts[0] if len(parts) == 1 else f"{parts[0]}/"
            for name in PLACEHOLDER.findall(path.read_text()):
                there.setdefault(name, set()).add(where)
    assert listed == there


def test_the_table_lists_the_files_that_are_there() -> None:
    listed = {
        name.split("/")[0]
        for names, _ in table("# cluster")
        for name in re.findall(r"`([^`]+)`", names)
    }
    there = {path.name for path in CLUSTER.iterdir()} - {"README.md", "__pycache__"}
    assert listed == there


@pytest.mark.parametrize("path", re.findall(r"`?(cluster/[a-z_/]+\.[a-z]+)", TEXT))
def test_a_file_that_is_named_is_there(path: str) -> None:
    assert (CLUSTER.parent / path).is_file()


@pytest.mark.slow
def test_the_job_can_be_run() -> None:
    from pipelines.train import parse

    text = TEXT.replace("\\\n", " ")
    (command,) = re.findall(r"-- (python pipelines/train.py thumos.*)", text)
    recipe = parse(shlex.split(command)[2:])
    assert recipe.scale.min_workers == 1
    assert recipe.output == "s3://my-bucket/runs"


@pytest.mark.parametrize("link", re.findall(r"\]\(#([^)]+)\)", TEXT))
def test_a_link_leads_to_a_section(link: str) -> None:
    titles = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    assert link in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
