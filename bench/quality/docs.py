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
from typing import Any

from bench.machine import ROOT
from bench.markdown import put, render, update
from bench.quality import settings, study_pages, tables
from bench.quality.groups import UNSEEN
from bench.quality.models import runs_of
from bench.quality.store import STORE
from bench.quality.tables import AVERAGE, CALIBRATION, DEFAULT, ENSEMBLE, SCALED, bold, difference, named, short, shown

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
GOAL_MINUTES, GOAL_CORES = 45, 2
"""That judging all fresh runs from trained detectors was to take."""


def pages(content: Content) -> dict[Path, str]:
    """Every page, and the README with its lines."""
    made = partial(render, content=content, **_names(content))
    found = {DOCS / path.name.removesuffix(".j2"): made(path) for path in sorted(TEMPLATES.glob("quality*.md.j2"))}
    lines = made(TEMPLATES / "readme.md.j2")
    return {**found, README: put(README.read_text(), "quality", lines, COMMAND)}


def _names(content: Content) -> dict[str, Any]:
    """What templates can say."""
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
        "lopsided": len({frozenset(_compared(content, of)) for name, (_, of, _) in sections.items() if name in UNSEEN})
        > 1,
        "readme": _readme(sections),
        "elsewhere": _elsewhere(sections),
        "ahead": _ahead(content, sections),
        "cost": _cost(content.get("cost", {})),
        **study_pages.names(content),
    }


def _cost(cost: Content) -> dict[str, Any]:
    """What judging all fresh runs takes, and of which that was measured; nothing where it was not."""
    if not cost.get("fresh"):
        return {}
    fresh = [run.name for run in runs_of(settings.fresh_of)]
    measured = {name: run for name, run in cost["runs"].items() if name in fresh}
    rows = [
        [name, f"{run['models']}", f"{run['pictures']}", f"{run['cpu_seconds'] / 60:.1f}"]
        for name, run in measured.items()
    ]
    return {
        "rows": rows,
        "runs": len(fresh),
        "measured": len(rows),
        "minutes": f"{cost['fresh']['cpu_seconds'] / 60:.0f}",
        "goal": GOAL_MINUTES * GOAL_CORES,
        "goal_words": f"{GOAL_MINUTES} minutes on {GOAL_CORES} cores",
        "machine": cost["machine"],
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
        of = {"joint training": "joint training", ENSEMBLE: ENSEMBLE, DEFAULT: bold(DEFAULT)}
        for row, words in {**of, best: f"{bold(best)}, the best of {count}"}.items():
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
        [bold(row), *(difference(section["parts"][part][row][group]) for part, group in places)]
        for row in rows
        if row in section["rows"] and row != AVERAGE
    ]
    return ["method", *(f"{part}, {group}" for part, group in places)], body


def _main(section: Content, unseen: str) -> Rows:
    """The first page's table: AUC and difference to the average in two groups, calibration."""
    groups, rows = [KNOWN, unseen], []
    for row in (one for one in MAIN if one in section["rows"]):
        of = section["rows"][row]
        gains = [difference(of["minus"][AVERAGE][group]) if row != AVERAGE else "" for group in groups]
        cells = [cell for group, gain in zip(groups, gains, strict=True) for cell in (short(of["mean"][group]), gain)]
        rows.append([bold(row), *cells, *tables.calibrated(section, row, KNOWN)])
    return rows


def _full(section: Content, rows: Iterable[str]) -> Rows:
    """AUC of every group, worst group and forgery, and calibration in-distribution."""
    groups = section["groups"]
    return [
        [
            bold(row),
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
        [bold(row), *tables.differences(section, row, other, section["groups"])]
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
        [bold(row), *(cell for group in section["groups"] for cell in tables.calibrated(section, row, group))]
        for row in section["rows"]
    ]
    return ["method", *(f"{name}, {group}" for group in section["groups"] for name in CALIBRATION.values())], body


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
