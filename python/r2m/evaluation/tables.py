"""An evaluation's numbers as tables: for a terminal of 80 columns, for Markdown, LaTeX and spreadsheets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from r2m.evaluation.comparison import AVERAGE, MERGE
from r2m.evaluation.metrics import KEYS, METRICS, VIDEO, metric
from r2m.evaluation.resampling import MEAN, RESAMPLED
from r2m.places import csv_table
from r2m.shorten import shorten
from r2m.templating import markdown_text
from r2m_kernels.errors import BadOption, printable

WORST = "worst"
COUNTS = ("frames", "videos")
WIDTH = 80
_NAMES = 16  # letters of a name in a terminal, and the least that is left of one
_LEAST = 6


@dataclass(frozen=True)
class Cell:
    """What stands in a table's cell.

    Attributes:
        value: a name, a count, a metric; None: undefined.
        interval: of a metric.
        note: in brackets where an interval would stand.
        best: whether it is the best of its kind.
        signed: whether a plus is shown.
    """

    value: str | int | float | None
    interval: Sequence[float] | None = None
    note: str = ""
    best: bool = False
    signed: bool = False

    def text(self, name: Callable[[str], str]) -> str:
        """As it is shown; ``name`` says how names are."""
        if isinstance(self.value, str):
            return name(self.value)
        if not isinstance(self.value, float):
            return "–" if self.value is None else str(self.value)
        number = f"{{:{'+' if self.signed else ''}.3f}}"
        more = [", ".join(map(number.format, self.interval))] if self.interval else []
        after = "".join(f" [{one}]" for one in more) or (f" ({name(self.note)})" if self.note else "")
        return number.format(self.value) + after


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its files.
        title: what it shows.
        headings: of its columns.
        names: how many of them, the first, hold names.
        rows: each with a cell for every heading.
        groups: names that resemble one another.
    """

    name: str
    title: str
    headings: list[str]
    names: int
    rows: list[list[Cell]]
    groups: Sequence[Sequence[str]]

    def short(self, limit: int) -> Callable[[str], str]:
        """How its names are shown: shortened to what differs."""
        found = {name: text for group in self.groups for name, text in shorten(group, limit=limit).items()}
        return lambda name: found.get(name, printable(name))


def columns_asked(asked: str | None) -> list[str] | None:
    """The keys of a table's columns, from names with commas.

    Raises:
        BadOption: a name that is no metric's.
    """
    if asked is None:
        return None
    columns = [name.strip() for name in asked.split(",")]
    strange = next((name for name in columns if name not in (*COUNTS, *KEYS)), None)
    if strange is not None:
        listed = ", ".join((*COUNTS, *METRICS))
        raise BadOption(f"--columns {printable(strange)}: expected some of {listed}, or these with {VIDEO} before them")
    return columns


def few_columns(result: Mapping[str, Any]) -> list[str]:
    """Those of a table where none were asked for: videos do not show where every frame is one."""
    judged = [of for one in result["models"].values() for of in one["datasets"].values()]
    if all(of["frames"] == of["videos"] for of in judged):
        return ["frames", "auc", "balanced_acc", "eer"]
    return ["videos", f"{VIDEO}auc", "auc", "balanced_acc"]


def tables(result: Mapping[str, Any], columns: Sequence[str]) -> list[Table]:
    """All tables of an evaluation; one of differences where models were compared."""
    models = result["models"]
    datasets = list(dict.fromkeys(name for one in models.values() for name in one["datasets"]))
    groups = (datasets, list(models))
    headings = ["dataset", "model", *map(heading, columns)]
    found = [Table("table", "Models on datasets", headings, 2, _of_models(result, datasets, columns), groups)]
    rows = _of_differences(result, columns)
    headings = ["model", "minus", "on", heading(leading(columns))]
    if any(row[2].value for row in rows):
        headings.insert(2, "which is")
    else:
        rows = [[*row[:2], *row[3:]] for row in rows]
    found.append(Table("differences", "Differences, paired", headings, len(headings) - 1, rows, groups))
    found.append(_of_robustness(models, groups))
    return [table for table in found if table.rows]


def heading(key: str) -> str:
    """Of a column."""
    if key in COUNTS:
        return key
    return ("video " if key.startswith(VIDEO) else "") + metric(key).heading


def leading(columns: Sequence[str]) -> str:
    """The metric that counts: the first column's that has an interval, or the AUC."""
    return next((key for key in columns if key in RESAMPLED), RESAMPLED[0])


def _of_models(result: Mapping[str, Any], datasets: Sequence[str], columns: Sequence[str]) -> list[list[Cell]]:
    models = result["models"]
    rows: list[list[Cell]] = []
    for dataset in datasets:
        judged = {name: one["datasets"][dataset] for name, one in models.items() if dataset in one["datasets"]}
        rows += _best([_row(dataset, name, of, of["intervals"], columns) for name, of in judged.items()], columns)
    if len({*datasets} - {result["settings"]["threshold_from"]}) > 1:
        means = [_row(MEAN, name, one["average"], one["average_intervals"], columns) for name, one in models.items()]
        worst = [_worst(name, one["worst"], columns) for name, one in models.items()]
        rows += _best(means, columns) + _best(worst, columns)
    return rows


def _row(
    dataset: str, model: str, of: Mapping[str, Any], intervals: Mapping[str, Any], columns: Sequence[str]
) -> list[Cell]:
    first = leading(columns)
    cells = (Cell(of.get(key, ""), intervals[key] if key == first else None) for key in columns)
    return [Cell(dataset), Cell(model), *cells]


def _worst(model: str, of: Mapping[str, Any], columns: Sequence[str]) -> list[Cell]:
    first = leading(columns)
    cells = [Cell(model)]
    for key in columns:
        found = of.get(key)
        value = None if found is None else found["value"]
        note = found["dataset"] if found is not None and key == first else ""
        cells.append(Cell("" if key in COUNTS else value, note=note))
    return [Cell(WORST), *cells]


def _best(rows: list[list[Cell]], columns: Sequence[str]) -> list[list[Cell]]:
    """With the best of each column marked, all that look alike, where there are several."""
    if len(rows) < 2:
        return rows
    best = {}
    for place, key in enumerate(columns, start=2):
        values = [value for value in (row[place].value for row in rows) if isinstance(value, float)]
        if key not in COUNTS and values:
            best[place] = round((max if metric(key).better > 0 else min)(values), 3)
    return [
        [
            replace(cell, best=isinstance(cell.value, float) and round(cell.value, 3) == best.get(place))
            for place, cell in enumerate(row)
        ]
        for row in rows
    ]


def _of_differences(result: Mapping[str, Any], columns: Sequence[str]) -> list[list[Cell]]:
    first, rows = leading(columns), []
    chosen = [row for row in result["differences"] if row["metric"] == first]
    whole = {(row["model"], row["than"]) for row in chosen if row["dataset"] == MEAN}
    for row in chosen:
        if row["dataset"] != MEAN and (row["model"], row["than"]) in whole:
            continue
        what = _told(result["models"], row["model"], row["than"], first)
        if what is not None:
            difference = Cell(row["difference"], row["interval"], signed=True)
            rows.append([Cell(row["model"]), Cell(row["than"]), Cell(what), Cell(row["dataset"]), difference])
    return rows


def _told(models: Mapping[str, Any], model: str, than: str, key: str) -> str | None:
    """What the other is to a model; None: one of its specialists, and not the best."""
    one, other = models[model], models[than]
    if other["role"] == AVERAGE:
        return "average"
    values = {name: models[name]["average"][key] for name in one["specialists"]}
    if one["role"] != MERGE or than not in values:
        return other["role"] or ""
    best = max((value for value in values.values() if value is not None), default=None)
    return "best specialist" if values[than] == best else None


def _of_robustness(models: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> Table:
    swept = {name: one for name, one in models.items() if one["robustness"]}
    first = RESAMPLED[0]
    rows = [[Cell("as they are"), *(Cell(one["average"][first]) for one in swept.values())]] if swept else []
    for degradation in next((one["robustness"] for one in swept.values()), {}):
        values = (one["robustness"][degradation]["average"][first] for one in swept.values())
        rows.append([Cell(degradation), *map(Cell, values)])
    headings = [f"pictures, {heading(first)}", *swept]
    return Table("robustness", "Pictures degraded, mean over datasets", headings, 1, rows, groups)


def text(table: Table, width: int = WIDTH) -> list[str]:
    """Lines for a terminal: names as short as they have to be, columns that do not fit below one another."""
    for limit in range(_NAMES, _LEAST - 1, -1):
        name = table.short(limit)
        cells = [[name(one) for one in table.headings], *([cell.text(name) for cell in row] for row in table.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            break
    lines: list[str] = []
    for block in _blocks(widths, table.names, width):
        line = "  ".join(f"{{:{'<' if place < table.names else '>'}{widths[place]}}}" for place in block)
        lines += [*([""] if lines else []), *(line.format(*(row[place] for place in block)).rstrip() for row in cells)]
    return lines


def _blocks(widths: Sequence[int], names: int, width: int) -> Iterator[list[int]]:
    """Columns that stand beside one another, after those of names."""
    left = list(range(names, len(widths)))
    while left:
        block = list(range(names))
        while left and (len(block) == names or sum(widths[place] + 2 for place in (*block, left[0])) - 2 <= width):
            block.append(left.pop(0))
        yield block


def markdown(table: Table) -> list[str]:
    """A table of GitHub's Markdown."""
    name = _printed(table)
    rule = ["---" if place < table.names else "---:" for place in range(len(table.headings))]
    rows = [
        [_strong(cell, f"**{markdown_text(cell.text(name))}**", markdown_text(cell.text(name))) for cell in row]
        for row in table.rows
    ]
    headings = [markdown_text(name(one)) for one in table.headings]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *rows)]


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "…": r"\dots{}"}
_LATEX |= {letter: f"\\{letter}" for letter in "&%$#_{}"}


def latex(table: Table) -> list[str]:
    """A tabular with the rules of the package booktabs."""
    name = _printed(table)

    def written(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    rows = [
        [_strong(cell, f"\\textbf{{{written(cell.text(name))}}}", written(cell.text(name))) for cell in row]
        for row in table.rows
    ]
    lines = [f"{' & '.join(row)} \\\\" for row in ([written(name(one)) for one in table.headings], *rows)]
    kinds = "l" * table.names + "r" * (len(table.headings) - table.names)
    groups = [str(row[0].value) for row in table.rows]
    body = [
        line
        for place, line in enumerate(lines[1:])
        for line in ([r"\midrule"] * (place > 0 and groups[place] != groups[place - 1]) + [line])
    ]
    return [
        f"\\begin{{tabular}}{{{kinds}}}",
        r"\toprule",
        lines[0],
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def csv(table: Table) -> list[str]:
    """Numbers as they are, intervals in columns of their own."""
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        cells: dict[str, Any] = {}
        for place, (title, cell) in enumerate(zip(table.headings, row, strict=True)):
            cells[title] = "" if cell.value is None else cell.value
            if any(one[place].interval for one in table.rows):
                cells[f"{title} from"], cells[f"{title} to"] = cell.interval or ("", "")
        rows.append(cells)
    return csv_table(rows).decode().splitlines()


def _printed(table: Table) -> Callable[[str], str]:
    return table.short(2 * _NAMES)


def _strong(cell: Cell, strong: str, plain: str) -> str:
    return strong if cell.best else plain


FORMATS: Mapping[str, Callable[[Table], list[str]]] = {"text": text, "markdown": markdown, "csv": csv, "latex": latex}
FILES = {"markdown": "md", "csv": "csv", "latex": "tex"}


def lines(found: Sequence[Table], kind: str) -> list[str]:
    """Tables below one another."""
    parts = [FORMATS[kind](table) for table in found]
    return list(
        itertools.chain.from_iterable([part if place == 0 else ["", *part] for place, part in enumerate(parts)])
    )
