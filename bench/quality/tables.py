"""The tables, from the logits: as JSON, of which the pages are made, and on stdout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from r2m.demo.detectors import SPECIALISTS
from r2m.demo.table import new_table
from rich.console import Console

from bench.quality import protocol, settings, store
from bench.quality.choosing import choose
from bench.quality.judging import by_forgery, calibration, mean_of, paired
from bench.quality.methods import all_methods
from r2m_kernels import MergeConfig

Content = Mapping[str, Any]
AVERAGE, SCALED, ENSEMBLE = "weight average", "weight average × 1.2", "ensemble"
# The package's default, by whatever name it is compared.
DEFAULT = next(one.name for one in all_methods() if [*one.candidates.values()] == [MergeConfig.r2m()])
# Rows have the names that the protocol was written with; tables say what they have come to be.
NAMES = {DEFAULT: "R2M, the default", "R2M": "R2M, rank .1, all rows alike"}
# What every row is compared with, run by run.
COMPARED = (AVERAGE, SCALED, DEFAULT)
TRAINED = ("base", *SPECIALISTS.values(), "joint training", ENSEMBLE)
# A table each; the second pretrained base decides nothing.
SECTIONS = {"scratch": ("cnn", "vit"), "pretrained": ("mobilenet",), "second base": ("lite0",)}
CALIBRATION = {"ece": "ECE", "f1": "F1", "best_f1": "best F1"}


def summarize(directory: Path, each: Callable[..., Iterable[Any]] = map) -> dict[str, Any]:
    """Everything that pages and pictures show, from the files of the runs.

    Args:
        directory: with ``logits/``, and ``validated.json``, ``studies.json``, ``lengths.json``, ``cost.json`` where
            these were made.
        each: as ``map``: one that works on several runs at once.
    """
    paths = sorted(directory.glob("logits/*.npz"), key=lambda path: order(path.stem))
    runs = dict(zip((path.stem for path in paths), each(numbers_of, paths), strict=True))
    validated = _read(directory / "validated.json")
    content: dict[str, Any] = {
        "methods": {method.name: method.kind for method in all_methods()},
        "validated": validated,
        "chosen": choose(validated),
        "studies": _read(directory / "studies.json"),
        "lengths": _read(directory / "lengths.json"),
        "cost": _read(directory / "cost.json"),
        "about": {name: run["about"] for name, run in runs.items()},
        "sections": {},
    }
    begun = {name: run["rows"] for name, run in runs.items() if {AVERAGE, DEFAULT} <= run["rows"].keys()}
    for section, architectures in SECTIONS.items():
        for which, fresh in (("fresh", True), ("development", False)):
            if names := [n for n in begun if _place(n)[0] in architectures and _is_fresh(n) == fresh]:
                content["sections"].setdefault(section, {})[which] = _section({n: begun[n] for n in names})
    content["protocol"] = _decided({name: rows for name, rows in begun.items() if _is_fresh(name)})
    return content


def rounded(number: str) -> float:
    """A number of JSON with five digits: what is printed has three."""
    return float(f"{float(number):.5g}")


def numbers_of(path: Path) -> dict[str, Any]:
    """Of one run: row → AUC of groups and forgeries, and calibration of groups."""
    judged = store.load(path)
    scores = {row: judged.scores(row) for row in judged.logits}
    scores[ENSEMBLE] = mean_of([scores[row] for row in SPECIALISTS.values()])
    rows = [row for row in (*TRAINED, *(method.name for method in all_methods())) if row in scores]
    numbers = {}
    for row in rows:
        forgeries = by_forgery(scores[row])
        auc = {group: float(np.mean(list(of.values()))) for group, of in forgeries.items()}
        calibrated = {group: calibration(of) for group, of in scores[row].items()}
        numbers[row] = {"auc": auc, "forgeries": forgeries, "calibration": calibrated}
    return {"rows": numbers, "about": judged.about}


def order(run: str) -> tuple[int, int]:
    """To sort names of runs by: architecture, then seed."""
    architecture, seed = _place(run)
    return list(settings.REGIMES).index(architecture), seed


def _place(run: str) -> tuple[str, int]:
    architecture, seed = run.removesuffix("-quick").split("-")
    return architecture, int(seed)


def _is_fresh(run: str) -> bool:
    return _place(run)[1] in settings.FRESH


def _decided(fresh: Content) -> dict[str, Any]:
    """What the protocol says of the fresh runs, once all of them have its rows."""
    content = protocol.read()
    found = {"sha256": protocol.digest(), **content}
    runs = {
        regime: {name: rows for name, rows in fresh.items() if _place(name)[0] in SECTIONS[regime]}
        for regime in content["groups"]
    }
    wanted = protocol.rows(content)
    if not all(of and all(row in rows for rows in of.values() for row in wanted) for of in runs.values()):
        return {**found, "decided": None}
    return {
        **found,
        "runs": {regime: len(of) for regime, of in runs.items()},
        "decided": protocol.decide(
            content, lambda regime, row, other, group: difference_in(runs[regime], row, other, group)
        ),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def difference_in(runs: Content, row: str, other: str, group: str) -> dict[str, float]:
    """Paired difference of two rows in a group; seeds are drawn whole."""
    by_seed: dict[int, list[float]] = {}
    for name, rows in runs.items():
        by_seed.setdefault(_place(name)[1], []).append(rows[row]["auc"][group] - rows[other]["auc"][group])
    return paired(by_seed)


def _section(runs: Content) -> dict[str, Any]:
    """One table: rows that all of its runs have."""
    first = next(iter(runs.values()))
    rows = [row for row in first if all(row in of_run for of_run in runs.values())]
    groups = list(first[rows[0]]["auc"])
    parts = {part: {name: of for name, of in runs.items() if _place(name)[0] == part} for part in _parts(runs)}
    return {
        "runs": list(runs),
        "seeds": len({_place(name)[1] for name in runs}),
        "groups": groups,
        "rows": {row: _row(runs, row, groups, [one for one in COMPARED if one in rows]) for row in rows},
        "parts": {
            part: {row: {g: difference_in(of, row, AVERAGE, g) for g in groups} for row in rows if AVERAGE in rows}
            for part, of in parts.items()
        },
    }


def _parts(runs: Content) -> list[str]:
    """The architectures, where there are several."""
    architectures = list(dict.fromkeys(_place(name)[0] for name in runs))
    return architectures if len(architectures) > 1 else []


def _row(runs: Content, row: str, groups: Sequence[str], compared: Sequence[str]) -> dict[str, Any]:
    numbers = [of_run[row] for of_run in runs.values()]
    worst = [
        min((auc, f"{kind} ({group})") for group, of in one["forgeries"].items() for kind, auc in of.items())
        for one in numbers
    ]
    means = {group: float(np.mean([one["auc"][group] for one in numbers])) for group in groups}

    def share(group: str) -> float | None:
        """How much of the ensemble's gain over the average."""
        average, ensemble = (np.mean([of[name]["auc"][group] for of in runs.values()]) for name in (AVERAGE, ENSEMBLE))
        return float((means[group] - average) / (ensemble - average)) if ensemble > average else None

    return {
        "auc": {group: [one["auc"][group] for one in numbers] for group in groups},
        "mean": means,
        "deviation": {
            group: float(np.std([one["auc"][group] for one in numbers], ddof=min(1, len(numbers) - 1)))
            for group in groups
        },
        "forgeries": {
            group: {kind: float(np.mean([one["forgeries"][group][kind] for one in numbers])) for kind in kinds}
            for group, kinds in numbers[0]["forgeries"].items()
        },
        "worst": float(np.mean([auc for auc, _ in worst])),
        "worst_forgery": Counter(words for _, words in worst).most_common(1)[0][0],
        "worst_group": min(means, key=lambda group: means[group]),
        "calibration": {
            group: {key: float(np.mean([one["calibration"][group][key] for one in numbers])) for key in CALIBRATION}
            for group in groups
        },
        "minus": {other: {group: difference_in(runs, row, other, group) for group in groups} for other in compared},
        "share": {group: share(group) for group in groups} if AVERAGE in compared else {},
    }


def shown(content: Content, section: str) -> tuple[str, Content]:
    """What a section's tables are of: fresh seeds, which is what counts; development ones where there are no others."""
    of = content["sections"][section]
    which = "fresh" if "fresh" in of else "development"
    return which, of[which]


def named(row: str) -> str:
    """A row as a reader is to know it."""
    return NAMES.get(row, row)


def bold(row: str) -> str:
    """The same, the default in bold."""
    return f"**{named(row)}**" if row == DEFAULT else named(row)


def cells(section: Content, row: str, groups: Sequence[str]) -> list[str]:
    """AUC in words, group by group: .823 ± .012."""
    of = section["rows"][row]
    return [f"{short(of['mean'][group])} ± {short(of['deviation'][group])}" for group in groups]


def calibrated(section: Content, row: str, group: str) -> list[str]:
    """ECE, F1 at one half and at the best threshold, in a group."""
    return [short(section["rows"][row]["calibration"][group][key]) for key in CALIBRATION]


def differences(section: Content, row: str, other: str, groups: Sequence[str]) -> list[str]:
    """To another row, in words."""
    return [difference(section["rows"][row]["minus"][other][group]) for group in groups]


def difference(value: Mapping[str, float]) -> str:
    """+.012 [+.003, +.021] 8/10."""
    return (
        f"{short(value['mean'], True)} [{short(value['low'], True)}, {short(value['high'], True)}] "
        f"{value['wins']}/{value['runs']}"
    )


def short(value: float, signed: bool = False) -> str:
    """Three digits without the zero: .823, +.007."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("0.", ".", 1)


def print_tables(content: Content) -> None:
    """AUC, calibration and differences to the average, a table each section."""
    console = Console(width=180)
    for name in content["sections"]:
        which, section = shown(content, name)
        groups = section["groups"]
        table = new_table(
            f"{name}: AUC over {len(section['runs'])} {which} runs; ECE and F1 in-distribution",
            ("method", *groups, "worst forgery", *CALIBRATION.values()),
        )
        plain = [row for row in section["rows"] if content["methods"].get(row) != "ablation"]
        for row in plain:
            of = section["rows"][row]
            worst = f"{short(of['worst'])} {of['worst_forgery']}"
            table.add_row(named(row), *cells(section, row, groups), worst, *calibrated(section, row, groups[0]))
        console.print(table)
        table = new_table("paired difference to the weight average, 95 % interval, wins", ("method", *groups))
        for row in plain:
            if AVERAGE in plain and row != AVERAGE:
                table.add_row(named(row), *differences(section, row, AVERAGE, groups))
        console.print(table)
    for architecture, chosen in content["chosen"].items():
        words = "; ".join(f"{method} {choice}" for method, choice in chosen.items())
        console.print(f"Picked on validation, {architecture}: {words}", highlight=False, soft_wrap=True)
    if any(name.endswith("-quick") for name in content["about"]):
        console.print("Quick run: a tenth of the training and one seed; these numbers show how it runs and not more.")
