"""What docs/cli.md and tables of other pages say is what the code says of itself."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
import torch
from r2m.commands.main import r2m
from r2m.manual import pages

import r2m_kernels
from r2m_kernels import merging, ops
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


@pytest.mark.parametrize("module", [merging, ops], ids=lambda module: module.__name__)
def test_examples_of_the_api_run(module: object) -> None:
    found = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)  # type: ignore[arg-type]
    assert (found.failed, found.attempted > 5) == (0, True)


def test_every_function_and_operator_of_the_api_has_an_example() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    functions = [("r2m_kernels", getattr(r2m_kernels, name)) for name in ("analyze", "merge")]
    functions += [("r2m_kernels.ops", one) for name in ops.__all__ if inspect.isfunction(one := getattr(ops, name))]
    assert len(functions) == 8
    for module, function in functions:
        entry = page.partition(f"### {module}.{function.__name__}\n")[2].partition("\n### ")[0]
        assert ">>> " in entry, function
        assert "r2m_kernels/README.md" in entry, function
        assert module == "r2m_kernels" or f"\nr2m::{function.__name__}(" in entry
