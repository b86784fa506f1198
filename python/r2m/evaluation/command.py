"""What ``r2m evaluate`` does: models and datasets from its options, a table and files out."""

from __future__ import annotations

import datetime
import functools
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sklearn
import torch
from torch import nn

from r2m import places
from r2m.checkpoints.reader import open_checkpoint
from r2m.evaluation import run, tables
from r2m.evaluation.comparison import Role, roles
from r2m.evaluation.data import Data, Dataset, read_scores, scores_of, some
from r2m.evaluation.degradations import DEGRADATIONS, degraded
from r2m.evaluation.ensemble import Ensemble, attribution, combined
from r2m.evaluation.entrants import Entrant, chosen, load_all
from r2m.evaluation.judging import check_names, judge_all
from r2m.evaluation.metrics import METRICS, average, metrics
from r2m.evaluation.models import calibration_of
from r2m.evaluation.reading import read_all
from r2m.evaluation.request import Request
from r2m.preprocessing import Preprocessing
from r2m.progress import bars, readable_bytes
from r2m.records import EVALUATION
from r2m_kernels import __version__
from r2m_kernels.errors import BadFile, BadOption, printable

# Options that decide the numbers.
SETTINGS = (
    *("split", "frames", "subfolders", "compression", "deepfakebench_compat", "bootstrap", "seed", "device"),
    *("threshold", "threshold_from", "threshold_by", "against"),
)


def evaluate(
    request: Request, out: str | None = None, *, overwrite: bool = False, quiet: bool = False
) -> tuple[list[str], list[str]]:
    """Judge models, write what came out, and return the table and what else is to be told, in lines.

    Args:
        request: which models, on what.
        out: the directory for ``evaluation.json`` and scores; None: nothing is written.
        overwrite: an evaluation in ``out`` is replaced.
        quiet: no progress.

    Raises:
        InvalidInput: an option, a model or a dataset cannot be used; nothing is written then.
        OSError: of the file system.
    """
    with _alone(out):
        return _evaluated(request, out, overwrite, quiet)


@contextmanager
def _alone(out: str | None) -> Iterator[None]:
    """Nobody else evaluates into a directory meanwhile; one that is made for it goes again where it stays empty."""
    if out is None:
        yield
        return
    new = [one for one in (Path(out), *Path(out).parents) if not one.exists()]  # the deepest first
    Path(out).mkdir(parents=True, exist_ok=True)
    try:
        with places.beside(Path(out) / "scores"):
            yield
    finally:
        for one in new:
            with suppress(OSError):
                one.rmdir()


def _evaluated(request: Request, out: str | None, overwrite: bool, quiet: bool) -> tuple[list[str], list[str]]:
    _check(request, out, overwrite)
    who = chosen(request)
    scores = {name: read_scores(path) for name, path in who.scores.items()}
    data = read_all(request) if who.checkpoints else Data()
    entered = load_all(who, request)
    check_names(request, list(entered), {name for one in scores.values() for name in one} | data.datasets.keys())
    evaluated = _run(request, entered, data.datasets, quiet)
    scores |= {name: scores_of(one.rows) for name, one in evaluated.items()}
    known = roles(who.checkpoints)
    judged = judge_all({name: scores[name] for name in entered}, request, known)
    sweep = {
        degradation: _run(request, entered, data.datasets, quiet, degradation)
        for degradation in (DEGRADATIONS if request.robustness else ())
    }
    models = {}
    for name, one in entered.items():
        numbers, role, ran = judged["models"][name], known.get(name, Role()), name in evaluated
        kept = {degradation: found[name] for degradation, found in sweep.items() if ran}
        models[name] = {
            "source": os.path.abspath(one.path) if out is None else places.from_output(out, one.path),
            "detector": one.detector,
            "fake": one.fake.plain() if one.fake else None,
            "calibration": _calibration(one) if ran else None,
            "preprocessing": one.preprocessing.plain() if one.preprocessing else None,
            "bytes": _bytes(one) if ran else None,
            "looks_like": _looks_like(name, one.model, evaluated, numbers),
            "role": role.kind,
            "specialists": list(role.specialists),
            **numbers,
            "robustness": _robustness(kept, numbers, request),
        }
    unreadable = {path: reason for one in evaluated.values() for path, reason in one.unreadable.items()}
    result = {
        "models": models,
        "differences": judged["differences"],
        "warnings": judged["warnings"],
        "settings": {name: getattr(request, name) for name in SETTINGS},
        "unreadable": unreadable,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **data.plain(),
        "versions": {
            "r2m_kernels": __version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
    }
    shown = tables.tables(result, tables.columns_asked(request.columns) or tables.few_columns(result))
    if out is not None:
        run.write_result(Path(out), result, evaluated, shown)
    doubts = [printable(text) for text in result["warnings"]]
    told = [
        *_notes(result),
        *_of_ensembles(result),
        *data.told(),
        *run.left_out(unreadable),
        *doubts,
    ]
    return tables.lines(shown, request.table), [*who.untold, *_outputs(entered), *told]


def _looks_like(
    name: str, model: object, evaluated: Mapping[str, run.Evaluated], numbers: Mapping[str, Any]
) -> dict[str, dict[str, float]] | None:
    """Of an ensemble, whose forgeries what it calls fake looks like."""
    if not isinstance(model, Ensemble):
        return None
    members = {member: evaluated[f"{name}/{member}"] for member in model.members}
    return attribution(members, evaluated[name], next(iter(numbers["datasets"].values()))["threshold"])


def _robustness(
    degraded: Mapping[str, run.Evaluated], clean: Mapping[str, Any], request: Request
) -> dict[str, Any] | None:
    """What is left of a model's numbers, at its threshold, when pictures are degraded; None where none were."""
    found = {}
    for name, one in degraded.items():
        datasets = {
            dataset: metrics(of, clean["datasets"][dataset]["threshold"]) for dataset, of in scores_of(one.rows).items()
        }
        tested = {dataset: of for dataset, of in datasets.items() if dataset != request.threshold_from}
        found[name] = {"datasets": datasets, "average": average(tested, METRICS)}
    return found or None


def _bytes(one: Entrant) -> int:
    """Of the files: of an ensemble, its model's and all adapters'."""
    opened = (open_checkpoint(place, place, adapters=True) for place in (one.path, *one.files))
    return sum(file.stat().st_size for checkpoint in opened for file in checkpoint.files)


def _of_ensembles(result: Mapping[str, Any]) -> list[str]:
    """Whose forgeries what is called fake looks like, and what everybody takes; nothing where none has adapters."""
    lines = [
        f"{printable(name)} on {printable(dataset)}: what it calls fake looks like "
        + ", ".join(f"{printable(member)} ({share:.0%})" for member, share in shares.items())
        for name, one in result["models"].items()
        for dataset, shares in (one["looks_like"] or {}).items()
    ]
    sizes = {name: one["bytes"] for name, one in result["models"].items() if one["bytes"] is not None}
    listed = ", ".join(f"{printable(name)} {readable_bytes(size)}" for name, size in sizes.items())
    return [*lines, f"on the disk: {listed}"] if any(one["looks_like"] for one in result["models"].values()) else []


def _calibration(one: Entrant) -> dict[str, float] | None:
    """Of the log-odds of fake, that is in the checkpoint's classifier."""
    found = calibration_of(one.path, one.fake) if isinstance(one.model, nn.Module) and one.fake else None
    return None if found is None else asdict(found)


def _outputs(entered: Mapping[str, Entrant]) -> list[str]:
    """Which of the models' outputs was taken for the fake's."""
    whose: dict[str, list[str]] = {}
    for name, one in entered.items():
        if one.model is not None and one.fake is not None:
            whose.setdefault(str(one.fake), []).append(name)
    return [f"{some(names)}: {text}" for text, names in whose.items()]


def _check(request: Request, out: str | None, overwrite: bool) -> None:
    if not (request.merged or request.models or request.adapters or request.scores):
        raise BadOption("evaluate: expected the output of a merge, --model, --adapters or --scores")
    kinds = {"OUT": request.merged, "--model": request.models, "--adapters": request.adapters}
    run_here = next((kind for kind, asked in kinds.items() if asked), "")
    if run_here and not request.data:
        raise BadOption(f"evaluate: {run_here} needs --data")
    tables.columns_asked(request.columns)
    if out is not None and (Path(out) / EVALUATION.file).exists() and not overwrite:
        raise BadFile(f"out ({out}): holds an evaluation already; --overwrite replaces it")


def _run(
    request: Request,
    entered: Mapping[str, Entrant],
    datasets: Mapping[str, Dataset],
    quiet: bool,
    degradation: str | None = None,
) -> dict[str, run.Evaluated]:
    evaluated: dict[str, run.Evaluated] = {}
    change = None if degradation is None else functools.partial(degraded, name=degradation, seed=request.seed)
    total = len({frame.path for one in datasets.values() for frame in one.frames})

    def show(name: str, done: int) -> None:
        if shown is not None:
            what = name if degradation is None else f"{name}, {degradation}"
            shown.show(what, done, total, f"{done}/{total}")

    def scored(name: str, model: nn.Module, preprocessing: Preprocessing) -> run.Evaluated:
        progress = functools.partial(show, name)
        return run.run_detector(name, model, datasets, preprocessing, request, progress, change)

    with nullcontext() if quiet else bars() as shown:
        for name, one in entered.items():
            if one.model is None or one.preprocessing is None:
                continue
            if isinstance(one.model, Ensemble):
                members = {
                    member: scored(f"{name}/{member}", one.model.with_adapter(member), one.preprocessing)
                    for member in one.model.members
                }
                evaluated[name] = combined(members)
                evaluated |= {f"{name}/{member}": found for member, found in members.items()}
            else:
                evaluated[name] = scored(name, one.model, one.preprocessing)
    return evaluated


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What the table does not show: thresholds that were chosen, and datasets of one class."""
    settings, notes = result["settings"], []
    if settings["threshold_from"] is not None:
        chosen = {name: one["datasets"][settings["threshold_from"]] for name, one in result["models"].items()}
        listed = ", ".join(f"{printable(name)} {one['threshold']:.3f}" for name, one in chosen.items())
        on = printable(settings["threshold_from"])
        notes.append(f"thresholds chosen on {on} by {settings['threshold_by']}: {listed}; {on} is in no mean")
    one_class = {
        f"{printable(name)}: {'fake' if of['fake videos'] else 'real'} alone: AUC, EER and AP are undefined"
        for one in result["models"].values()
        for name, of in one["datasets"].items()
        if not of["real videos"] or not of["fake videos"]
    }
    return notes + sorted(one_class)
