"""What ``r2m evaluate`` does: models and datasets from its options, a table and files out."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import sklearn
import torch
from torch import nn

from r2m import places
from r2m.checkpoints import hub
from r2m.evaluation import run
from r2m.evaluation.data import Frame, read_dataset, read_scores, scores_of
from r2m.evaluation.detectors import load_detector
from r2m.evaluation.metrics import judge_all
from r2m.evaluation.request import Request
from r2m.naming import name_experts
from r2m.preprocessing import Preprocessing, beside
from r2m.progress import bars
from r2m.recipe import Arrangement
from r2m.records import EVALUATION
from r2m_kernels import __version__
from r2m_kernels.errors import BadFile, BadOption, printable, quoted

SHOWN = ("acc", "auc", "eer", "ap", "video_auc", "video_eer")


def evaluate(request: Request, out: str | None = None, *, overwrite: bool = False, quiet: bool = False) -> list[str]:
    """Judge models, write what came out, and return the lines to print.

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


def _evaluated(request: Request, out: str | None, overwrite: bool, quiet: bool) -> list[str]:
    _check(request, out, overwrite)
    named = name_experts([*request.models, *request.scores])
    checkpoints = dict(list(named.items())[: len(request.models)])
    scores = {name: read_scores(path) for name, path in named.items() if name not in checkpoints}
    datasets = _datasets(request) if checkpoints else {}
    preprocessings = {name: _preprocessing(name, path, request) for name, path in checkpoints.items()}
    arrangement = Arrangement(preset=request.preset)
    models = {
        name: load_detector(request.detector or "", path, f"model '{name}' ({path})", arrangement)
        for name, path in checkpoints.items()
    }
    evaluated = _run(request, models, preprocessings, datasets, quiet)
    scores |= {name: scores_of(one.rows) for name, one in evaluated.items()}
    judged = {
        name: {
            "source": os.path.abspath(path) if out is None else places.from_output(out, path),
            "detector": request.detector if name in models else None,
            "preprocessing": preprocessings[name].plain() if name in models else None,
            **judge_all(scores[name], resamples=request.bootstrap, seed=request.seed),
        }
        for name, path in named.items()
    }
    unreadable = {path: reason for one in evaluated.values() for path, reason in one.unreadable.items()}
    settings = ("split", "frames", "compression", "deepfakebench_compat", "bootstrap", "seed", "device")
    result = {
        "models": judged,
        "settings": {name: getattr(request, name) for name in settings},
        "unreadable": unreadable,
        "versions": {
            "r2m_kernels": __version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
    }
    if out is not None:
        run.write_result(Path(out), result, evaluated)
    return [*table(result), *run.left_out(unreadable)]


def _check(request: Request, out: str | None, overwrite: bool) -> None:
    if not request.models and not request.scores:
        raise BadOption("evaluate: expected --model or --scores")
    if request.models and not request.detector:
        raise BadOption("evaluate: --model needs --detector, which says what the checkpoint is the weights of")
    if request.models and not request.data:
        raise BadOption("evaluate: --model needs --data")
    if out is not None and (Path(out) / EVALUATION.file).exists() and not overwrite:
        raise BadFile(f"out ({out}): holds an evaluation already; --overwrite replaces it")


def _datasets(request: Request) -> dict[str, list[Frame]]:
    datasets: dict[str, list[Frame]] = {}
    for path in request.data:
        for name, frames in read_dataset(path, request).items():
            if name in datasets:
                raise BadOption(f"data ({path}): there is a dataset {quoted(name)} already")
            datasets[name] = frames
    return datasets


def _run(
    request: Request,
    models: Mapping[str, nn.Module],
    preprocessings: Mapping[str, Preprocessing],
    datasets: Mapping[str, Sequence[Frame]],
    quiet: bool,
) -> dict[str, run.Evaluated]:
    evaluated = {}
    total = sum(map(len, datasets.values()))

    def show(name: str, done: int) -> None:
        if shown is not None:
            shown.show(name, done, total, f"{done}/{total}")

    with nullcontext() if quiet else bars() as shown:
        for name, model in models.items():
            progress = functools.partial(show, name)
            evaluated[name] = run.run_detector(name, model, datasets, preprocessings[name], request, progress)
    return evaluated


def table(result: dict[str, Any]) -> list[str]:
    """A row for each model on each dataset, and for its mean over datasets."""
    headings = ["dataset", "model", "frames", "videos", *SHOWN, "95 % of video_auc"]
    rows: list[list[str]] = []
    names = dict.fromkeys(name for one in result["models"].values() for name in one["datasets"])
    one_class = set()
    for dataset in names:
        for model, one in result["models"].items():
            judged = one["datasets"].get(dataset)
            if judged is None:
                continue
            if not judged["real videos"] or not judged["fake videos"]:
                one_class.add(f"{printable(dataset)}: {'fake' if judged['fake videos'] else 'real'} alone")
            interval = judged["intervals"]["video_auc"]
            spread = "–" if interval is None else "{:.3f} to {:.3f}".format(*interval)
            numbers = [str(judged["frames"]), str(judged["videos"]), *(_number(judged[name]) for name in SHOWN)]
            rows.append([printable(dataset), printable(model), *numbers, spread])
    if len(names) > 1:
        for model, one in result["models"].items():
            rows.append(["mean", printable(model), "", "", *(_number(one["average"].get(name)) for name in SHOWN), ""])
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    line = "  ".join(f"{{:{'<' if column < 2 else '>'}{width}}}" for column, width in enumerate(widths))
    text = [line.format(*row).rstrip() for row in [headings, *rows]]
    return [*text, *(f"{one}: AUC, EER and AP are undefined" for one in sorted(one_class))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _preprocessing(name: str, path: str, request: Request) -> Preprocessing:
    """What was asked for, on top of what stands beside the checkpoint."""
    stored = beside(hub.local(path))
    asked = {"size": request.size, "mean": _triple("mean", request.mean), "std": _triple("std", request.std)}
    known: dict[str, Any] = {
        field: getattr(stored, field, None) if one is None else one for field, one in asked.items()
    }
    missing = [f"--{field}" for field, one in known.items() if one is None]
    if missing:
        raise BadOption(
            f"model '{name}' ({path}): its preprocessing is not known: no preprocessor_config.json beside it; expected "
            f"{', '.join(missing)}"
        )
    return Preprocessing.of(**known)


def _triple(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        values = [float(one) for one in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise BadOption(f"--{name} {text}: expected a number or three with commas, such as 0.5,0.5,0.5")
    return values
