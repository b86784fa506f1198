"""What was given on the command line, as the functions behind the commands take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from r2m.commands.options import read_rank
from r2m.options import OPTIONS, Options
from r2m.points import Asked
from r2m.recipe import ARRANGEMENT, OUTPUT, Recipe
from r2m_kernels.checks import choice, did_you_mean
from r2m_kernels.config import FLAGS, METHODS
from r2m_kernels.errors import BadOption
from r2m_kernels.fields import OPTIONS as PARAMETERS
from r2m_kernels.options import flag

_TRUTH = {"true": True, "false": False}


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
        key = next(iter(words))
        if key in ("base", "expert") and not path.lower().endswith((".yaml", ".yml", ".json")):
            raise BadOption(
                f"{path}: expected a recipe (.yaml) here; each checkpoint has an --expert of its own: "
                "--expert A --expert B"
            )
        raise BadOption(f"{flag(key)}: the recipe says that; {_change(key)}.")
    return replace(read_recipe(path, changes), **output)


def _change(key: str) -> str:
    """What to do instead of giving a flag beside a recipe."""
    lists = {"expert": "models", "rename": "rename", "drop": "rename"}
    if key in lists:
        return f"change its {lists[key]}"
    places = {"base": "base_model", "method": "merge_method"} | {one.key: one.name for one in ARRANGEMENT.values()}
    option = FLAGS.get(key)
    parameter = f"parameters.{option.name}" if option is not None and option.name in PARAMETERS else "KEY"
    return f"--set {places.get(key, parameter)}=VALUE changes it"


def read_methods(text: str) -> list[Asked]:
    """``"ties:density=0.1,tsv_m"``: methods, each with options of its own after colons.

    Raises:
        BadOption: no such method or option, or a value that is none.
    """
    asked: list[Asked] = []
    for one in text.split(","):
        name, *options = one.strip().split(":")
        choice("method", name, tuple(METHODS))
        asked.append((name, dict(_read(name, option) for option in options)))
    return asked


def _read(method: str, text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    key = key.strip().removeprefix("--").replace("-", "_")
    if key not in FLAGS:
        raise BadOption(f"method: {method}: expected OPTION=VALUE, got {text!r}{did_you_mean(key, FLAGS)}")
    if not separator or not value:
        raise BadOption(f"method: {method}: {key}: expected {key}=VALUE, got {text!r}")
    return key, read_value(key, value)


def read_value(key: str, text: str) -> Any:
    """An option's value as it is written; whether it may have that one is for the configuration to say.

    Raises:
        BadOption: the option's values are no single words.
    """
    declared = FLAGS[key]
    if declared.choices:
        return text
    if declared.kind in (float | int, float, int):
        return read_rank(text)
    if declared.kind is bool:
        return _TRUTH.get(text, text)
    raise BadOption(f"{flag(key)}: cannot be given here; a recipe's parameters have it")
