"""Where the inputs of a merge are by now, when its project was moved and they did not move with it."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r2m import former, plain_yaml
from r2m.checkpoints import hub
from r2m.job import open_job
from r2m.options import Options
from r2m.output import INPUTS, held
from r2m.ownership import RECIPE_FILE, digest, rewrite
from r2m.places import new_file
from r2m.recipe import Recipe
from r2m.recipe_file import dump
from r2m.records import REPORT, STATE, WRITTEN, as_written
from r2m_kernels.errors import BadFile, BadOption, quoted

BASE = "base"
_LOOKED_AT, _ROUNDING = 8, 1e-4  # tensors of each expert, and how far a length may be off by other sums


def lost(recipe: Recipe) -> dict[str, str]:
    """Which checkpoints of a recipe are not where it says: ``base`` or the expert's name → path."""
    paths = {BASE: recipe.base, **{name: one.path for name, one in recipe.experts.items()}}
    return {name: path for name, path in paths.items() if not hub.is_reference(path) and not os.path.exists(path)}


def refuse_lost(recipe: Recipe, out: str | Path, new: Collection[str] = ()) -> None:
    """Say what to do where a merge cannot be gone on with because its inputs are elsewhere.

    Args:
        recipe: what is to be merged.
        out: the former output.
        new: experts that are not in it.

    Raises:
        BadFile: some are not there.
    """
    gone = {name: path for name, path in lost(recipe).items() if name not in new}
    if gone:
        name, path = next(iter(gone.items()))
        more = f", and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise BadFile(f"{out}: {_called(name)} is not at {path}{more}; where it is now: r2m relink {out} {name}=PATH")


def relink(out: str | Path, places: Mapping[str, str]) -> Recipe:
    """Write into an output where its inputs are now. One that is not what was merged is refused.

    Args:
        out: the output of a merge.
        places: ``base`` or an expert's name → path.

    Returns:
        The recipe, as it is now.

    Raises:
        InvalidInput: no such expert, an input that is still elsewhere, or another checkpoint.
        OSError: a file cannot be read or written; ``filename`` is set.
    """
    former.recipe_of(out)  # where it is none, nothing is made beside it
    with held(out):
        before = former.recipe_of(out)
        _refuse_edited(Path(out))
        for name in places:
            if name != BASE and name not in before.experts:
                raise BadOption(f"{name}: expected one of {', '.join((BASE, *before.experts))}")
        experts = {name: replace(one, path=places.get(name, one.path)) for name, one in before.experts.items()}
        recipe = replace(before, base=places.get(BASE, before.base), experts=experts)
        refuse_lost(recipe, out)
        what = f"{out}: {STATE.file}"
        state = STATE.whole(Path(out), what)
        with as_written(what):
            _refuse_others(recipe, places, state)
            _write(Path(out), recipe, state)
    return recipe


def _refuse_edited(directory: Path) -> None:
    """The recipe is written anew: what somebody has put into it, a comment perhaps, would be lost."""
    report = REPORT.whole(directory, f"{directory}: {REPORT.file}")
    with as_written(f"{directory}: {REPORT.file}"):
        known = report[WRITTEN].get(RECIPE_FILE, ())
    if digest(directory / RECIPE_FILE) not in known:
        raise BadFile(
            f"{directory / RECIPE_FILE}: was changed since a merge wrote it, and would be written anew; change its "
            "paths there, and merge it into another directory"
        )


def _refuse_others(recipe: Recipe, places: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Task vectors of the smallest tensors have the lengths that the merge found."""
    arranged, names = open_job(recipe, Options()).arranged, state["state"]["order of experts"]
    grams = {name: one["tasks"] for name, one in state["grams"].items() if one and name in arranged.base.specs}
    smallest = sorted(grams, key=lambda name: arranged.base.specs[name].numel)
    for name in names if BASE in places else places:
        expert, place = arranged.experts[name], names.index(name)
        for tensor in [one for one in smallest if grams[one][place][place] > 0][:_LOOKED_AT]:
            change = expert.read(tensor).double() - arranged.base.read(tensor).double()
            if not math.isclose(float(change.square().sum()), grams[tensor][place][place], rel_tol=_ROUNDING):
                which = BASE if BASE in places else name
                raise BadFile(
                    f"{_called(which)} ({places[which]}): is not what was merged: the change of {quoted(tensor)} has "
                    "another length"
                )


def _write(directory: Path, recipe: Recipe, state: Mapping[str, Any]) -> None:
    content = dump(recipe, directory)
    report = REPORT.whole(directory, f"{directory}: {REPORT.file}")
    before = report[WRITTEN].get(RECIPE_FILE, ())
    rewrite(directory, report, RECIPE_FILE, before, plain_yaml.dump(content).encode())
    found = state["state"]
    paths = [(found["base_model"], content["base_model"])]
    paths += [(found["experts"][one["name"]]["model"], one["model"]) for one in content["models"]]
    experts = {one["name"]: {**found["experts"][one["name"]], "model": one["model"]} for one in content["models"]}
    # Times of change stay those of the files that were merged: another time says that they may be others.
    inputs = {_moved(file, paths): one for file, one in found[INPUTS].items()}
    found = {**found, "base_model": content["base_model"], "experts": experts, INPUTS: inputs}
    new_file(directory / STATE.file, STATE.text({**state, "state": found}, indent=None))


def _moved(file: str, paths: Sequence[tuple[str, str]]) -> str:
    """Where a file of an input is, which may be a directory, by where inputs were and are."""
    for before, now in paths:
        if file == before or file.startswith(f"{before}{os.sep}"):
            return now + file.removeprefix(before)
    return file


def _called(name: str) -> str:
    return name if name == BASE else f"expert {quoted(name)}"
