"""What docs/cli.md and tables of other pages say is what the code says of itself."""

from __future__ import annotations

from pathlib import Path

from r2m.commands.main import r2m
from r2m.manual import pages

from r2m_kernels.config import OFFERED
from r2m_kernels.fields import OPTIONS

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_are_current() -> None:
    written = pages(ROOT)
    for path, text in written.items():
        assert path.read_text() == text, f"{path}: run python -m r2m.manual"
    assert all(f"## r2m {name}\n" in written[ROOT / "docs" / "cli.md"] for name in r2m.commands)


def test_every_option_and_method_has_its_row() -> None:
    maths = (ROOT / "r2m_kernels" / "README.md").read_text()
    assert all(f"\n| `{name}` | " in maths for name in [*OFFERED, *OPTIONS])
    listed = (ROOT / "docs" / "methods.md").read_text()
    assert all(f"\n| `{name}` | {one.title} |" in listed for name, one in OFFERED.items())
