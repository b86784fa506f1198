"""Modules that only some commands need: where they are looked for, and what to install where they are missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from r2m_kernels.errors import BadOption

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # where a module is called otherwise


def look_here() -> None:
    """Let modules be imported from the current directory too, as Python does but a command does not."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def need(what: str, extra: str | None, *modules: str) -> None:
    """Refuse what cannot be done here, before any work; nothing is imported.

    Args:
        what: what needs them, for the message.
        extra: of ``pip install 'r2m_kernels[EXTRA]'``; ``None``: they are in none.
        modules: by the names they are imported under.

    Raises:
        BadOption: one of them is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            how = f": pip install 'r2m_kernels[{extra}]'" if extra else ", which is not installed"
            raise BadOption(f"{what}: needs the package {_PACKAGES.get(module, module)}{how}")
