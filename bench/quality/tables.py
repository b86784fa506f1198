"""The table, from the JSON: on stdout, and as rows for docs/quality.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from r2m.demo.table import new_table
from rich.console import Console

from bench.quality.groups import GROUPS
from bench.quality.judging import paired

Content = Mapping[str, Any]
BASELINES = ("weight average", "weight average × 1.2", "CART", "TIES", "task arithmetic")


def runs_of(content: Content, which: str, architecture: str | None = None) -> list[str]:
    """Names of the runs that a number is taken over: ``fresh`` or ``development``, of one architecture or both."""
    return [name for name in content[which] if architecture in (None, name.partition("-")[0])]


def reported(content: Content) -> str:
    """The fresh seeds, which is what counts; development ones where there are no others."""
    return "fresh" if content["fresh"] else "development"


def values(content: Content, row: str, group: str, runs: Sequence[str]) -> list[float]:
    """AUC of a row in a group, run by run."""
    return [content["runs"][name][row]["auc"][group] for name in runs]


def against(content: Content, row: str, other: str, group: str, runs: Sequence[str]) -> dict[str, float]:
    """Paired difference of two rows, with its interval."""
    ours, theirs = (values(content, name, group, runs) for name in (row, other))
    return paired([a - b for a, b in zip(ours, theirs, strict=True)])


def rows_of(content: Content, *, ideas: bool = True) -> list[str]:
    """The rows in order, those of ideas too or not."""
    rows = next(iter(content["runs"].values()))
    return [row for row in rows if ideas or content["methods"].get(row) != "idea"]


def main_table(content: Content, rows: Sequence[str], runs: Sequence[str]) -> list[dict[str, Any]]:
    """A row each: mean and standard deviation per group, worst forgery, ECE."""
    table = []
    for row in rows:
        numbers = [content["runs"][name][row] for name in runs]
        aucs = {group: [one["auc"][group] for one in numbers] for group in GROUPS["scratch"]}
        table.append(
            {
                "row": row,
                "mean": {group: float(np.mean(of_group)) for group, of_group in aucs.items()},
                "deviation": {
                    group: float(np.std(of_group, ddof=1)) if len(runs) > 1 else 0.0 for group, of_group in aucs.items()
                },
                "worst": float(np.mean([one["worst"] for one in numbers])),
                "worst_forgery": Counter(one["worst_forgery"] for one in numbers).most_common(1)[0][0],
                "ece": float(np.mean([one["ece"] for one in numbers])),
            }
        )
    return table


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the main table in words, group by group: .823 ± .012."""
    return [f"{short(row['mean'][group])} ± {short(row['deviation'][group])}" for group in GROUPS["scratch"]]


def differences(content: Content, row: str, groups: Iterable[str], runs: Sequence[str]) -> list[str]:
    """To the weight average, in words."""
    return [difference(against(content, row, "weight average", group, runs)) for group in groups]


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
    """AUC by group, then paired differences to the average."""
    console = Console(width=160)
    which = reported(content)
    runs = runs_of(content, which)
    table = new_table(
        f"AUC over {len(runs)} {which} runs: {', '.join(runs)}", ("method", *GROUPS["scratch"], "worst forgery", "ECE")
    )
    for row in main_table(content, rows_of(content), runs):
        table.add_row(row["row"], *cells(row), f"{short(row['worst'])} {row['worst_forgery']}", short(row["ece"]))
    console.print(table)
    table = new_table("paired difference to the weight average, 95 % interval, wins", ("method", *GROUPS["scratch"]))
    for name in rows_of(content):
        if name != "weight average":
            table.add_row(name, *differences(content, name, GROUPS["scratch"], runs))
    console.print(table)
    for architecture, chosen in content["chosen"].items():
        words = "; ".join(f"{method} {choice}" for method, choice in chosen.items() if choice)
        console.print(f"Picked on validation, {architecture}: {words}", highlight=False, soft_wrap=True)
    if content["quick"]:
        console.print("Quick run: a third of the training and one seed; these numbers show how it runs and not more.")
