"""What was given on the command line, as the functions behind the commands take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from r2m.options import OPTIONS, Options
from r2m.recipe import OUTPUT, Recipe
from r2m_kernels.errors import BadOption
from r2m_kernels.options import flag


def only_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that were left out."""
    return {key: value for key, value in options.items() if value not in (None, ())}


def take_options(given: dict[str, Any]) -> Options:
    """How to run, taken out of what was given."""
    return Options(**only_given({one.name: given.pop(one.key, None) for one in OPTIONS.values()}))


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    """What to merge: a recipe's file and what may go with one, or options."""
    words = only_given(given)
    path, changes = words.pop("recipe", None), words.pop("set", ())
    if path is None:
        if changes:
            raise BadOption("--set: changes a recipe, and none is given.")
        return Recipe.from_options(words)
    from r2m.recipe_file import read_recipe

    output = {one.name: words.pop(one.key) for one in OUTPUT.values() if one.key in words}
    if words:
        raise BadOption(f"{flag(next(iter(words)))}: the recipe says that; --set KEY=VALUE changes it.")
    return replace(read_recipe(path, changes), **output)
