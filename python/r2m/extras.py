"""Modules that only some commands need: where they are looked for, and what to install where they are missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
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
        extra: of this package's; ``None``: they are in none.
        modules: by the names they are imported under.

    Raises:
        BadOption: one of them is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            package = _PACKAGES.get(module, module)
            how = f": pip install '{requirement(extra, package)}'" if extra else ", which is not installed"
            raise BadOption(f"{what}: needs the package {package}{how}")


def requirement(extra: str, package: str) -> str:
    """What an extra asks for of a package, ``"scikit-learn>=1.4"``: pip takes it wherever this package came from."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for one in importlib.metadata.requires("r2m_kernels") or ():
            asked, _, condition = one.partition(";")
            if re.match(rf"{re.escape(package)}\b(?!-)", asked) and f'"{extra}"' in condition.replace("'", '"'):
                return asked.strip()
    return package
