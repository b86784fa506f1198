"""docs/quality*.md and the README's lines on quality, from the committed summary: numbers here, text in ``pages/``.

    python -m bench.quality.docs [--check]

``--check`` exits with 1 where a page is another.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from r2m.demo.evaluation import auc

from bench.machine import ROOT
from bench.markdown import put, render, update
from bench.quality import settings, tables
from bench.quality.groups import UNSEEN
from bench.quality.store import STORE
from bench.quality.tables import AVERAGE, CALIBRATION, DEFAULT, ENSEMBLE, SCALED, difference, named, short, shown

KNOWN = "in-distribution"
SUMMARY, DOCS, README = STORE / "summary.json", ROOT / "docs", ROOT / "README.md"
TEMPLATES = Path(__file__).with_name("pages")
COMMAND = "python -m bench.quality.docs"
Content = Mapping[str, Any]
Rows = list[list[str]]
# What the first page's tables show, of what there is.
MAIN = (
    "joint training",
    ENSEMBLE,
    "compressed ensemble, rank 0.05",
    AVERAGE,
    SCALED,
    "task arithmetic",
    "TIES",
    "CART",
    "STAR",
    "TSV-M",
    "SCORE",
    "SWUDI",
    "MonoSoup",
    DEFAULT,
    "R2M",
    "R2M decorrelated",
    "R2M, public kit's settings",
)
GOAL = {"ensemble": 0.8, "joint training": 0.5}
"""Shares of their gain over the average that one merged model was to make on the pretrained base."""
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


def pages(content: Content) -> dict[Path, str]:
    """Every page, and the README with its lines."""
    made = partial(render, content=content, **_names(content))
    found = {DOCS / path.name.removesuffix(".j2"): made(path) for path in sorted(TEMPLATES.glob("quality*.md.j2"))}
    lines = made(TEMPLATES / "readme.md.j2")
    return {**found, README: put(README.read_text(), "quality", lines, COMMAND)}


def _names(content: Content) -> dict[str, Any]:
    """What templates can say."""
    studies = content["studies"]
    studied = [name for name in settings.REGIMES if any(run.startswith(name) for run in studies)]
    sections = {name: (*shown(content, name), UNSEEN.get(name, "code")) for name in content["sections"]}
    return {
        "sections": sections,
        "deciding": {name: of for name, of in sections.items() if name in UNSEEN},
        "kinds": lambda *kinds: [row for row, kind in content["methods"].items() if kind in kinds],
        "trained": list(tables.TRAINED),
        "average": AVERAGE,
        "default": DEFAULT,
        "ensemble": ENSEMBLE,
        "calibration_header": list(CALIBRATION.values()),
        "main": _main,
        "full": _full,
        "minus": _minus,
        "against": _against,
        "named": named,
        "joined": lambda rows: " and ".join(map(named, rows)),
        "missing": lambda section, rows: [named(row) for row in rows if row not in section["rows"]],
        "shared": _shared,
        "shares": _shares(content, sections),
        "goal": _goal(content, sections),
        "forms": [row for row, kind in content["methods"].items() if kind == "ours" and _is_form(row)],
        "by_part": _by_part,
        "forgeries": _forgeries,
        "calibrations": _calibrations,
        "short": short,
        "difference": difference,
        "chosen_on": Counter(run.partition("-")[0] for run in content["validated"]),
        "studied": studied,
        "several": partial(_several, studies),
        "wrong": partial(_wrong, studies),
        "features": {name: _features(studies, name) for name in studied},
        "alarms": partial(_alarms, studies),
        "lopsided": len({frozenset(_compared(content, of)) for name, (_, of, _) in sections.items() if name in UNSEEN})
        > 1,
        "readme": _readme(sections),
        "elsewhere": _elsewhere(sections),
        "ahead": _ahead(content, sections),
    }


def _compared(content: Content, section: Content) -> list[str]:
    """Rows of a section that are methods, ours and others'."""
    return [row for row in section["rows"] if content["methods"].get(row) in ("peer", "ours")]


def _is_form(row: str) -> bool:
    """Whether a row of ours is R²M alone, and not the default."""
    return row.startswith("R2M") and row != DEFAULT and "decorrelated" not in row and "cleaned" not in row


def _share(section: Content, row: str, other: str, group: str) -> float | None:
    """How much a row makes of another's gain over the average, where that has one."""
    gain, most = (section["rows"][one]["minus"][AVERAGE][group]["mean"] for one in (row, other))
    return gain / most if most > 0 else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _shared(section: Content, unseen: str) -> str:
    """Half a sentence on the default's share of the ensemble's gain."""
    known, other = (_share(section, DEFAULT, ENSEMBLE, group) for group in (KNOWN, unseen))
    if known is None or other is None:
        return f"; the default makes {_percent(known)} of that in-distribution" if known is not None else ""
    return f"; the default makes {_percent(known)} and {_percent(other)} of that"


def _best(content: Content, section: Content) -> tuple[str, int]:
    """The single model merged without data that is highest in-distribution, and of how many."""
    rows = [row for row in _compared(content, section) if "ensemble" not in row and row != AVERAGE]
    return max(rows, key=lambda row: section["rows"][row]["mean"][KNOWN]), len(rows)


def _shares(content: Content, sections: Mapping[str, Any]) -> Rows:
    """What the ensemble, the default and the best merge have over the average, and of the ensemble's and joint's."""
    rows = []
    for name, (_, section, unseen) in sections.items():
        if name not in UNSEEN:
            continue
        best, count = _best(content, section)
        of = {"joint training": "joint training", ENSEMBLE: ENSEMBLE, DEFAULT: _bold(DEFAULT)}
        for row, words in {**of, best: f"{_bold(best)}, the best of {count}"}.items():
            cells = [f"{words}, {name}"]
            for group in (KNOWN, unseen):
                cells.append(short(section["rows"][row]["minus"][AVERAGE][group]["mean"], True))
                shares = [_percent(_share(section, row, other, group)) for other in GOAL]
                cells += shares if row not in GOAL else [""] * len(GOAL)
            rows.append(cells)
    return rows


def _goal(content: Content, sections: Mapping[str, Any]) -> dict[str, Any]:
    """What the best merge makes of the goal on the pretrained base; nothing where that was not judged."""
    if "pretrained" not in sections:
        return {}
    _, section, unseen = sections["pretrained"]
    best, _ = _best(content, section)
    shares = {
        "known": _share(section, best, ENSEMBLE, KNOWN),
        "unseen": _share(section, best, ENSEMBLE, unseen),
        "joint": _share(section, best, "joint training", KNOWN),
    }
    met = [
        share is not None and share >= GOAL["joint training" if of == "joint" else ENSEMBLE]
        for of, share in shares.items()
    ]
    return {"row": named(best), "reached": all(met), **{of: _percent(share) for of, share in shares.items()}}


def _readme(sections: Mapping[str, Any]) -> Rows:
    """R²M minus both averages, in each regime."""
    return [
        [f"{other}, {name}", *tables.differences(section, DEFAULT, other, (KNOWN, unseen))]
        for name, (_, section, unseen) in sections.items()
        if name in UNSEEN
        for other in (AVERAGE, SCALED)
    ]


def _by_part(section: Content, unseen: str, rows: Iterable[str]) -> tuple[list[str], Rows]:
    """Header and difference to the weight average by architecture."""
    places = [(part, group) for part in section["parts"] for group in (KNOWN, unseen)]
    body = [
        [_bold(row), *(difference(section["parts"][part][row][group]) for part, group in places)]
        for row in rows
        if row in section["rows"] and row != AVERAGE
    ]
    return ["method", *(f"{part}, {group}" for part, group in places)], body


def _bold(row: str) -> str:
    return f"**{named(row)}**" if row == DEFAULT else named(row)


def _main(section: Content, unseen: str) -> Rows:
    """The first page's table: AUC and difference to the average in two groups, calibration."""
    groups, rows = [KNOWN, unseen], []
    for row in (one for one in MAIN if one in section["rows"]):
        of = section["rows"][row]
        gains = [difference(of["minus"][AVERAGE][group]) if row != AVERAGE else "" for group in groups]
        cells = [cell for group, gain in zip(groups, gains, strict=True) for cell in (short(of["mean"][group]), gain)]
        rows.append([_bold(row), *cells, *tables.calibrated(section, row, KNOWN)])
    return rows


def _full(section: Content, rows: Iterable[str]) -> Rows:
    """AUC of every group, worst group and forgery, and calibration in-distribution."""
    groups = section["groups"]
    return [
        [
            _bold(row),
            *tables.cells(section, row, groups),
            section["rows"][row]["worst_group"],
            f"{short(section['rows'][row]['worst'])} {section['rows'][row]['worst_forgery']}",
            *tables.calibrated(section, row, groups[0]),
        ]
        for row in rows
        if row in section["rows"]
    ]


def _minus(section: Content, rows: Iterable[str], other: str) -> Rows:
    """Differences to another row in every group."""
    return [
        [_bold(row), *tables.differences(section, row, other, section["groups"])]
        for row in rows
        if row in section["rows"] and row != other
    ]


def _against(section: Content, group: str, row: str = DEFAULT, other: str = AVERAGE) -> str:
    """One difference in words: what is shown, and what is not."""
    found = section["rows"][row]["minus"][other][group]
    words = "ahead by" if found["low"] > 0 else "behind by" if found["high"] < 0 else "not shown to differ,"
    size = short(abs(found["mean"])) if found["low"] > 0 or found["high"] < 0 else short(found["mean"], True)
    return f"{words} {size} (95 % interval {short(found['low'], True)} to {short(found['high'], True)})"


OTHERS = {
    "cross": "shifted parameters and another camera",
    "natural": "photographs without a face",
    "neural": "forgeries by networks, of one kind",
}


def _ahead(content: Content, sections: Mapping[str, Any]) -> list[str]:
    """Other methods whose interval to the default lies above 0, by regime and group."""
    found = []
    for name, (_, section, unseen) in sections.items():
        for group in (KNOWN, unseen) if name in UNSEEN else ():
            gains = {
                row: section["rows"][row]["minus"][DEFAULT][group]
                for row in section["rows"]
                if content["methods"].get(row) == "peer"
            }
            rows = [f"{row} ({short(gain['mean'], True)})" for row, gain in gains.items() if gain["low"] > 0]
            found.append(f"{group} ({name}) {', '.join(rows) or 'none'} of {len(gains)}")
    return found


def _elsewhere(sections: Mapping[str, Any]) -> list[str]:
    """The default against the average in the groups that decide nothing."""
    return [
        f"on {OTHERS[group]} (*{group}*, {name}) {_against(section, group)}"
        for name, (_, section, unseen) in sections.items()
        if name in UNSEEN
        for group in section["groups"]
        if group not in (KNOWN, unseen)
    ]


def _forgeries(section: Content) -> tuple[list[str], Rows]:
    """Header and AUC of every forgery, for what the first page shows."""
    rows = [row for row in MAIN if row in section["rows"]]
    first = next(iter(section["rows"].values()))["forgeries"]
    kinds = [(group, kind) for group, of in first.items() for kind in of]
    body = [
        [f"{kind} ({group})", *(short(section["rows"][row]["forgeries"][group][kind]) for row in rows)]
        for group, kind in kinds
    ]
    return ["forgery", *map(named, rows)], body


def _calibrations(section: Content) -> tuple[list[str], Rows]:
    """Header; ECE, F1 and best F1 in every group."""
    body = [
        [_bold(row), *(cell for group in section["groups"] for cell in tables.calibrated(section, row, group))]
        for row in section["rows"]
    ]
    return ["method", *(f"{name}, {group}" for group in section["groups"] for name in CALIBRATION.values())], body


def _of(studies: Content, architecture: str, what: str) -> list[Any]:
    return [of[what] for run, of in studies.items() if run.partition("-")[0] == architecture and what in of]


def _several(studies: Content, architecture: str) -> dict[str, Any]:
    """Mean AUC over six families by the number of specialists."""
    merges = [one for of in _of(studies, architecture, "many") for one in of]
    counts = sorted({len(one["experts"]) for one in merges})
    rows = [
        [_bold(row)]
        + [
            short(_mean(one["auc"][row]["six families"] for one in merges if len(one["experts"]) == count))
            for count in counts
        ]
        for row in (merges[0]["auc"] if merges else ())
    ]
    return {"header": ["specialists", *map(str, counts)], "rows": rows}


def _wrong(studies: Content, architecture: str) -> dict[str, Any]:
    """In-distribution AUC of every case."""
    runs = _of(studies, architecture, "robustness")
    methods = list(runs[0]["as trained"]) if runs else []
    rows = [
        [case, *(short(_mean(run[case][row]["in-distribution"] for run in runs)) for row in methods)]
        for case in (runs[0] if runs else ())
    ]
    return {"header": ["case", *methods], "rows": rows, "runs": len(runs)}


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
        [_bold(model)] + [format(_mean(one["spread"][model][key] for one in runs), how) for key, how in formats.items()]
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


def write(content: Content) -> None:
    """Every page."""
    for path, text in pages(content).items():
        path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    made = pages(json.loads(SUMMARY.read_text()))
    return max(update(path, text, check=options.check, command=COMMAND) for path, text in made.items())


if __name__ == "__main__":
    raise SystemExit(main())
