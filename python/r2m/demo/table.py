"""The table at the end and the lines below it, on the console, as JSON and as CSV: the same numbers in all three."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from r2m.demo.detectors import SPECIALISTS
from r2m.demo.evaluation import Scores, auc_by_forgery, group_auc
from r2m.demo.faces import CREDIT, PHOTOGRAPHS_EACH, Split
from r2m.demo.forgeries import TRAINED, UNSEEN
from r2m.demo.merges import Choice
from r2m.demo.parallel import say
from r2m.demo.samples import GROUPS
from r2m.demo.training import Setting

_MERGES = ("weight average", "task arithmetic", "CART", "R2M")
METHODS = ("base", *SPECIALISTS.values(), "joint training", "ensemble", *_MERGES)
COLUMNS = (*TRAINED, *GROUPS)
# A line is drawn below these: what is merged, what merging is compared with, and the merges.
_SECTION_ENDS = ("EFS specialist", "ensemble")
DIGITS = 3


class Row(NamedTuple):
    """One method's results; AUC in [0, 1], rounded to three digits."""

    method: str  # in METHODS
    auc: dict[str, float]  # by column
    by_forgery: dict[str, dict[str, float]]  # by group and forgery


def make_row(method: str, scores: Mapping[str, Mapping[str, Scores]]) -> Row:
    """Compute one row from the scores of each group, as ``evaluation.score_group`` returns them."""
    by_forgery = {
        name: {kind: round(value, DIGITS) for kind, value in auc_by_forgery(group).items()}
        for name, group in scores.items()
    }
    groups = {name: round(group_auc(scores[name]), DIGITS) for name in GROUPS}
    return Row(method, {kind: by_forgery["in-distribution"][kind] for kind in TRAINED} | groups, by_forgery)


def make_notes(
    split: Split, setting: Setting, choices: Mapping[str, Choice], seed: int, quick: bool
) -> tuple[str, ...]:
    """The lines below the table: what it shows, what was picked, and how far to trust it."""
    photographs = PHOTOGRAPHS_EACH * len(split.test)
    pictures = photographs * setting.test_draws
    picked = "; ".join(f"{method} {choice.label}" for method, choice in choices.items())
    notes = (
        f"Tested on {photographs} photographs of {len(split.test)} people ({len(split.train)} others to "
        f"train, {len(split.validation)} to validate): {pictures} real pictures, {pictures} of each forgery.",
        "FS, FR, EFS: face swap, reenactment, entire face synthesis, as in training; in-distribution: their "
        "mean; cross: all three with shifted parameters and another camera; unseen: mean of "
        f"{len(UNSEEN)} other forgeries.",
        f"Picked on the validation people: {picked}. R2M and weight average: defaults, nothing picked.",
        "Chance is 0.5; the base's head is untrained. Joint training needs all the data, the ensemble all the models.",
        f"One seed ({seed}) and few people: differences below 0.01 are noise. Photographs: {CREDIT}.",
    )
    less = "Quick run: less training and fewer pictures than without --quick: worse detectors, maybe in another order."
    return (less, *notes) if quick else notes


def new_table(title: str, header: Sequence[str]) -> Table:
    """A table for the terminal, without rows yet; all columns but the first are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in header:
        table.add_column(column, justify="right" if table.columns else "left", no_wrap=True)
    return table


def print_table(rows: Sequence[Row], notes: Sequence[str], console: Console) -> None:
    """Print the table and, below it, the notes."""
    table = new_table("AUC on people no detector has seen", ("method", *COLUMNS))
    for row in rows:
        cells = [f"{row.auc[column]:.{DIGITS}f}" for column in COLUMNS]
        table.add_row(row.method, *cells, end_section=row.method in _SECTION_ENDS)
    console.print(table)
    for note in notes:
        say(console, note)


def table_json(rows: Sequence[Row], notes: Sequence[str], seed: int) -> bytes:
    """The table as JSON: columns, a row for each method with its AUC by forgery, notes and seed."""
    content: dict[str, Any] = {
        "columns": list(COLUMNS),
        "rows": [{"method": row.method, **row.auc, "by_forgery": row.by_forgery} for row in rows],
        "notes": list(notes),
        "seed": seed,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def table_csv(rows: Sequence[Row]) -> bytes:
    """The table as CSV: a header and a line for each method."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *COLUMNS])
    for row in rows:
        writer.writerow([row.method, *(f"{row.auc[column]:.{DIGITS}f}" for column in COLUMNS)])
    return text.getvalue().encode()
