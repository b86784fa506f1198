"""Markdown from templates that stand beside their programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from bench.machine import ROOT


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def render(template: Path, **content: Any) -> str:
    """The text of a template, which has ``table`` beside the content."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(table=table, **content)


def put(text: str, name: str, section: str, command: str) -> str:
    """A text with what lies between the two comments of ``name`` replaced, as a Markdown file has them."""
    begin, end = f"<!-- {name}:begin, written by `{command}` -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"there is no {begin} with an {end} after it")
    return f"{before}{begin}\n\n{section.strip()}\n\n{rest[rest.index(end) :]}"


def update(path: Path, text: str, *, check: bool, command: str) -> int:
    """Write a file, or only look whether it is the text; an exit code."""
    if check and path.read_text() != text:
        print(f"{path.relative_to(ROOT)} is not current; {command}")
        return 1
    if not check:
        path.write_text(text)
    return 0
