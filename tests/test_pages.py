"""README and docs: links lead somewhere, the first screen has what a newcomer looks for, figures come from results."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "r2m_kernels/*.md", "csrc/*.md", "bench/*.md")
    for path in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text()


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if "://" in place:
            continue
        file = (path.parent / place).resolve() if place else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


def test_the_first_screen_is_a_sentence_two_commands_a_picture_and_a_table() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    first, _, _ = README.partition("\n## ")
    assert len(re.findall(r"^\$ ", first, re.MULTILINE)) == 2
    (picture,) = re.findall(r"!\[[^\]]{20,}\]\((\S+)\)", first)
    assert (ROOT / picture).stat().st_size < 500_000
    assert len(re.findall(r"^\| --- ", first, re.MULTILINE)) == 1


def test_every_extra_is_told() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install = README.partition("## Install")[2].partition("\n## ")[0]
    assert {*re.findall(r"^\| `(\w+)` \| ", install, re.MULTILINE)} == extras.keys()


def test_every_page_of_docs_is_reached_from_the_readme() -> None:
    quality = {"docs/quality-ablations.md", "docs/quality-forgeries.md", "docs/quality-ideas.md"}
    quality |= {f"docs/quality-{name}.md" for name in ("methods", "protocol", "studies")}  # from docs/quality.md
    docs = {page for page in PAGES if page.startswith("docs/")} - quality
    assert {page for page in docs if f"]({page})" not in README} == set()


def test_figures_of_the_readme_are_written_from_results() -> None:
    by_hand = re.sub(r"<!-- quality:begin.*?<!-- quality:end -->", "", README, flags=re.DOTALL)
    assert re.findall(r"(?<![\w/])[+\-−]?0?\.\d{2,}\b", by_hand) == []
