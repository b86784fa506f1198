"""What pages say of studies: features, more specialists, bad ones, alarms, and how far specialists may move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
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
GOOD = 0.02
"""Specialists are still good where they lack no more than this on their own families, of what usual ones have (AUC)."""
LENGTH_GROUPS = ("in-distribution", "code")


class Moved(NamedTuple):
    """The runs of one way to move specialists."""

    times: int  # the usual steps or rate
    length: float  # ‖τ‖/‖θ₀‖, mean
    own: float  # AUC of specialists on their own families, mean
    good: bool  # beside the usual ones of the same runs
    entries: Sequence[Content]
    whole: bool  # every run of the study is there

    def minus(self, row: str, other: str, group: str) -> list[float]:
        """Difference in AUC, each run."""
        return [one["auc"][row][group] - one["auc"][other][group] for one in self.entries]

    def mean(self, row: str, group: str) -> float:
        """AUC over the runs."""
        return _mean(one["auc"][row][group] for one in self.entries)

    def percent(self) -> str:
        """Its length."""
        return f"{100 * self.length:.1f} %"

    def place(self) -> list[str]:
        """The first two cells of a row."""
        return [f"{self.times}{'' if self.whole else _only(self.entries)}", self.percent()]

    def words(self) -> str:
        """Its length in a sentence, with what its specialists know."""
        return f"{self.percent()} (own family {short(self.own)}{'' if self.whole else _only(self.entries)})"


def _only(entries: Sequence[Content]) -> str:
    return f", {_count(entries)} only"


def _lengths(studied: Content) -> dict[str, Any]:
    """What came out with more steps, and at higher rates; nothing where the study was not run."""
    if not studied:
        return {}
    ways = {how: _moved(studied, how) for how in ("steps", "rate")}
    return {
        "runs": len(studied),
        "good": short(GOOD),
        "luck": 2 ** len(studied),
        "ways": {how: _way(how, moved) for how, moved in ways.items() if len(moved) > 1},
    }


def _moved(studied: Content, how: str) -> list[Moved]:
    """The usual specialists, and those with more ``steps`` or a higher ``rate``."""

    def at(entry: Content) -> int | None:
        return entry.get(how, 1 if entry.get("rate") == 1 else None)

    usual = {run: one for run, of in studied.items() for one in of if at(one) == 1}
    found = []
    for times in sorted({at(one) for of in studied.values() for one in of} - {None}):
        of_run = {run: one for run, of in studied.items() for one in of if at(one) == times and run in usual}
        entries = list(of_run.values())
        own, before = (
            _mean(auc for one in ones for auc in one["own_families"]) for ones in (entries, map(usual.get, of_run))
        )
        length = _mean(one for entry in entries for one in entry["relative_to_base"])
        found.append(Moved(times, length, own, own >= before - GOOD, entries, len(of_run) == len(studied)))
    return found


def _way(how: str, every: Sequence[Moved]) -> dict[str, Any]:
    """Lengths, AUC, differences to the average; decorrelated minus the default, and where it is ahead in every run.

    Who is ahead is told of lengths at which the average still detects.
    """
    tables: dict[str, Rows] = {group: [] for group in LENGTH_GROUPS}
    turned: Rows = []
    for moved in every:
        for group in LENGTH_GROUPS:
            gains = [short(_mean(moved.minus(row, AVERAGE, group)), True) for row in (ENSEMBLE, *MOVED)]
            tables[group].append([*moved.place(), short(moved.own), short(moved.mean(AVERAGE, group)), *gains])
        apart = (moved.minus(MOVED[0], DEFAULT, group) for group in LENGTH_GROUPS)
        turned.append([*moved.place(), *(" ".join(short(one, True) for one in gains) for gains in apart)])
    lost = [moved for moved in every if moved.mean(AVERAGE, LENGTH_GROUPS[0]) < LOST]
    asked = [moved for moved in every if moved not in lost]
    start = [how, "‖τ‖/‖θ₀‖"]
    return {
        "most": every[-1].times,
        "header": [*start, "own family", AVERAGE, ENSEMBLE, *map(bold, MOVED)],
        "tables": tables,
        "turned": turned,
        "turned_header": [*start, *LENGTH_GROUPS],
        "rows_span": f"{every[0].percent()} to {every[-1].percent()}",
        "lost": ", ".join(moved.percent() for moved in lost),
        "words": " ".join(_turn(group, asked) for group in LENGTH_GROUPS),
        "border": "; ".join(_border(group, asked) for group in LENGTH_GROUPS),
    }


def _turn(group: str, every: Sequence[Moved]) -> str:
    """Where one rule is ahead of the other in every run, and where behind."""
    gains = [(moved, moved.minus(MOVED[0], DEFAULT, group)) for moved in every]
    ahead = [moved.words() for moved, of in gains if min(of) > 0]
    behind = [moved.words() for moved, of in gains if max(of) < 0]
    return (
        f"In every run, {group}, decorrelated is ahead at {', '.join(ahead) or 'no length'}; "
        f"behind at {', '.join(behind) or 'no length'}."
    )


def _border(group: str, every: Sequence[Moved]) -> str:
    """From which length on one rule is behind the other in every run, of good specialists of all runs."""
    good = [moved for moved in every if moved.good and moved.whole]
    past = list(takewhile(lambda moved: max(moved.minus(MOVED[0], DEFAULT, group)) < 0, reversed(good)))
    if not past:
        return f"{group}, from no length on"
    if len(past) == len(good):
        return f"{group}, at every length, the usual one too"
    return f"{group}, from {past[-1].percent()} on"


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
