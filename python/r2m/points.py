"""What a sweep merges: every combination of some options' values, of one method or of several, under names."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r2m.options import SWEPT
from r2m.recipe import Recipe
from r2m_kernels import MergeConfig
from r2m_kernels.checks import choice
from r2m_kernels.config import METHODS
from r2m_kernels.errors import BadOption
from r2m_kernels.fields import FILES, OPTIONS
from r2m_kernels.options import flag

# Options that may have several values: those of an analysis, and what methods have of their own.
GRID = (*SWEPT, "scale", "density")
_OF_SCALE = ("core_scale", "eta")  # what methods make of their factor
Asked = tuple[str, Mapping[str, Any]]  # a method, and options of it by key


@dataclass(frozen=True)
class Point:
    """One merge of a sweep.

    Attributes:
        name: of its directory.
        method: by which its configuration was made.
        config: how it is merged.
        row: what the table says of it beside what was found, by column.
    """

    name: str
    method: str
    config: MergeConfig
    row: Mapping[str, Any]

    @property
    def analysis(self) -> str:
        """What an analysis depends on: points that have it in common are merged from one."""
        free = [field for field in SWEPT if field != "rank" or self.config.spectrum == "truncate"]
        fixed = {name: value for name, value in self.config.to_dict().items() if name not in free}
        return json.dumps([self.method, fixed])


def points_of(recipe: Recipe, values: Mapping[str, Sequence[Any]], methods: Iterable[Asked] = ()) -> list[Point]:
    """Every combination.

    Args:
        recipe: of the merge that they vary.
        values: option of :data:`GRID`, by key → what it takes, in methods that use it.
        methods: the methods, each with options of its own; none: the recipe's.

    Raises:
        BadOption: an option or a value cannot be used, or two points are the same.
    """
    methods = list(methods)
    known = GRID if methods else SWEPT
    for key, given in values.items():
        if key not in known:
            raise BadOption(f"{key}: cannot be swept over; expected one of {', '.join(known)}")
        if len({repr(value) for value in given}) < len(given) or not given:
            raise BadOption(f"{key}: expected different values, got {', '.join(map(str, given)) or 'none'}")
    if methods:
        return _of_methods(recipe, values, methods)
    if not values:
        raise BadOption(f"sweep: expected values of one option at least: {', '.join(SWEPT)}; or methods")
    points = []
    for one in _combinations(values):
        config = recipe.config.replace(**one)
        row = {"point": _name(one), **{key: getattr(config, key) for key in one}}
        points.append(Point(_name(one), recipe.method, config, row))
    return points


def _of_methods(recipe: Recipe, values: Mapping[str, Sequence[Any]], methods: Sequence[Asked]) -> list[Point]:
    for name, _ in methods:
        choice("method", name, tuple(METHODS))
    unused = next((key for key in values if not any(key in METHODS[name].options for name, _ in methods)), None)
    if unused is not None:
        raise BadOption(f"{flag(unused)}: none of the methods {', '.join(name for name, _ in methods)} uses it")
    columns = list(dict.fromkeys([*values, *(key for _, own in methods for key in own)]))
    points: dict[str, Point] = {}
    for method, own in methods:
        used = METHODS[method].options
        grid = {key: given for key, given in values.items() if key in used and key not in own}
        for one in _combinations(grid):
            given = {**own, **one}
            config, name = _configured(recipe, method, given), _name({"method": method, **given})
            if name in points:
                raise BadOption(f"sweep: expected different points, got {name} twice")
            row = {key: _value(method, config, key, given) for key in columns}
            points[name] = Point(name, method, config, {"point": name, "method": method, **row})
    return list(points.values())


def _configured(recipe: Recipe, method: str, given: Mapping[str, Any]) -> MergeConfig:
    """A method with options, and with what the recipe says that is not its own method's business.

    Weights, and what becomes of some tensors by name, are the same in all points; of the recipe's own method all is.
    """
    config: MergeConfig = METHODS[method].configure(given)
    before = METHODS[recipe.method].configure({}) if recipe.method in METHODS else MergeConfig()
    kept: dict[str, Any] = {}
    for field, declared in OPTIONS.items():
        of_all = declared.section == FILES or field == "weights"
        carried = of_all or (field == "exclude" and "exclude" in METHODS[method].options) or method == recipe.method
        value = getattr(recipe.config, field)
        touched = declared.key in given or ("scale" in given and field in _OF_SCALE)
        if carried and not touched and value != getattr(before, field):
            kept[field] = value
    return config.replace(**kept)


def _value(method: str, config: MergeConfig, key: str, given: Mapping[str, Any]) -> Any:
    """What the table says of an option; nothing where the method does not use it."""
    used = METHODS[method].options
    if key not in used:
        return ""
    if key == "scale":  # no field of the configuration
        return float(given.get(key, METHODS[method].default(key)))
    return getattr(config, used[key].name)


def _combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


def _name(values: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items())


def widest(points: Sequence[MergeConfig]) -> MergeConfig:
    """What has to be analyzed for all of them, which differ in options of :data:`r2m.options.SWEPT` alone."""
    ranks = [point.rank for point in points]
    if len({type(rank) for rank in ranks}) > 1:
        raise BadOption(f"rank: expected shares alone or whole numbers alone, got {', '.join(map(str, ranks))}")
    strongest = max(points, key=lambda point: point.eta)
    return strongest.replace(rank=max(ranks))
