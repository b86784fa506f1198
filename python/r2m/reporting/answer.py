"""The answer: how well the merge detects, beside what it was made of, as sentences and as one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from r2m.evaluation.metrics import METRICS
from r2m.reporting.figures import Rows
from r2m.reporting.matrix import number, signed
from r2m.reporting.standing import AVERAGE, SPECIALIST, Standing
from r2m.shorten import shorten

# Of test sets' names in a row, each with room for a number at least; with more they stand upright over their columns.
_BESIDE, _ROOM = 48, 7
_LETTERS = 18  # of a test set's name where the table has little room
# Of the table as a picture, in inches; also of a letter.
_ROW, _COLUMN, _LETTER = 0.36, 0.78, 0.085


@dataclass(frozen=True)
class Entry:
    """What stands in one place of the table: a number and what is beneath it; strong where it decides something."""

    text: str
    beneath: str = ""
    strong: bool = False
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A row of the table: a model, what it is, and its entries below the headings."""

    name: str
    full: str
    role: str
    leads: bool
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Table:
    """Models × test sets.

    Attributes:
        headings: of the columns that sum up, then of the test sets.
        sums: how many sum up.
        titles: of the test sets, whole.
        upright: whether their names stand upright.
        lines: the models.
    """

    headings: Sequence[str]
    sums: int
    titles: Sequence[str]
    upright: bool
    lines: Sequence[Line]


def sentences(of: Standing) -> list[str]:
    """How well it detects, by how much that is more than what there was, and where it is worst."""
    name, sets = of.first, of.datasets
    over = f"AUC on {of.sets[sets[0]]}" if len(sets) == 1 else f"mean AUC over {len(sets)} test sets"
    said = [f"{of.short[name]} {_level(of.mean(name), of.mean_interval(name))} {over}"]
    for what, other in (("best specialist", of.specialist), ("weight average", of.average)):
        if other is not None and other != name:
            called = what if of.short[other] in what else f"{what} ({of.short[other]})"
            said.append(f"{called} {number(of.mean(other))}: {_compared(of, name, other)}")
    worst = of.worst(name)
    if worst is not None and len(sets) > 1:
        said.append(f"worst test set: {of.sets[worst[0]]} {number(worst[1])}")
    return said


def _level(value: float | None, interval: Sequence[float] | None) -> str:
    return number(value) + ("" if interval is None else f" {_ends(interval)}")


def _compared(of: Standing, name: str, other: str) -> str:
    """Which is better, if the numbers tell."""
    found = of.difference(name, other)
    if found is None:
        return "not compared"
    value, interval = found
    if interval is None:
        return f"difference {signed(value)}"
    told = f"{signed(value)} {_ends(interval, 3, signs=True)}"
    if interval[0] > 0:
        return f"better by {told}"
    return f"worse by {told}" if interval[1] < 0 else f"not told apart, {told}"


def _ends(interval: Sequence[float], digits: int = 2, *, signs: bool = False) -> str:
    return "[{}, {}]".format(*((signed if signs else number)(end, digits) for end in interval))


def notes(of: Standing) -> list[str]:
    """What a reader has to know before the numbers are believed."""
    said = [foreign] if (foreign := of.foreign()) is not None else []
    have = {frozenset(one["datasets"]) for one in of.models.values()}
    if len(have) > 1:
        said.append("Not all models were judged on all test sets: their means are over those they have.")
    return [*said, *of.measured.get("warnings", ())]


def missing(of: Standing) -> list[str]:
    """What the evaluation does not say, and how it would."""
    told = []
    if of.by_name:
        whose = (
            f"that {of.short[of.merged]} is this merge"
            if of.merged is not None and of.merged in of.by_name
            else "who is who"
        )
        told.append(f"Files of scores do not say which checkpoint gave them: {whose} is taken from names.")
    if of.merged is None:
        return told
    lacking = [role for role, name in ((SPECIALIST, of.specialist), (AVERAGE, of.average)) if name is None]
    how = {
        SPECIALIST: "No specialist is among the models: evaluate them too, to see whether merging gained anything.",
        AVERAGE: "No weight average is among the models: merge with --method weight_average and evaluate it too, to "
        "see what this method adds.",
    }
    return told + [how[role] for role in lacking]


def table(of: Standing) -> Table:
    """The answer's table, by role and mean."""
    sums = ["mean", "worst"]
    beside = [
        (f"minus {title}", other)
        for title, other in (("best specialist", of.specialist), ("average", of.average))
        if other is not None and set(of.roles) != {other}
    ]
    several = len(of.datasets) > 1
    best = {
        dataset: max((one for name in of.roles if (one := of.value(name, dataset)) is not None), default=None)
        for dataset in of.datasets
    }
    most = max((one for name in of.roles if (one := of.mean(name)) is not None), default=None)
    short = shorten(of.datasets, limit=_LETTERS)
    lines = []
    for name, role in of.roles.items():
        entries = [_entry(of.mean(name), of.mean_interval(name), most)] if several else []
        if several:
            worst = of.worst(name)
            entries.append(Entry("–") if worst is None else Entry(number(worst[1], 3), short[worst[0]], title=worst[0]))
        entries += [_difference(of, name, other) for _, other in beside]
        entries += [_entry(of.value(name, one), of.interval(name, one), best[one]) for one in of.datasets]
        lines.append(Line(of.short[name], name, role, name == of.merged, entries))
    headings = [*(sums if several else []), *(title for title, _ in beside)]
    sets = [short[name] for name in of.datasets]
    upright = sum(max(len(name), _ROOM) for name in sets) > _BESIDE
    return Table([*headings, *sets], len(headings), list(of.datasets), upright, lines)


def _entry(value: float | None, interval: Sequence[float] | None, best: float | None) -> Entry:
    beneath = "" if interval is None else "{}–{}".format(*(number(end) for end in interval))
    return Entry(number(value, 3), beneath, strong=value is not None and value == best)


def _difference(of: Standing, name: str, other: str) -> Entry:
    found = of.difference(name, other)
    if found is None:
        return Entry("" if name == other else "–")
    value, interval = found
    if interval is None:
        return Entry(signed(value), title="without an interval: the evaluation did not compare the two")
    told = interval[0] > 0 or interval[1] < 0
    return Entry(signed(value), " to ".join(signed(end) for end in interval), strong=told)


def rows(of: Standing) -> Rows:
    """The same as numbers."""
    return [dict(_row(of, name)) for name in of.roles]


def _row(of: Standing, name: str) -> Iterator[tuple[str, Any]]:
    worst = of.worst(name) or (None, None)
    yield from {"model": name, "role": of.roles[name], "mean": of.mean(name)}.items()
    yield from _low_high("mean", of.mean_interval(name))
    yield from {"worst": worst[1], "worst test set": worst[0]}.items()
    for title, other in (("best specialist", of.specialist), ("average", of.average)):
        found = of.difference(name, other)
        yield f"minus {title}", None if found is None else found[0]
        yield from _low_high(f"minus {title}", None if found is None else found[1])
    for dataset in of.datasets:
        yield dataset, of.value(name, dataset)
        yield from _low_high(dataset, of.interval(name, dataset))


def _low_high(title: str, interval: Sequence[float] | None) -> Iterator[tuple[str, float | None]]:
    low, high = (None, None) if interval is None else interval
    yield f"{title}, low", low
    yield f"{title}, high", high


def summary(of: Standing) -> Rows:
    """Means over the test sets of all metrics, of frames; those that an evaluation of before lacks are left out."""
    there = {key: one for key, one in METRICS.items() if any(key in model["average"] for model in of.models.values())}
    return [
        {"model": of.short[name], **{one.heading: number(of.mean(name, key), 3) for key, one in there.items()}}
        for name in of.roles
    ]


def draw(shown: Table, axes: Axes) -> None:
    """The table as a picture, for who pastes pictures. Columns and rows are 1 apart; rows go downwards."""
    places = _places(shown)
    axes.text(0.05, -0.75, "model", va="bottom", weight="bold")
    for column, heading in enumerate(shown.headings):
        upright = shown.upright and column >= shown.sums
        text = heading if column >= shown.sums else heading.replace(" ", "\n", 1)
        turn = 90 if upright else 0
        axes.text(places[column], -0.75, text, ha="center", va="bottom", weight="bold", rotation=turn)
    for row, line in enumerate(shown.lines):
        if line.leads:
            axes.axhspan(row - 0.5, row + 0.5, color="#0072b2", alpha=0.12, linewidth=0)
        axes.text(0.05, row, line.name, va="center", weight="bold" if line.leads else "normal")
        for place, entry in zip(places, line.entries, strict=True):
            up = 0.13 if entry.beneath else 0.0
            axes.text(
                place, row - up, entry.text, ha="center", va="center", weight="bold" if entry.strong else "normal"
            )
            axes.text(place, row + 0.22, entry.beneath, ha="center", va="center", size=7)
    axes.axhline(-0.6, color="#7a7a7b", linewidth=0.8)
    axes.set_xlim(0, _right(shown))
    axes.set_ylim(len(shown.lines) - 0.5, -1.0 - _above(shown) / _ROW)
    axes.set_axis_off()


def _places(shown: Table) -> list[float]:
    """Middles of the columns; those that sum up have more in them."""
    widths = [1.6] * shown.sums
    for heading in shown.headings[shown.sums :]:
        widths.append(1.0 if shown.upright else max(1.0, len(heading) * _LETTER / _COLUMN + 0.25))
    first = max(len(line.name) for line in shown.lines) * _LETTER / _COLUMN + 0.3
    return [first + sum(widths[:column]) + width / 2 for column, width in enumerate(widths)]


def _right(shown: Table) -> float:
    """Where the last column ends."""
    places = _places(shown)
    return places[-1] + (places[-1] - places[-2] if len(places) > 1 else 1.0) / 2 + 0.1


def _above(shown: Table) -> float:
    """Inches of the headings."""
    upright = max(map(len, shown.headings[shown.sums :]), default=0) * _LETTER if shown.upright else 0.0
    return max(upright, 0.35)


def drawn_size(shown: Table) -> tuple[float, float]:
    """Of that picture, in inches."""
    return _COLUMN * _right(shown), _above(shown) + _ROW * (len(shown.lines) + 1)
