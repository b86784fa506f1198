"""What pages say of studies: features, more specialists, bad ones, alarms, and how far specialists may move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from r2m.demo.evaluation import auc

from bench.quality import settings
from bench.quality.tables import AVERAGE, DEFAULT, ENSEMBLE, bold, short

Content = Mapping[str, Any]
Rows = list[list[str]]
# A merge is bad where it ranks this much worse than the ensemble of the same specialists (AUC).
BAD = 0.10


class Rule(NamedTuple):
    """An alarm on one number of the report, ``above`` or ``below`` a threshold."""

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


def names(content: Content) -> dict[str, Any]:
    """What the templates can say of studies."""
    studies = content["studies"]
    studied = [name for name in settings.REGIMES if any(run.startswith(name) for run in studies)]
    return {
        "studied": studied,
        "several": partial(_several, studies),
        "wrong": partial(_wrong, studies),
        "features": {name: _features(studies, name) for name in studied},
        "alarms": partial(_alarms, studies),
        "lengths": _lengths(content.get("lengths", {})),
    }


def _of(studies: Content, architecture: str, what: str) -> list[Any]:
    return [of[what] for run, of in studies.items() if run.partition("-")[0] == architecture and what in of]


def _several(studies: Content, architecture: str) -> dict[str, Any]:
    """Mean AUC over six families by the number of specialists."""
    runs = _of(studies, architecture, "many")
    merges = [one for of in runs for one in of]
    counts = sorted({len(one["experts"]) for one in merges})
    rows = [
        [bold(row)]
        + [
            short(_mean(one["auc"][row]["six families"] for one in merges if len(one["experts"]) == count))
            for count in counts
        ]
        for row in (merges[0]["auc"] if merges else ())
    ]
    return {"header": ["specialists", *map(str, counts)], "rows": rows, "runs": _count(runs)}


def _wrong(studies: Content, architecture: str) -> dict[str, Any]:
    """In-distribution AUC of every case."""
    runs = _of(studies, architecture, "robustness")
    methods = list(runs[0]["as trained"]) if runs else []
    rows = [
        [case, *(short(_mean(run[case][row]["in-distribution"] for run in runs)) for row in methods)]
        for case in (runs[0] if runs else ())
    ]
    return {"header": ["case", *map(bold, methods)], "rows": rows, "runs": _count(runs)}


def _count(runs: Sequence[Any]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def _features(studies: Content, architecture: str) -> dict[str, Any]:
    """Cosines between specialists and from them to merges, and how far apart Real and Fake lie in each model."""
    runs = _of(studies, architecture, "features")
    models = runs[0]["models"]
    experts = [models.index(kind) for kind in settings.MAIN]

    def cosine(kind: str, model: str | None = None) -> str:
        pairs = [(i, j) for i in experts for j in experts if i < j]
        pairs = pairs if model is None else [(i, models.index(model)) for i in experts]
        return f"{_mean(one[kind][i][j] for one in runs for i, j in pairs):.2f}"

    def alone(run: Content, kind: str) -> float:
        return _mean(run[kind][i][j] for i in experts for j in experts if i < j)

    formats = {"separation": ".2f", "off_axis": ".3f", "size": ".2f"}
    rows = [
        [bold(model)] + [format(_mean(one["spread"][model][key] for one in runs), how) for key, how in formats.items()]
        for model in models
    ]
    columns = [(kind, model) for model in (None, AVERAGE, DEFAULT) for kind in ("real", "fake")]
    return {
        "cosines": [cosine(*column) for column in columns],
        "holds": sum(alone(one, "real") > alone(one, "fake") for one in runs),
        "rows": rows,
        "common": f"{_mean(one['common'] for one in runs):.2f}",
        "runs": len(runs),
    }


MOVED = ("R2M decorrelated", "R2M decorrelated, by tensor", "TSV-M × 1", DEFAULT)
"""What is followed to longer task vectors, beside the ensemble."""


LOST = 0.6
"""AUC in-distribution below which nothing of an average is left that others could be compared with."""


def _lengths(studied: Content) -> dict[str, Any]:
    """By learning rate, over the runs: ‖τ‖/‖θ₀‖, AUC, differences to the average; decorrelated minus the default.

    Who is ahead in every run is told of lengths at which the average still detects.

    Returns:
        What the template names; nothing where the study was not run.
    """
    if not studied:
        return {}
    groups = ("in-distribution", "code")
    by_rate = list(zip(*studied.values(), strict=True))
    tables: dict[str, Rows] = {group: [] for group in groups}
    turned: Rows = []
    ahead: dict[str, list[str]] = {group: [] for group in groups}
    behind: dict[str, list[str]] = {group: [] for group in groups}
    lost: list[str] = []
    for of in by_rate:
        moved = [length for one in of for length in one["relative_to_base"]]
        place = [f"{of[0]['rate']}", f"{100 * float(np.mean(moved)):.1f} %"]

        def minus(row: str, other: str, group: str, of: Sequence[Content] = of) -> list[float]:
            return [one["auc"][row][group] - one["auc"][other][group] for one in of]

        own = short(_mean(auc for one in of for auc in one["own_families"]))
        for group in groups:
            average = short(_mean(one["auc"][AVERAGE][group] for one in of))
            gains = [short(_mean(minus(row, AVERAGE, group)), True) for row in (ENSEMBLE, *MOVED)]
            tables[group].append([*place, own, average, *gains])
        apart = {group: minus(MOVED[0], DEFAULT, group) for group in groups}
        turned.append([*place, *(" ".join(short(one, True) for one in gains) for gains in apart.values())])
        if _mean(one["auc"][AVERAGE][groups[0]] for one in of) < LOST:
            lost.append(place[1])
            continue
        for group, gains in apart.items():
            ahead[group] += [place[1]] if min(gains) > 0 else []
            behind[group] += [place[1]] if max(gains) < 0 else []
    start = ["rate", "‖τ‖/‖θ₀‖"]
    return {
        "runs": len(studied),
        "header": [*start, "own family", AVERAGE, ENSEMBLE, *map(bold, MOVED)],
        "tables": tables,
        "turned": turned,
        "rows_span": f"{turned[0][1]} to {turned[-1][1]}",
        "lost": ", ".join(lost),
        "words": " ".join(_turn(group, ahead[group], behind[group]) for group in groups),
        "turned_header": [*start, *groups],
    }


def _turn(group: str, ahead: Sequence[str], behind: Sequence[str]) -> str:
    """Where one rule is ahead of the other in every run, and where behind."""
    return (
        f"In every run, {group}, decorrelated is ahead at {' and '.join(ahead) or 'no length'}, "
        f"behind at {' and '.join(behind) or 'no length'}."
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def judged(merges: Sequence[Content], rule: Rule) -> list[str]:
    """AUC of a number, bad above good merges; then bad ones with an alarm of all bad, and good ones of all good.

    Merges whose report lacks the number count as without alarm; where none is bad there is no AUC.
    """
    sign = 1.0 if rule.side == "above" else -1.0
    numbers: dict[bool, list[float | None]] = {True: [], False: []}
    for one in merges:
        numbers[one["shortfall"] > BAD].append(one["report"][rule.number])
    known = {bad: np.array([sign * number for number in of if number is not None]) for bad, of in numbers.items()}
    alarms = [f"{(known[bad] > sign * rule.threshold).sum()}/{len(numbers[bad])}" for bad in (True, False)]
    ranked = short(auc(known[False], known[True])) if all(map(len, known.values())) else "–"
    return [ranked, ", ".join(alarms)]


def _alarms(studies: Content) -> tuple[list[str], Rows]:
    """Header, and every rule by regime."""
    merges: dict[str, list[Any]] = {}
    for run, of in studies.items():
        merges.setdefault(settings.REGIMES[run.partition("-")[0]], []).extend(of["diagnosis"])
    header = [f"{what}, {regime}" for regime in merges for what in ("AUC", "bad found, false alarms")]
    rows = [
        [
            rule.number,
            f"{rule.side} {rule.threshold:g}",
            *(cell for of in merges.values() for cell in judged(of, rule)),
            "yes" if rule.warns else "no",
        ]
        for rule in RULES
    ]
    return ["number of the report", "alarm", *header, "a warning?"], rows
