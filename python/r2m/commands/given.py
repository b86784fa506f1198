"""What was given on the command line, as the functions behind the commands take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from r2m.checkpoints.formats import SAFETENSORS
from r2m_kernels.config import make_config
from r2m_kernels.options import flag

if TYPE_CHECKING:
    from r2m.arrangement import Arrangement


def job(given: dict[str, Any]) -> dict[str, Any]:
    """Options of ``merge`` as arguments of :func:`r2m.execute.open_job`."""
    from r2m.naming import name_experts

    files = ("base", "expert", "out", "dtype", "format", "max_shard_size")
    names = (*files, "method", "device", "backend", "memory_budget")
    arguments = {{"expert": "experts", "format": "file_format"}.get(name, name): given[name] for name in names}
    rest = {name: value for name, value in given.items() if name not in names and value not in (None, ())}
    path, changes = rest.pop("recipe", None), rest.pop("set", ())
    if path is not None:
        return {**arguments, **_described(path, changes, given, rest)}
    for name in ("base", "expert"):
        if not given[name]:
            raise click.UsageError(f"Missing option '{flag(name)}', or a recipe.")
    if changes:
        raise click.UsageError("--set: changes a recipe, and none is given.")
    arguments["method"] = arguments["method"] or "r2m"
    arguments["file_format"] = arguments["file_format"] or SAFETENSORS.name
    wanted = arrangement_of(rest)
    config = make_config(arguments["method"], rest)
    return {**arguments, "experts": name_experts(arguments["experts"]), "config": config, "arrangement": wanted}


_ARRANGEMENT = ("rename", "drop", "preset", "head", "head_tensor", "head_features")


def arrangement_of(rest: dict[str, Any]) -> Arrangement:
    """Takes what is about it out of the options."""
    from r2m.arrangement import Arrangement

    given = {name: rest.pop(name) for name in _ARRANGEMENT if name in rest}
    rules: dict[str, str | None] = dict(rule(text) for text in given.pop("rename", ()))
    rules.update(dict.fromkeys(given.pop("drop", ())))
    return Arrangement(rename=rules, head_tensors=given.pop("head_tensor", ()), **given)


def rule(text: str) -> tuple[str, str]:
    """What names begin with, and what instead."""
    old, separator, new = text.partition("=")
    if not old or not separator:
        raise click.UsageError(f"--rename {text}: expected OLD=NEW, such as 'module.='.")
    return old, new


def _described(path: str, changes: Sequence[str], given: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of :func:`r2m.execute.open_job`'s arguments; options may not say it again."""
    from r2m.recipe import read_recipe

    again = [name for name in ("base", "expert", "method") if given[name]] + list(rest)
    if again:
        raise click.UsageError(f"{flag(again[0])}: the recipe says that; --set KEY=VALUE changes it.")
    recipe = read_recipe(path, changes)
    output = {key: given[name] for name, key in (("dtype", "dtype"), ("format", "file_format")) if given[name]}
    return {**recipe.arguments(), **output}
