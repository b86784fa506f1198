"""Packages that only some commands need, and what to install where they are missing."""

from __future__ import annotations

import importlib.util

from r2m_kernels.errors import BadOption

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # where a module is called otherwise


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
