"""Which models are compared with which: a merge with its specialists and their average, where they are among them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from r2m import plain_yaml
from r2m.checkpoints import hub
from r2m.evaluation.resampling import MEAN, RESAMPLED, Resampled
from r2m.ownership import RECIPE_FILE
from r2m.places import read_small, to_output
from r2m.records import REPORT
from r2m_kernels.errors import BadFile, BadOption, quoted

MERGE, AVERAGE, SPECIALIST = "merge", "average", "specialist"
_AVERAGES = "weight_average"  # the method
_LISTED = 5


@dataclass(frozen=True)
class Role:
    """What a model is among the others.

    Attributes:
        kind: a merge, the average (a merge by that method), a specialist of a merge, or None of these.
        specialists: of a merge or an average, those that are among the models.
    """

    kind: str | None = None
    specialists: tuple[str, ...] = ()


@dataclass(frozen=True)
class Merged:
    """What a recipe beside a checkpoint says.

    Attributes:
        method: by which it was merged.
        experts: name → path.
    """

    method: str
    experts: Mapping[str, str]


@dataclass
class Differences:
    """What was compared, and what could not be.

    Attributes:
        rows: as an evaluation's file has them.
        unpaired: sentences.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)


def roles(paths: Mapping[str, str]) -> dict[str, Role]:
    """Of models, by the recipes that merges leave beside their checkpoints.

    Args:
        paths: model → its checkpoint.
    """
    recipes = {name: merged(path) for name, path in paths.items()}
    specialists: dict[str, tuple[str, ...]] = {}
    for name, recipe in recipes.items():
        experts = [] if recipe is None else list(recipe.experts.values())
        specialists[name] = tuple(
            other for other, path in paths.items() if other != name and any(_same(path, one) for one in experts)
        )
    theirs = {other for names in specialists.values() for other in names}
    found = {}
    for name, recipe in recipes.items():
        kind = None if recipe is None else AVERAGE if recipe.method == _AVERAGES else MERGE
        found[name] = Role(kind or (SPECIALIST if name in theirs else None), specialists[name])
    return found


def baselines(known: Mapping[str, Role], asked: Sequence[str], models: Sequence[str]) -> dict[str, list[str]]:
    """With which models each is compared.

    Args:
        known: roles of models.
        asked: names that all others are compared with; none: a merge with its specialists and with averages of any of
            them; where that gives nothing, all with the first.
        models: all of them.

    Raises:
        BadOption: a name that is no model's.
    """
    strange = next((name for name in asked if name not in models), None)
    if strange is not None:
        some = ", ".join(map(quoted, islice(models, _LISTED)))
        raise BadOption(f"--against {strange}: no model is called that; expected one of {some}")
    if not asked:
        pairs = {name: _of_merge(name, role, known) for name, role in known.items() if role.kind == MERGE}
        found = {name: others for name, others in pairs.items() if others}
        if found:
            return found
    against = list(asked) or list(models[:1])
    return {name: [other for other in against if other != name] for name in models if {*against} - {name}}


def differences(
    resampled: Resampled,
    judged: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Sequence[str]],
    left_out: Iterable[str] = (),
) -> Differences:
    """Of metrics, model by model, on each dataset and of the means over those that both were judged on.

    Args:
        resampled: gives the intervals.
        judged: model → its entry in an evaluation's file.
        pairs: model → with whom.
        left_out: datasets that are not in the means.
    """
    found = Differences()
    for model, others in pairs.items():
        for than in others:
            ours, theirs = judged[model]["datasets"], judged[than]["datasets"]
            both = [name for name in ours if name in theirs]
            paired = [name for name in both if resampled.paired(model, than, name)]
            for name in both:
                if name not in paired:
                    found.unpaired.append(
                        f"{quoted(model)} and {quoted(than)} have scores of different videos on {quoted(name)}: no "
                        "difference is told"
                    )
            for key in RESAMPLED:
                defined = [name for name in paired if ours[name][key] is not None]
                kept = [name for name in defined if name not in {*left_out}]
                groups = {name: [name] for name in defined} | ({MEAN: kept} if len(kept) > 1 else {})
                for dataset, names in groups.items():
                    values = [ours[name][key] - theirs[name][key] for name in names]
                    row = {"model": model, "than": than, "dataset": dataset, "metric": key}
                    row |= {"difference": sum(values) / len(values)}
                    found.rows.append({**row, "interval": resampled.difference(model, than, names, key)})
    return found


def _of_merge(name: str, role: Role, known: Mapping[str, Role]) -> list[str]:
    averages = [
        other
        for other, one in known.items()
        if other != name and one.kind == AVERAGE and {*one.specialists} & {*role.specialists}
    ]
    return [*role.specialists, *averages]


def merged(path: str) -> Merged | None:
    """What a merge made of what, of who lies there; None where it is no merge."""
    checkpoint = hub.local(path)
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    what = f"{directory}: {RECIPE_FILE}"
    if not (directory / REPORT.file).is_file():  # somebody's recipe beside a checkpoint
        return None
    try:
        recipe = plain_yaml.load(read_small(directory / RECIPE_FILE, what), what)
        experts = {
            str(one["name"]): one["model"] if hub.is_reference(one["model"]) else to_output(directory, one["model"])
            for one in recipe["models"]
        }
        return Merged(str(recipe["merge_method"]), experts)
    except (OSError, BadFile, LookupError, TypeError, AttributeError):
        return None


def _same(path: str, expert: str) -> bool:
    """Whether both are one checkpoint: the file, or the directory that holds it."""
    if hub.is_reference(path) or hub.is_reference(expert):
        return path == expert
    one, other = Path(os.path.realpath(path)), Path(os.path.realpath(expert))
    return one == other or one == other.parent or one.parent == other
