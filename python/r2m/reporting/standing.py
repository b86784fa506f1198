"""Who is who in an evaluation beside a merge, in which order they are shown, and by how much they differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m import former
from r2m.checkpoints import hub
from r2m.places import read_beside
from r2m.records import REPORT
from r2m.shorten import shorten
from r2m_kernels.errors import InvalidInput

FRAMES, VIDEOS = "auc", "video_auc"  # what the answer is given in, and where a video has several frames
MERGED, SPECIALIST, AVERAGE, BASE, MERGE, OTHER = "this merge", "specialist", "average", "base", "a merge", "other"
_ORDER = (MERGED, AVERAGE, SPECIALIST, BASE, MERGE, OTHER)
_MEAN = "mean"  # over datasets, in an evaluation's differences
_AVERAGES = "weight_average"  # the method
# What models are called in files of scores, of which nobody knows which checkpoint gave them.
_USUAL = {MERGED: ("merged", "merge", "r2m"), AVERAGE: (_AVERAGES, "average", "mean", "soup"), BASE: ("base",)}


@dataclass(frozen=True)
class Standing:
    """An evaluation, read for one merge.

    Attributes:
        measured: its content.
        roles: model → what it is beside the merge; in the order in which models are shown: by role, the best first.
        by_name: models whose role is known from what they are called alone.
        datasets: all of them.
        metric: in which the answer is given.
        short, sets: model, dataset → its name on tables and pictures.
        merged, specialist, average: the merge, the best of its specialists, and the weight average, which the merge
            itself may be; None: not there.
    """

    measured: Mapping[str, Any]
    roles: Mapping[str, str]
    by_name: Sequence[str]
    datasets: Sequence[str]
    metric: str
    short: Mapping[str, str]
    sets: Mapping[str, str]
    merged: str | None
    specialist: str | None
    average: str | None

    @property
    def models(self) -> Mapping[str, Any]:
        """What was measured, by model, as it was written."""
        models: Mapping[str, Any] = self.measured["models"]
        return models

    @property
    def unit(self) -> str:
        """Of what the answer's metric is."""
        return "frames" if self.metric == FRAMES else "videos"

    @property
    def first(self) -> str:
        """The model that the answer is about: the merge, or the best of all where it is not there."""
        return self.merged or max(self.roles, key=lambda name: _known(self.mean(name)))

    @property
    def ranked(self) -> list[str]:
        """Models as pictures have them: what the answer names, then the others, the best first."""
        answer = [name for name in (self.merged, self.specialist, self.average) if name is not None]
        rest = sorted((name for name in self.roles if name not in answer), key=lambda name: -_known(self.mean(name)))
        return answer + rest

    @property
    def specialists(self) -> list[str]:
        """Those of the merge, in its order of experts where it is known."""
        return [name for name, role in self.roles.items() if role == SPECIALIST]

    def value(self, model: str, dataset: str, metric: str | None = None) -> float | None:
        """Of a metric on a dataset; None where the model was not judged there, or it is undefined."""
        found: float | None = self.models[model]["datasets"].get(dataset, {}).get(metric or self.metric)
        return found

    def interval(self, model: str, dataset: str, metric: str | None = None) -> list[float] | None:
        """Of the same."""
        found: list[float] | None = (
            self.models[model]["datasets"].get(dataset, {}).get("intervals", {}).get(metric or self.metric)
        )
        return found

    def mean(self, model: str, metric: str | None = None) -> float | None:
        """Over the datasets that define the metric."""
        found: float | None = self.models[model]["average"].get(metric or self.metric)
        return found

    def mean_interval(self, model: str, metric: str | None = None) -> list[float] | None:
        """Of the same; that of the dataset where there is one alone. Evaluations of before have none."""
        if len(self.datasets) == 1:
            return self.interval(model, self.datasets[0], metric)
        found: list[float] | None = self.models[model].get("average_intervals", {}).get(metric or self.metric)
        return found

    def worst(self, model: str, metric: str | None = None) -> tuple[str, float] | None:
        """The dataset where a metric of which more is better is least, and what it is there."""
        chosen = self.measured.get("settings", {}).get("threshold_from")
        values = {name: self.value(model, name, metric) for name in self.datasets if name != chosen}
        defined = {name: value for name, value in values.items() if value is not None}
        return min(defined.items(), key=lambda item: item[1]) if defined else None

    def difference(
        self, model: str, than: str | None, dataset: str | None = None, metric: str | None = None
    ) -> tuple[float, list[float] | None] | None:
        """Of two models: paired, with its interval, where the evaluation has it; else of their numbers alone.

        Args:
            model, than: the first minus the second.
            dataset: on which; None: of their means.
            metric: of what; None: of what the answer is given in.
        """
        if than is None or model == than:
            return None
        metric, at = metric or self.metric, dataset or (self.datasets[0] if len(self.datasets) == 1 else _MEAN)
        for row in self.measured.get("differences", ()):
            if (row["dataset"], row["metric"]) == (at, metric) and {row["model"], row["than"]} == {model, than}:
                sign = 1 if row["model"] == model else -1
                ends = None if row["interval"] is None else sorted(sign * end for end in row["interval"])
                return sign * row["difference"], ends
        one, other = (
            self.mean(name, metric) if dataset is None else self.value(name, dataset, metric) for name in (model, than)
        )
        return None if one is None or other is None else (one - other, None)

    def foreign(self) -> str | None:
        """A sentence where the evaluation is not of this merge."""
        if self.merged is not None:
            return None
        if not {SPECIALIST, BASE} & set(self.roles.values()):
            return (
                "This evaluation is of other models than this merge: neither its output nor any of its specialists is "
                "among them. Nothing below it says how well this merge detects."
            )
        return (
            "The merged model itself is not in this evaluation, only what it was merged from: r2m evaluate with "
            "--model OUT says how well it detects."
        )


def _known(value: float | None) -> float:
    return -1.0 if value is None else value


def standing(measured: Mapping[str, Any], report: Mapping[str, Any], out: str | Path) -> Standing:
    """Find out who is who: by where checkpoints lie, and of scores without one by how they are called.

    Args:
        measured: the evaluation's content, its sources as who is elsewhere has them.
        report: the merge's.
        out: where its output is.
    """
    found, by_name = _roles(measured["models"], report, Path(out))
    judged = [of for one in measured["models"].values() for of in one["datasets"].values()]
    metric = FRAMES if all(of["frames"] == of["videos"] for of in judged) else VIDEOS
    means = {name: _known(one["average"].get(metric)) for name, one in measured["models"].items()}
    roles = dict(sorted(found.items(), key=lambda item: (_ORDER.index(item[1]), -means[item[0]])))

    def best(role: str) -> str | None:
        return next((name for name, one in roles.items() if one == role), None)

    datasets = list(dict.fromkeys(name for one in measured["models"].values() for name in one["datasets"]))
    specialists = [name for name, role in roles.items() if role == SPECIALIST]
    rest = [name for name in roles if name not in specialists]
    short, sets = shorten(specialists, rest), shorten(datasets)
    merged = best(MERGED)
    average = merged if report["method"] == _AVERAGES else best(AVERAGE)
    return Standing(measured, roles, by_name, datasets, metric, short, sets, merged, best(SPECIALIST), average)


def _roles(models: Mapping[str, Any], report: Mapping[str, Any], out: Path) -> tuple[dict[str, str], list[str]]:
    places = _places(out)
    found, by_name = {}, []
    for name, one in models.items():
        source = str(one["source"])
        role = next((role for role, path in places if _same(source, path)), None)
        if role is None:
            role = _of_merge(source, one)
        if role is None and one.get("detector") is None:
            role = _by_name(name, report, out)
            by_name += [name] * (role is not None)
        found[name] = role or OTHER
    return found, by_name


def _places(out: Path) -> list[tuple[str, str]]:
    """Where the merge and what it was made of lie; of a recipe that cannot be read, the merge alone."""
    places = [(MERGED, str(out))]
    try:
        recipe = former.recipe_of(out)
    except (InvalidInput, OSError):
        return places
    return places + [(SPECIALIST, one.path) for one in recipe.experts.values()] + [(BASE, recipe.base)]


def _same(source: str, path: str) -> bool:
    """Whether both are one checkpoint: a file, or the directory it lies in."""
    if hub.is_reference(path):
        return source == path or source.endswith(path)
    one, other = os.path.realpath(source), os.path.realpath(path)
    return one == other or (os.path.dirname(one) == other and os.path.isdir(other)) or one == os.path.dirname(other)


def _of_merge(source: str, one: Mapping[str, Any]) -> str | None:
    """Of the output of another merge; evaluations of before do not say whether it is one."""
    if "role" in one:
        return {"average": AVERAGE, "merge": MERGE}.get(one["role"])
    directory = Path(source) if os.path.isdir(source) else Path(source).parent
    method = read_beside(directory / REPORT.file).get("method")
    return None if method is None else AVERAGE if method == _AVERAGES else MERGE


def _by_name(name: str, report: Mapping[str, Any], out: Path) -> str | None:
    if name in report["experts"]:
        return SPECIALIST
    usual = {**_USUAL, MERGED: (*_USUAL[MERGED], out.name, report["method"])}
    return next((role for role in (MERGED, AVERAGE, BASE) if name in usual[role]), None)
