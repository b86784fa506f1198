"""What ``r2m evaluate`` does: models and datasets from its options, a table and files out."""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import sklearn
import torch
from torch import nn

from r2m import naming, places
from r2m.checkpoints.adapter_config import CONFIG
from r2m.checkpoints.reader import open_checkpoint
from r2m.evaluation import run, tables
from r2m.evaluation.comparison import Role, merged, roles
from r2m.evaluation.data import Data, Dataset, read_scores, scores_of
from r2m.evaluation.degradations import DEGRADATIONS, degraded
from r2m.evaluation.ensemble import Ensemble, attribution, combined
from r2m.evaluation.judging import check_names, judge_all
from r2m.evaluation.metrics import METRICS, average, metrics
from r2m.evaluation.models import load, preprocessing_of
from r2m.evaluation.reading import read_all
from r2m.evaluation.request import Request
from r2m.naming import split
from r2m.preprocessing import Preprocessing
from r2m.progress import bars, readable_bytes
from r2m.records import EVALUATION
from r2m_kernels import __version__
from r2m_kernels.errors import BadFile, BadOption, printable, quoted


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
    beside, merges, untold = _specialists(request)
    given = {
        "model": [*map(split, (*request.merged, *request.models)), *beside],
        "adapters": list(map(split, request.adapters)),
        "scores": list(map(split, request.scores)),
    }
    named = naming.named([one for kind in given.values() for one in kind])
    each = iter(named.items())
    paths = {kind: dict(itertools.islice(each, len(ones))) for kind, ones in given.items()}
    scores = {name: read_scores(path) for name, path in paths["scores"].items()}
    checkpoints = paths["model"] | paths["adapters"]
    data = read_all(request) if checkpoints else Data()
    preprocessings = {
        name: preprocessing_of(name, path, request, merges.get(path)) for name, path in checkpoints.items()
    }
    models = {name: load(name, path, request, name in paths["adapters"]) for name, path in checkpoints.items()}
    sources, whose, attributions = dict(named), dict[str, str](), dict[str, Any]()
    for name, one in models.items():
        if isinstance(one, Ensemble):
            whose |= {f"{name}/{member}": name for member in one.members}
            sources |= {f"{name}/{member}": path for member, path in one.paths.items()}
    twice = next((member for member in whose if member in named), None)
    if twice is not None:
        raise BadOption(f"model {quoted(twice)}: is also an adapter's name, of {quoted(whose[twice])}; give it another")
    preprocessings |= {member: preprocessings[name] for member, name in whose.items()}
    names = [*checkpoints, *whose, *paths["scores"]]
    check_names(request, names, {name for one in scores.values() for name in one} | data.datasets.keys())
    evaluated = _run(request, models, preprocessings, data.datasets, quiet)
    scores |= {name: scores_of(one.rows) for name, one in evaluated.items()}
    order = [*evaluated, *paths["scores"]]
    known = roles(checkpoints)
    judged = judge_all({name: scores[name] for name in order}, request, known)
    for name, one in models.items():
        if isinstance(one, Ensemble):
            members = {member: evaluated[f"{name}/{member}"] for member in one.members}
            threshold = next(iter(judged["models"][name]["datasets"].values()))["threshold"]
            attributions[name] = attribution(members, evaluated[name], threshold)
    sweep = {
        one: _run(request, models, preprocessings, data.datasets, quiet, one)
        for one in (DEGRADATIONS if request.robustness else ())
    }
    models_found = {}
    for name, numbers in judged["models"].items():
        role = known.get(name, Role())
        models_found[name] = {
            "source": os.path.abspath(sources[name]) if out is None else places.from_output(out, sources[name]),
            "detector": request.detector if name in evaluated else None,
            "preprocessing": preprocessings[name].plain() if name in evaluated else None,
            "bytes": _bytes(sources[name], models.get(name)) if name in evaluated else None,
            "looks_like": attributions.get(name),
            "role": role.kind,
            "specialists": list(role.specialists),
            **numbers,
            "robustness": _robustness(
                {one: found[name] for one, found in sweep.items() if name in found}, numbers, request
            ),
        }
    unreadable = {path: reason for one in evaluated.values() for path, reason in one.unreadable.items()}
    settings = ("split", "frames", "subfolders", "compression", "deepfakebench_compat", "bootstrap", "seed", "device")
    judging = ("threshold", "threshold_from", "threshold_by", "against")
    result = {
        "models": models_found,
        "differences": judged["differences"],
        "warnings": judged["warnings"],
        "settings": {name: getattr(request, name) for name in (*settings, *judging)},
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
    notes = [
        *untold,
        *_notes(result),
        *_of_ensembles(result),
        *data.told(),
        *run.left_out(unreadable),
        *(printable(text) for text in result["warnings"]),
    ]
    return tables.lines(shown, request.table), notes


def _specialists(request: Request) -> tuple[list[tuple[str | None, str]], dict[str, str], list[str]]:
    """Names and paths of what merges were made of, by path the merge, and lines on those that are not run."""
    found: dict[str, str] = {}
    of: dict[str, str] = {}
    lines = []
    asked = [split(one) for one in (*request.merged, *request.models, *request.adapters, *request.scores)]
    names, taken = {name for name, _ in asked}, {os.path.realpath(path) for _, path in asked}
    for argument in request.merged:
        path = split(argument)[1]
        recipe = merged(path)
        if recipe is None:
            raise BadFile(f"{path}: expected the output of a merge; a checkpoint that is none is given by --model")
        for name, expert in recipe.experts.items():
            why = "is not there" if not os.path.exists(expert) else "is an adapter" if _is_adapter(expert) else ""
            if why:
                lines.append(f"not beside it: {printable(name)}, of {printable(path)}: {printable(expert)} {why}")
            elif os.path.realpath(expert) not in taken:
                taken.add(os.path.realpath(expert))
                of[expert] = path
                numbered = (f"{name}#{number}" for number in itertools.count(2))
                found[next(one for one in itertools.chain([name], numbered) if one not in {*names, *found})] = expert
    return list(found.items()), of, lines


def _is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(path, CONFIG))


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


def _bytes(path: str, model: nn.Module | Ensemble | None) -> int:
    """Of the files: of an ensemble, its model's and all adapters'."""
    directories = [path, *(model.paths.values() if isinstance(model, Ensemble) else ())]
    opened = (open_checkpoint(one, one, adapters=True) for one in directories)
    return sum(file.stat().st_size for one in opened for file in one.files)


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


def _check(request: Request, out: str | None, overwrite: bool) -> None:
    if not (request.merged or request.models or request.adapters or request.scores):
        raise BadOption("evaluate: expected the output of a merge, --model, --adapters or --scores")
    kinds = {"OUT": request.merged, "--model": request.models, "--adapters": request.adapters}
    run_here = next((kind for kind, asked in kinds.items() if asked), "")
    if run_here and not request.detector:
        raise BadOption(f"evaluate: {run_here} needs --detector, which says what the checkpoint is the weights of")
    if run_here and not request.data:
        raise BadOption(f"evaluate: {run_here} needs --data")
    tables.columns_asked(request.columns)
    if out is not None and (Path(out) / EVALUATION.file).exists() and not overwrite:
        raise BadFile(f"out ({out}): holds an evaluation already; --overwrite replaces it")


def _run(
    request: Request,
    models: Mapping[str, nn.Module | Ensemble],
    preprocessings: Mapping[str, Preprocessing],
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

    def scored(name: str, model: nn.Module) -> run.Evaluated:
        progress = functools.partial(show, name)
        return run.run_detector(name, model, datasets, preprocessings[name], request, progress, change)

    with nullcontext() if quiet else bars() as shown:
        for name, model in models.items():
            if isinstance(model, Ensemble):
                members = {member: scored(f"{name}/{member}", model.with_adapter(member)) for member in model.members}
                evaluated[name] = combined(members)
                evaluated |= {f"{name}/{member}": one for member, one in members.items()}
            else:
                evaluated[name] = scored(name, model)
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
