"""docs/quality.md, from the committed JSON: its numbers are made here, its text is ``page.md.j2``.

    python -m bench.quality.docs [--check]

``--check`` exits with 1 where the page is another. ``ideas.md`` is measured no more: see bench/README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from r2m.demo.evaluation import auc

from bench.machine import RESULTS, ROOT
from bench.markdown import render, update
from bench.quality import settings, tables
from bench.quality.groups import GROUPS
from bench.quality.tables import against, cells, difference, differences, reported, runs_of, short
from r2m_kernels import MergeConfig

RESULT, PAGE = RESULTS / "quality.json", ROOT / "docs" / "quality.md"
Content = Mapping[str, Any]
Rows = list[list[str]]
TOLERATED, GOAL = -0.005, 0.022
LOOKED_AT = ["in-distribution", "unseen"]
FOLLOWED = ("joint training", "ensemble", "weight average × 1.2", "TIES", "CART", "R2M", "R2M, paper's settings")
# A merge is bad where it ranks this much worse than the ensemble of the same specialists (AUC).
BAD = 0.10


class Rule(NamedTuple):
    """An alarm on one number of the report, ``above`` or ``below`` a threshold that was set on the development runs."""

    number: str  # as ``studies`` calls it
    side: str
    threshold: float
    warns: bool = False  # the package warns of it: a test holds its thresholds to these


RULES = (
    Rule("smallest cosine", "below", 0.05, warns=True),
    Rule("mean cosine", "below", 0.06),
    Rule("longest/median task vector", "above", 3.0, warns=True),
    Rule("largest/smallest task vector", "above", 3.5),
    Rule("leading expert's share of the core", "above", 0.9, warns=True),
    Rule("‖core‖/‖mean‖", "below", 0.9),
    Rule("mean/mean norm", "below", 0.7),
    Rule("largest scale", "above", 1.5),
    Rule("gap", "below", 0.3),
)


def text(content: Content) -> str:
    """The whole page."""
    runs = runs_of(content, reported(content))
    parts = {name: runs_of(content, reported(content), name) for name in ("cnn", "vit")}
    rows = tables.rows_of(content, ideas=False)
    today = MergeConfig.r2m().to_dict()
    former = [f"`{name}={value!r}`" for name, value in content["default"].items() if today.get(name) != value]
    return render(
        Path(__file__).with_name("page.md.j2"),
        content=content,
        former=former,
        titles=_titles,
        short=short,
        tolerated=TOLERATED,
        goal=GOAL,
        looked_at=LOOKED_AT,
        groups=list(GROUPS["scratch"]),
        runs=runs,
        which=reported(content),
        verdict=_verdict(content, runs),
        results=[
            [_bold(row["row"]), *cells(row), short(row["worst"]), row["worst_forgery"], short(row["ece"])]
            for row in tables.main_table(content, rows, runs)
        ],
        differences=[
            [_bold(row), *differences(content, row, GROUPS["scratch"], runs)]
            for row in rows
            if row not in ("weight average", "base")
        ],
        parts=parts,
        by_part=[
            [row, *(cell for part in parts.values() for cell in differences(content, row, LOOKED_AT, part))]
            for row in FOLLOWED
        ],
        rows=rows,
        curves=_curves(list(content["sweeps"].values())),
        several=_several([one for of_run in content["many"].values() for one in of_run["merges"]]),
        wrong=_wrong(list(content["robustness"].values())),
        features=_features([one["features"] for one in content["analysis"].values()]),
        heads=_heads([one["heads"] for one in content["analysis"].values()]),
        identities=_identities([one["identities"] for one in content["analysis"].values()]),
        alarms=_alarms(content),
    )


def _bold(row: str) -> str:
    return f"**{row}**" if row == "R2M" else row


def _titles(firsts: Iterable[str]) -> list[str]:
    return [f"{first}, {group}" for first in firsts for group in LOOKED_AT]


def _means(rows: Iterable[str], columns: Iterable[Any], numbers: Callable[[str, Any], Iterable[float]]) -> Rows:
    """A row each: its name, and the mean of some numbers in every column."""
    columns = list(columns)
    return [[row, *(short(float(np.mean([*numbers(row, column)]))) for column in columns)] for row in rows]


def _verdict(content: Content, runs: Sequence[str]) -> dict[str, Any]:
    """R²M against every baseline, how many bars it meets, and how far it goes to what no merge has."""
    pairs = [(other, group) for other in tables.BASELINES for group in LOOKED_AT]
    gained = {(other, group): against(content, "R2M", other, group, runs) for other, group in pairs}
    marked = {pair: difference(gained[pair]) + " **below**" * (gained[pair]["low"] < TOLERATED) for pair in pairs}
    gains = {group: gained["weight average", group]["mean"] for group in LOOKED_AT}

    def share(other: str, group: str) -> float:
        rows = ("R2M", other, "weight average")
        ours, theirs, average = (float(np.mean(tables.values(content, row, group, runs))) for row in rows)
        return 100 * (ours - average) / (theirs - average)

    return {
        "rows": [[other, *(marked[other, group] for group in LOOKED_AT)] for other in tables.BASELINES],
        "met": sum(one["low"] >= TOLERATED for one in gained.values()),
        "bars": len(pairs),
        "gains": gains,
        "missing": {group: short(GOAL - gain) for group, gain in gains.items() if gain < GOAL},
        "share": share,
    }


def _curves(sweeps: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], Rows]]:
    """Header and rows of each."""
    return [
        (
            [name, *(f"{place:g}" for place, _ in points)],
            _means(LOOKED_AT, range(len(points)), lambda group, i, name=name: (s[name][i][1][group] for s in sweeps)),
        )
        for name, points in sweeps[0].items()
    ]


def _several(merges: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = sorted({len(one["experts"]) for one in merges})
    aucs = {count: [one["auc"] for one in merges if len(one["experts"]) == count] for count in counts}
    rows = _means(merges[0]["auc"], counts, lambda row, count: (one[row]["six families"] for one in aucs[count]))
    return {"header": ["specialists", *map(str, counts)], "series": len(aucs[counts[0]]), "rows": rows}


def _wrong(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    aucs: dict[str, list[Any]] = {}
    for run in runs:
        for case, numbers in run.items():
            aucs.setdefault(case, []).append(numbers["auc"])
    methods = list(runs[0]["as trained"]["auc"])
    rows = _means(aucs, methods, lambda case, row: (one[row]["in-distribution"] for one in aucs[case]))
    return {"header": ["case", *methods], "rows": [[f"{case} ({len(aucs[case])} runs)", *r] for case, *r in rows]}


def _features(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cosines between specialists and from them to merges, and how far apart Real and Fake lie in each model."""
    models = runs[0]["models"]
    experts = [models.index(kind) for kind in settings.MAIN]

    def cosine(kind: str, model: str | None = None) -> float:
        pairs = [(i, j) for i in experts for j in experts if i < j]
        pairs = pairs if model is None else [(i, models.index(model)) for i in experts]
        return float(np.mean([[one[kind][i][j] for i, j in pairs] for one in runs]))

    def spread(model: str, key: str) -> float:
        return float(np.mean([one["spread"][model][key] for one in runs]))

    formats = {"separation": ".2f", "off_axis": ".3f", "size": ".2f"}
    rows = [[model, *(format(spread(model, key), digits) for key, digits in formats.items())] for model in models]
    return {"cosine": cosine, "spread": rows}


def _heads(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    places = [(trunk, group) for trunk in runs[0] for group in LOOKED_AT]
    labels = next(iter(runs[0].values()))
    rows = _means(labels, places, lambda label, place: (one[place[0]][label][place[1]] for one in runs))
    return {"trunks": list(runs[0]), "rows": rows}


def _identities(runs: Sequence[Mapping[str, float]]) -> Rows:
    numbers = {key: [one[key] for one in runs] for key in runs[0]}
    return [[key, f"{np.mean(value):.2g}", f"{max(value):.2g}"] for key, value in numbers.items()]


def judged(merges: Iterable[Mapping[str, Any]], rule: Rule) -> list[str]:
    """AUC of a number, bad above good merges; then bad ones with an alarm of all bad, and good ones of all good.

    Merges whose report lacks the number count as without alarm.
    """
    sign = 1.0 if rule.side == "above" else -1.0
    numbers: dict[bool, list[float | None]] = {True: [], False: []}
    for one in merges:
        numbers[one["shortfall"] > BAD].append(one["report"][rule.number])
    known = {bad: np.array([sign * number for number in of if number is not None]) for bad, of in numbers.items()}
    alarms = [f"{(known[bad] > sign * rule.threshold).sum()}/{len(numbers[bad])}" for bad in (True, False)]
    return [short(auc(known[False], known[True])), ", ".join(alarms)]


def _alarms(content: Content) -> Rows:
    runs: dict[bool, list[Any]] = {True: [], False: []}
    for name, merges in content["diagnosis"].items():
        runs[name in content["development"]] += merges
    rows = []
    for rule in RULES:
        rates = *judged(runs[True], rule), *judged(runs[False], rule)
        rows.append([rule.number, f"{rule.side} {rule.threshold:g}", *rates, "yes" if rule.warns else "no"])
    return rows


def write(content: Content, path: Path = PAGE) -> None:
    """The page, from the content of the JSON."""
    path.write_text(text(content))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    return update(
        PAGE, text(json.loads(RESULT.read_text())), check=options.check, command="python -m bench.quality.docs"
    )


if __name__ == "__main__":
    raise SystemExit(main())
