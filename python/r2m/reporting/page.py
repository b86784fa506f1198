"""The page of a merge: one HTML file without scripts or links to elsewhere, readable in light and dark."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from r2m.evaluation.data import read_scores
from r2m.evaluation.metrics import Scores
from r2m.options import SWEPT
from r2m.places import csv_table, new_directory, read_small, write_file
from r2m.progress import readable_bytes
from r2m.records import EVALUATION, REPORT, as_written, read_evaluation
from r2m.reporting.figures import Picture, Rows, bars, colour, curves, finish, heatmap, picture
from r2m.reporting.spectra import of_residuals
from r2m.sweep import SWEEP_FILE
from r2m.templating import render
from r2m.workplace import settle
from r2m_kernels.errors import BadFile

PAGE_FILE = "report.html"
_MOSTLY_NOISE = 0.25  # of a residual's energy kept, below which what is left hardly stands for it
_LISTED = 400  # rows of a table on the page; the CSV beside it has all


def write_page(
    out: str | Path,
    to: str | Path,
    *,
    evaluation: str | Path | None = None,
    swept: str | Path | None = None,
    spectra: int = 0,
) -> list[str]:
    """Write ``report.html`` and, for each picture, a PNG and a CSV.

    Args:
        out: the output of a merge.
        to: a directory to create.
        evaluation: the directory of an ``r2m evaluate``.
        swept: the directory of an ``r2m sweep``.
        spectra: of how many matrices the residuals' singular values are worked out.

    Returns:
        Names of the files.

    Raises:
        InvalidInput: one of them is not what it should be, or ``to`` is there and not empty.
        OSError: it cannot be written; ``filename`` is set.
    """
    settle(Path(out))
    try:
        report = REPORT.read(Path(out), f"{out}: {REPORT.file}")
    except OSError:
        raise BadFile(f"{out}: expected the output of a merge, with {REPORT.file}") from None
    measured, scores = None, {}
    if evaluation is not None:
        measured = read_evaluation(evaluation)
        with as_written(f"{evaluation}: {EVALUATION.file}"):
            scores = _scores(Path(evaluation), measured)
    rows = _sweep_rows(Path(swept)) if swept is not None else []
    target = Path(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadFile(f"to ({to}): exists already and is not an empty directory")
    with as_written(f"{out}: {REPORT.file}"):
        pictures = list(of_merge(report))
    if spectra:
        pictures += of_residuals(out, spectra)
    if measured is not None:
        with as_written(f"{evaluation}: {EVALUATION.file}"):
            pictures += of_evaluation(measured, scores)
    if swept is not None and rows:
        with as_written(f"{swept}: {SWEEP_FILE}"):
            pictures += of_sweep(rows, Path(swept), measured)
    with as_written(f"{out}: {REPORT.file}"):
        files = {PAGE_FILE: page(report, pictures).encode(errors="xmlcharrefreplace")}
    for one in pictures:
        files |= {f"{one.name}.png": one.png, f"{one.name}.csv": csv_table(one.rows)}
    with new_directory(target) as partial:
        for name, content in files.items():
            write_file(partial / name, content)
    return sorted(files)


def of_merge(report: Mapping[str, Any]) -> Iterable[Picture]:
    """What a merge's report says, in pictures."""
    names = report["experts"]
    cosines = report["task_vectors"]["cosines"]
    yield picture(
        "cosines",
        "How alike the specialists moved",
        "Cosines between their task vectors. Near 1 they learned the same; near 0 they have nothing in common, and "
        "little of what each learned is shared.",
        [{"expert": a, **dict(zip(names, row, strict=True))} for a, row in zip(names, cosines, strict=True)],
        lambda axes: heatmap(axes, names, names, cosines, -0.2),
        (1.6 + 0.9 * len(names), 1.2 + 0.6 * len(names)),
    )
    norms, core = report["task_vectors"]["norms"], report["core"]["coefficients"]
    yield picture(
        "lengths",
        "How far each specialist moved",
        "Lengths of their task vectors. One that is much longer than the others was trained longer or harder, and "
        "leads the core.",
        [{"expert": name, "norm": norms[name]} for name in names],
        lambda axes: bars(axes, names, {"": list(norms.values())}, "‖task vector‖"),
    )
    yield picture(
        "core",
        "Who makes up the shared Real component",
        "Coefficients of the specialists in the core: equal ones share it equally; one alone dominates it.",
        [{"expert": name, "coefficient": core[name]} for name in names],
        lambda axes: bars(axes, names, {"": list(core.values())}, "coefficient"),
    )
    before, scales = report["residual"]["norms"], report["residual"]["scales"]
    if before is not None:
        after = {name: before[name] * scales[name] for name in names}
        where = "in the weights of rows, " if report["config"]["row_power"] > 0 else ""
        yield picture(
            "norms",
            "Residuals before and after norm matching",
            f"What each specialist has beyond the core. After matching, {where}all have one norm, so that no forgery "
            "family drowns the others.",
            [{"expert": name, "before": before[name], "after": after[name], "scale": scales[name]} for name in names],
            lambda axes: bars(
                axes, names, {"before": list(before.values()), "after": list(after.values())}, "‖residual‖"
            ),
        )
    kept = [row for row in report["tensors"] if row["role"] == "matrix" and row.get("kept_energy")]
    if kept and any(value is not None and value < 1 for row in kept for value in row["kept_energy"].values()):
        yield _kept_energy(names, kept)


def _kept_energy(names: Sequence[str], kept: Rows) -> Picture:
    def draw(axes: Axes) -> None:
        shares = {name: [row["kept_energy"][name] for row in kept] for name in names}
        points = {name: list(enumerate(np.array(values, dtype=float))) for name, values in shares.items()}
        curves(axes, points, "matrix, in the model's order", "kept energy", ".-")
        axes.set_ylim(0, 1.02)

    return picture(
        "kept_energy",
        "What truncation kept, over depth",
        "The share of each residual's energy that is left at its rank. Low everywhere: residuals are spread over all "
        "directions, mostly noise; high: a few directions say it all.",
        [{"tensor": row["name"], "rank": row["rank"], **row["kept_energy"]} for row in kept],
        draw,
    )


def of_evaluation(measured: Mapping[str, Any], scores: Mapping[str, Mapping[str, Scores]]) -> Iterable[Picture]:
    """What an evaluation says, in pictures."""
    models = measured["models"]
    datasets = list(dict.fromkeys(name for one in models.values() for name in one["datasets"]))
    for key, title in (("auc", "frames"), ("video_auc", "videos")):
        values = [[models[name]["datasets"].get(dataset, {}).get(key) for dataset in datasets] for name in models]
        yield picture(
            key,
            f"AUC over {title}: models against test sets",
            "A specialist is good on its own forgeries; below 0.5 it ranks the wrong way round. A dash: one class.",
            [
                {"model": name, **dict(zip(datasets, row, strict=True)), "size": _size(models[name].get("bytes"))}
                for name, row in zip(models, values, strict=True)
            ],
            lambda axes, values=values: heatmap(axes, list(models), datasets, values, 0.3),  # type: ignore[misc]
            (2.6 + 0.9 * len(datasets), 1.4 + 0.5 * len(models)),
        )
    for number, dataset in enumerate(datasets):
        held = {name: of[dataset] for name, of in scores.items() if dataset in of}
        both = {name: of for name, of in held.items() if len(set(of.labels.tolist())) == 2}
        if both:
            yield _roc(number, dataset, both)
        for index, (name, of) in enumerate(held.items()):
            yield _histogram(f"scores-{number}-{index}", dataset, name, of)


def _roc(number: int, dataset: str, scores: Mapping[str, Scores]) -> Picture:
    from sklearn.metrics import roc_curve

    rates = {
        name: list(zip(*map(np.ndarray.tolist, roc_curve(of.labels, of.probabilities)[:2]), strict=True))
        for name, of in scores.items()
    }

    def draw(axes: Axes) -> None:
        curves(axes, rates, "real frames called fake", "fakes found")
        axes.plot([0, 1], [0, 1], ":", color=colour(6))

    rows = [
        {"model": name, "false positive rate": fpr, "true positive rate": tpr}
        for name, points in rates.items()
        for fpr, tpr in points
    ]
    text = "Of all frames. The further to the upper left, the better; the dotted line is chance."
    return picture(f"roc-{number}", f"ROC: {dataset}", text, rows, draw, (5.0, 4.0))


def _histogram(name: str, dataset: str, model: str, of: Scores) -> Picture:
    edges = [index / 20 for index in range(21)]
    real, fake = (np.histogram(of.probabilities[of.labels == label], edges)[0].tolist() for label in (0, 1))

    def draw(axes: Axes) -> None:
        for index, (title, counts) in enumerate((("real", real), ("fake", fake))):
            axes.stairs(counts, edges, fill=True, alpha=0.6, label=title, color=colour(index))
        finish(axes, "probability of fake", "frames")

    rows = [{"from": edges[index], "real": real[index], "fake": fake[index]} for index in range(20)]
    text = "The less the two overlap, the better; both at one side: the threshold of 0.5 is wrong for this set."
    return picture(name, f"Scores of {model} on {dataset}", text, rows, draw, (5.0, 2.6))


def of_sweep(rows: Rows, swept: Path, measured: Mapping[str, Any] | None) -> Iterable[Picture]:
    """AUC over the options of a sweep, of those points that the evaluation has."""
    options = [key for key in SWEPT if key in rows[0]]
    aucs = {} if measured is None else _point_aucs([row["point"] for row in rows], swept, measured)
    if not aucs:
        return
    rows = [{**row, "auc": aucs[row["point"]]} for row in rows if row["point"] in aucs]

    def draw(axes: Axes) -> None:
        groups: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            title = ", ".join(f"{option} {row[option]}" for option in options[:-1]) or "all"
            groups.setdefault(title, []).append((float(row[options[-1]]), row["auc"]))
        points = {title: sorted(values) for title, values in groups.items()}
        curves(axes, points, options[-1], "mean AUC of frames", "o-", limit=200)

    yield picture(
        "sweep",
        f"AUC over {' and '.join(options)}",
        "Chosen on these sets, a point is fitted to them: report another set's numbers for it.",
        rows,
        draw,
    )


def _point_aucs(points: Sequence[str], swept: Path, measured: Mapping[str, Any]) -> dict[str, float]:
    point_of = {os.path.realpath(swept / point): point for point in points}
    aucs = {}
    for one in measured["models"].values():
        source = os.path.realpath(one["source"])
        point = point_of.get(source) or point_of.get(os.path.dirname(source))
        if point is not None and one["average"]["auc"] is not None:
            aucs[point] = float(one["average"]["auc"])
    return aucs


def page(report: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The HTML."""
    names = ", ".join(report["experts"])
    core, residual = report["core"], report["residual"]
    facts = [
        ("method", report["method"]),
        ("specialists", names),
        ("‖core‖ / ‖mean‖", _number(core["norm_ratio_to_mean"])),
        ("λ, factor of the core", _number(core["scale_used"])),
        ("η, strength of the residuals", _number(residual["eta_used"])),
        ("‖residual term‖ / ‖core‖", _number(residual["norm_ratio_to_core"])),
        ("share of the update along the core", _number(core.get("share_of_update"))),
        ("of the residuals, cut by truncation", _by_name(residual.get("cut"))),
        ("‖task vector‖ / ‖base‖", _by_name(report["task_vectors"].get("relative_to_base"))),
        ("head, averaged", ", ".join(report.get("head") or ()) or "–"),
        ("computed by", f"{report['backend']['name']} on {report['backend']['device']}"),
        ("r2m_kernels, torch", f"{report['versions']['r2m_kernels']}, {report['versions']['torch']}"),
    ]
    tensors = [
        {key: row.get(key, "") for key in ("name", "role", "shape", "dtype", "rank")} for row in report["tensors"]
    ]
    return render(
        "report.html",
        names=names,
        warnings=[*report["warnings"], *_of_noise(report)],
        facts=[{"about the merge": title, "": value} for title, value in facts],
        pictures=pictures,
        tensors=tensors,
        listed=_LISTED,
    )


def _of_noise(report: Mapping[str, Any]) -> list[str]:
    """A warning where truncation dropped most of what it was given."""
    kept = [
        value for row in report["tensors"] for value in (row.get("kept_energy") or {}).values() if value is not None
    ]
    middle = statistics.median(kept) if kept else 1.0
    if middle >= _MOSTLY_NOISE:
        return []
    return [
        f"truncation kept {middle:.0%} of the residuals' energy, by the median matrix: they are spread over all "
        "directions, as noise is, or the rank is too small"
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _size(count: int | None) -> str:
    return "–" if count is None else readable_bytes(count)


def _by_name(values: Mapping[str, float | None] | None) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in (values or {}).items()) or "–"


def _scores(evaluation: Path, measured: Mapping[str, Any]) -> dict[str, dict[str, Scores]]:
    """Probabilities of the models that were run, from the files beside the evaluation."""
    ran = [name for name, one in measured["models"].items() if one.get("detector")]
    paths = {name: evaluation / f"scores-{number}.csv" for number, name in enumerate(ran, start=1)}
    paths |= {name: Path(one["source"]) for name, one in measured["models"].items() if not one.get("detector")}
    return {name: read_scores(path) for name, path in paths.items() if path.is_file()}


def _sweep_rows(swept: Path) -> list[dict[str, str]]:
    path = swept / SWEEP_FILE
    if not path.is_file():
        raise BadFile(f"{swept}: expected a directory of r2m sweep, with {SWEEP_FILE}")
    return list(csv.DictReader(read_small(path, str(path)).decode(errors="replace").splitlines()))
