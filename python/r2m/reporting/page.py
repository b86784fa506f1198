"""The page of a merge: one HTML file without scripts or links to elsewhere, readable in light and dark."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m.evaluation.data import CLASSES, read_scores, some
from r2m.evaluation.metrics import Scores
from r2m.places import csv_table, from_output
from r2m.progress import readable_bytes
from r2m.records import EVALUATION, PAGE, REPORT, as_written, read_evaluation
from r2m.reporting import answer
from r2m.reporting.detection import of_evaluation
from r2m.reporting.figures import Picture, drawn
from r2m.reporting.geometry import of_merge, of_truncation
from r2m.reporting.spectra import of_residuals
from r2m.reporting.standing import Standing, standing
from r2m.reporting.swept import of_sweep, sweep_rows, swept_beside
from r2m.reporting.target import check_target, put_files
from r2m.shorten import shorten
from r2m.sweep import SWEEP_FILE
from r2m.templating import render
from r2m.workplace import settle
from r2m_kernels.errors import BadFile, printable

PAGE_FILE = "report.html"
_TABLE = "table"  # its files' name
_MOSTLY_NOISE = 0.25  # of a residual's energy kept, below which what is left hardly stands for it
_NAMED = 6  # specialists in the title; of more their number
_LISTED = 200  # rows of a table on the page; the CSV beside it has all


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its title, and what stands in it."""

    anchor: str
    title: str
    pictures: Sequence[Picture]


def write_page(
    out: str | Path,
    to: str | Path,
    *,
    evaluation: str | Path | None = None,
    swept: str | Path | None = None,
    spectra: int = 0,
    overwrite: bool = False,
) -> list[str]:
    """Write ``report.html`` and, for each picture, a PNG, a PDF and a CSV.

    Args:
        out: the output of a merge.
        to: a directory to create.
        evaluation: the directory of an ``r2m evaluate``.
        swept: the directory of an ``r2m sweep``; None: that of which the evaluation has points.
        spectra: of how many matrices the residuals' singular values are worked out.
        overwrite: replace a former page in ``to``.

    Returns:
        Names of the files.

    Raises:
        InvalidInput: one of them is not what it should be, or ``to`` is there and not empty, or holds what is of no
            page.
        OSError: it cannot be written; ``filename`` is set.
    """
    settle(Path(out))
    try:
        report = REPORT.read(Path(out), f"{out}: {REPORT.file}")
    except OSError:
        raise BadFile(f"{out}: expected the output of a merge, with {REPORT.file}") from None
    found, scores = None, {}
    if evaluation is not None:
        measured = read_evaluation(evaluation)
        with as_written(f"{evaluation}: {EVALUATION.file}"):
            found, scores = standing(measured, report, out), _scores(Path(evaluation), measured)
            swept = swept or swept_beside(measured)
    points = [] if swept is None else sweep_rows(Path(swept))
    check_target(Path(to), overwrite)
    sections: list[Section] = []
    said: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if found is not None:
        with as_written(f"{evaluation}: {EVALUATION.file}"):
            sections += [Section(one.name, one.title, [one]) for one in of_evaluation(found, scores)]
            said = _evaluated(found)
            shown = said["table"]
            pictures = drawn(lambda axes: answer.draw(shown, axes), answer.drawn_size(shown))
            files |= {f"{_TABLE}.{kind}": content for kind, content in pictures.items()}
            files[f"{_TABLE}.csv"] = csv_table(answer.rows(found))
    if swept is not None and points:
        with as_written(f"{swept}: {SWEEP_FILE}"):
            one = of_sweep(points, Path(swept), None if found is None else found.measured)
        sections += [] if one is None else [Section("sweep", "Sweep", [one])]
    with as_written(f"{out}: {REPORT.file}"):
        sections.append(Section("geometry", "Geometry", list(of_merge(report))))
        sections += [Section("truncation", "Truncation", [one]) for one in of_truncation(report)]
    if spectra:
        sections.append(Section("spectra", "Spectra of the residuals", list(of_residuals(out, spectra))))
    for one in (picture for section in sections for picture in section.pictures):
        files |= {f"{one.name}.{kind}": content for kind, content in one.files.items()}
        files[f"{one.name}.csv"] = csv_table(one.rows)
    with as_written(f"{out}: {REPORT.file}"):
        files[PAGE_FILE] = page(report, str(out), said, sections).encode(errors="xmlcharrefreplace")
    sources = {"out": out, "evaluation": evaluation, "sweep": swept}
    content = {
        "sources": {key: None if path is None else from_output(to, str(path)) for key, path in sources.items()},
        "written": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }
    put_files(Path(to), files, content)
    return sorted([*files, PAGE.file])


def page(report: Mapping[str, Any], out: str, evaluated: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The HTML.

    Args:
        report: the merge's.
        out: where its output is.
        evaluated: what is said of an evaluation; empty: there is none.
        sections: what follows the answer.
    """
    short = list(shorten(report["experts"]).values())
    names = ", ".join(short) if len(short) <= _NAMED else f"{len(short)} specialists"
    tensors = [
        {key: row.get(key, "") for key in ("name", "role", "shape", "dtype", "rank")} for row in report["tensors"]
    ]
    return render(
        "report.html",
        names=names,
        out=printable(out),
        evaluated=evaluated,
        warnings=[*report["warnings"], *_of_noise(report)],
        facts=list(_facts(report)),
        sections=sections,
        tensors=tensors,
        listed=_LISTED,
    )


def _evaluated(of: Standing) -> dict[str, Any]:
    """What the page says of an evaluation."""
    return {
        "unit": of.unit,
        "foreign": of.merged is None,
        "sentences": answer.sentences(of),
        "notes": answer.notes(of),
        "missing": answer.missing(of),
        "table": answer.table(of),
        "summary": answer.summary(of),
        "models": list(_models(of)),
        "data": list(_data(of)),
        "unreadable": len(of.measured.get("unreadable", ())),
        "left_out": of.measured.get("left_out", ()),
    }


def _models(of: Standing) -> Iterator[dict[str, Any]]:
    for name, role in of.roles.items():
        one = of.models[name]
        size = one.get("bytes")
        yield {
            "short": of.short[name],
            "name": name,
            "is": role,
            # A page is passed on: what directories are called above is nobody's business.
            "checkpoint or scores": "/".join(Path(one["source"]).parts[-2:]) or ".",
            "detector": one.get("detector"),
            "size": None if size is None else readable_bytes(size),
        }


def _data(of: Standing) -> Iterator[dict[str, Any]]:
    """What each test set is made of, and which names were taken as what, where the evaluation says so."""
    labels = of.measured.get("labels", {})
    for dataset in of.datasets:
        one = next(one["datasets"][dataset] for one in of.models.values() if dataset in one["datasets"])
        counts = {key: one.get(key) for key in ("frames", "videos", "real videos", "fake videos")}
        taken = {f"taken as {key}": some(labels.get(dataset, {}).get(key, ())) for key in CLASSES} if labels else {}
        yield {"short": of.sets[dataset], "test set": dataset, **counts, **taken}


def _facts(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    core, residual = report["core"], report["residual"]
    facts = {
        "method": report["method"],
        "specialists": ", ".join(report["experts"]),
        "‖core‖ / ‖mean‖": _number(core["norm_ratio_to_mean"]),
        "λ, factor of the core": _number(core["scale_used"]),
        "η, strength of the residuals": _number(residual["eta_used"]),
        "‖residual term‖ / ‖core‖": _number(residual["norm_ratio_to_core"]),
        "share of the update along the core": _number(core.get("share_of_update")),
        "of the residuals, cut by truncation": _by_name(residual.get("cut")),
        "‖task vector‖ / ‖base‖": _by_name(report["task_vectors"].get("relative_to_base")),
        "head, averaged": ", ".join(report.get("head") or ()) or "–",
        "computed by": f"{report['backend']['name']} on {report['backend']['device']}",
        "r2m_kernels, torch": f"{report['versions']['r2m_kernels']}, {report['versions']['torch']}",
    }
    for title, value in facts.items():
        yield {"about the merge": title, "": value}


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


def _by_name(values: Mapping[str, float | None] | None) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in (values or {}).items()) or "–"


def _scores(evaluation: Path, measured: Mapping[str, Any]) -> dict[str, dict[str, Scores]]:
    """Probabilities of the models that were run, from the files beside the evaluation."""
    ran = [name for name, one in measured["models"].items() if one.get("detector")]
    paths = {name: evaluation / f"scores-{number}.csv" for number, name in enumerate(ran, start=1)}
    paths |= {name: Path(one["source"]) for name, one in measured["models"].items() if not one.get("detector")}
    return {name: read_scores(path) for name, path in paths.items() if path.is_file()}
