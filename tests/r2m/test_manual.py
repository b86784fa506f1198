"""docs/cli.md is what the commands say of themselves."""

from __future__ import annotations

from pathlib import Path

from r2m.commands.main import r2m
from r2m.manual import manual

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_reference_is_current() -> None:
    text = (DOCS / "cli.md").read_text()
    assert text == manual(), "python -m r2m.manual > docs/cli.md"
    assert all(f"## r2m {name}\n" in text for name in r2m.commands)
