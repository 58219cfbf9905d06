"""Pages in Markdown: every link to a file and to a heading of this repository leads there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipelines", "re2tal", "sweeps", "cluster", "tests")
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
]


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names that a forge gives the headings of a page; one that is there twice is numbered."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*)$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.append(re.sub(r"[^\w\- ]", "", shown).replace(" ", "-"))
    return {f"{one}-{n}" if (n := found[:i].count(one)) else one for i, one in enumerate(found)}


def dead(page: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if ":" in file:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(dead(page))


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, [c](d)\n\n[x](#a-b-c) [y](#a-c) [z](none.md) [w](https://e.org/#q)\n")
    assert list(dead(page)) == ["d", "#a-c", "none.md"]
