"""The table at the end, on the console, as JSON and as CSV: the same numbers in all three."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from r2m.demo.evaluation import Scores, auc_by_forgery, group_auc
from r2m.demo.forgeries import TRAINED
from r2m.demo.samples import GROUPS

METHODS = (
    "base",
    "FS specialist",
    "FR specialist",
    "EFS specialist",
    "joint training",
    "ensemble",
    "weight average",
    "task arithmetic",
    "CART",
    "R2M",
)
COLUMNS = (*TRAINED, *GROUPS)
# A line is drawn below these: what is merged, what merging is compared with, and the merges.
_SECTION_ENDS = ("EFS specialist", "ensemble")
DIGITS = 3


@dataclass(frozen=True)
class Row:
    """One method's results.

    Attributes:
        method: a name in ``METHODS``.
        auc: column → AUC in [0, 1], rounded to three digits.
        by_forgery: group → forgery → AUC, the same.
    """

    method: str
    auc: dict[str, float]
    by_forgery: dict[str, dict[str, float]]


def make_row(method: str, scores: Mapping[str, Mapping[str, Scores]]) -> Row:
    """Compute one row from the scores of each group, as ``evaluation.score_group`` returns them."""
    by_forgery = {
        name: {kind: round(value, DIGITS) for kind, value in auc_by_forgery(group).items()}
        for name, group in scores.items()
    }
    groups = {name: round(group_auc(scores[name]), DIGITS) for name in GROUPS}
    return Row(method, {kind: by_forgery["in-distribution"][kind] for kind in TRAINED} | groups, by_forgery)


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
        console.print(note, highlight=False, markup=False, soft_wrap=True)


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


def pooled_scores(group: Mapping[str, Scores]) -> tuple[Scores, Scores]:
    """Real scores, and those of all forgeries together.

    Each forgery has as many pictures as the others, so the AUC of the two is the group's mean AUC.
    """
    return group["real"], np.concatenate([scores for name, scores in group.items() if name != "real"])
