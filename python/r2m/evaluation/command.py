"""What ``r2m evaluate`` does: models and datasets from its options, a table and files out."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from r2m.arrangement import Arrangement
from r2m.extras import need
from r2m.naming import name_experts
from r2m.preprocessing import Preprocessing, found
from r2m_kernels.errors import InvalidInput, quoted

SHOWN = ("acc", "auc", "eer", "ap", "video_auc", "video_eer")


def evaluate(
    *,
    models: Sequence[str],
    detector: str | None,
    preset: str | None,
    scores: Sequence[str],
    size: int | None,
    mean: str | None,
    std: str | None,
    data: Sequence[str],
    root: str | None,
    split: str,
    compression: str,
    labels: Sequence[str],
    frames: int,
    strict: bool,
    compat: bool,
    out: str | None,
    overwrite: bool,
    bootstrap: int,
    seed: int,
    batch: int,
    device: str,
    quiet: bool,
) -> list[str]:
    """The lines to print; see the command's help for the arguments.

    Raises:
        InvalidInput: an option, a model or a dataset cannot be used; nothing is written then.
        OSError: of the file system.
    """
    need("evaluate", "evaluate", "sklearn", "PIL")
    from r2m.evaluation import run
    from r2m.evaluation.data import Frame, Reading, read_dataset, read_scores
    from r2m.evaluation.detectors import load_detector

    if not models and not scores:
        raise InvalidInput("evaluate: expected --model or --scores")
    if models and not detector:
        raise InvalidInput("evaluate: --model needs --detector, which says what the checkpoint is the weights of")
    if models and not data:
        raise InvalidInput("evaluate: --model needs --data")
    target = Path(out) if out else None
    if target is not None and (target / run.RESULT_FILE).exists() and not overwrite:
        raise InvalidInput(f"out ({out}): holds an evaluation already; --overwrite replaces it")
    named = name_experts([*models, *scores])
    checkpoints = dict(list(named.items())[: len(models)])
    finished = {name: read_scores(path) for name, path in named.items() if name not in checkpoints}
    reading = Reading(Path(root) if root else None, split, frames, compression, _labels(labels), compat)
    datasets: dict[str, list[Frame]] = {}
    for path in data if models else ():
        for name, held in read_dataset(path, reading).items():
            if name in datasets:
                raise InvalidInput(f"data ({path}): there is a dataset {quoted(name)} already")
            datasets[name] = held
    prepared = {name: _preprocessing(name, path, size, mean, std) for name, path in checkpoints.items()}
    wanted = Arrangement(preset=preset)
    loaded = {
        name: load_detector(detector or "", path, f"model '{name}' ({path})", wanted)
        for name, path in checkpoints.items()
    }

    evaluated: dict[str, run.Evaluated] = {}
    with _progress(quiet) as bar:
        for name, model in loaded.items():
            task = bar.add_task(name, total=sum(map(len, datasets.values()))) if bar else None
            evaluated[name] = run.run_detector(
                model,
                datasets,
                prepared[name],
                label=f"model '{name}'",
                device=device,
                batch=batch,
                strict=strict,
                progress=None if task is None else functools.partial(bar.advance, task),
            )
    result: dict[str, Any] = {"models": {}}
    for name, path in named.items():
        of = evaluated[name].scores() if name in evaluated else finished[name]
        result["models"][name] = {
            "source": os.path.abspath(path),
            "detector": detector if name in evaluated else None,
            "preprocessing": prepared[name].plain() if name in prepared else None,
            **run.judged(of, resamples=bootstrap, seed=seed),
        }
    unreadable = {path: reason for one in evaluated.values() for path, reason in one.unreadable.items()}
    settings = {"split": split, "frames": frames, "compression": compression, "deepfakebench_compat": compat}
    result |= {
        "settings": {**settings, "bootstrap": bootstrap, "seed": seed, "device": device},
        "unreadable": unreadable,
        "versions": run.versions(),
    }
    if target is not None:
        run.write_result(target, result, evaluated)
    return [*table(result), *run.told(unreadable)]


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
                one_class.add(f"{dataset}: {'fake' if judged['fake videos'] else 'real'} alone")
            interval = judged["intervals"]["video_auc"]
            spread = "–" if interval is None else "{:.3f} to {:.3f}".format(*interval)
            numbers = [str(judged["frames"]), str(judged["videos"]), *(_number(judged[name]) for name in SHOWN)]
            rows.append([dataset, model, *numbers, spread])
    if len(names) > 1:
        for model, one in result["models"].items():
            rows.append(["mean", model, "", "", *(_number(one["average"].get(name)) for name in SHOWN), ""])
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [headings, *rows]
    ]
    return [*text, *(f"{one}: AUC, EER and AP are undefined" for one in sorted(one_class))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _labels(texts: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if not name or value not in ("0", "1"):
            raise InvalidInput(f"--label {text}: expected NAME=0 (real) or NAME=1 (fake)")
        found[name] = int(value)
    return found


def _preprocessing(name: str, path: str, size: int | None, mean: str | None, std: str | None) -> Preprocessing:
    """What was asked for, on top of what stands beside the checkpoint."""
    own = found(path)
    asked = {"size": size, "mean": _triple("mean", mean), "std": _triple("std", std)}
    known = {**(own.plain() if own else {}), **{field: one for field, one in asked.items() if one is not None}}
    missing = [f"--{field}" for field in ("size", "mean", "std") if field not in known]
    if missing:
        raise InvalidInput(
            f"model '{name}' ({path}): its preprocessing is not known: no preprocessor_config.json beside it; expected "
            f"{', '.join(missing)}"
        )
    return Preprocessing.of(known["size"], known["mean"], known["std"])


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
        raise InvalidInput(f"--{name} {text}: expected a number or three with commas, such as 0.5,0.5,0.5")
    return values


def _progress(quiet: bool) -> Any:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return nullcontext()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
