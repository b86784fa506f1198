"""Names for the experts of a command line: given, or the shortest part of the path that tells them apart."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from r2m_kernels.errors import BadOption


def name_experts(arguments: Sequence[str]) -> dict[str, str]:
    """Read ``[NAME=]PATH`` arguments.

    An argument that exists as a path is a path, even with a ``=`` in it. An expert without a NAME is called
    by the shortest end of its path that no other expert's path has: ``train_on_fs/clip.safetensors`` beside
    ``train_on_fr/clip.safetensors``, but ``fs.safetensors`` alone. Where that is taken, ``#2`` and so on is
    added, as for a path given twice.

    Returns:
        name → path as it was given, in the given order.

    Raises:
        BadOption: an empty NAME or PATH, or a NAME given twice.
    """
    return named([split(argument) for argument in arguments])


def named(given: Sequence[tuple[str | None, str]]) -> dict[str, str]:
    """The same of names and paths; where there is no name, one is found.

    Raises:
        BadOption: a name is given twice.
    """
    explicit = [name for name, _ in given if name is not None]
    for name in explicit:
        if explicit.count(name) > 1:
            raise BadOption(f"expert name '{name}' is given {explicit.count(name)} times; names must differ")
    parts = {path: Path(os.path.abspath(path)).parts for _, path in given}
    taken = set(explicit)
    experts: dict[str, str] = {}
    for chosen, path in given:
        others = {other for other in parts.values() if other != parts[path]}
        name = chosen or _free_name(parts[path], others, taken)
        taken.add(name)
        experts[name] = path
    return experts


def split(argument: str) -> tuple[str | None, str]:
    """Name and path of one ``[NAME=]PATH``; arguments and errors are :func:`name_experts`'s."""
    name, separator, path = argument.partition("=")
    if os.path.lexists(argument) or (argument and not separator):
        return None, argument
    if not name or not path:
        raise BadOption(f"expert '{argument}': expected [NAME=]PATH, got an empty {'PATH' if name else 'NAME'}")
    return name, path


def _free_name(parts: tuple[str, ...], others: set[tuple[str, ...]], taken: set[str]) -> str:
    unique = (
        os.path.join(*parts[-length:])
        for length in range(1, len(parts) + 1)
        if all(other[-length:] != parts[-length:] for other in others)
    )
    # The whole absolute path at the latest is no other's end.
    shortest = next(unique)
    numbered = (f"{shortest}#{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([shortest], numbered) if name not in taken)
