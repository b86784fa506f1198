"""``r2m calibrate``: an output's log-odds fitted to pictures, and its merge written again with that in its head."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from sklearn.metrics import precision_recall_curve
from torch import nn

from r2m import former
from r2m.arrangement import Arranged
from r2m.evaluation import detection
from r2m.evaluation.calibrating import FEWEST, Labelled, Numbers, probability, with_labels, without_labels
from r2m.evaluation.ensemble import log_odds
from r2m.evaluation.metrics import Scores, metrics, reliability
from r2m.evaluation.models import calibration_of, fake_of, load, preprocessing_of
from r2m.evaluation.reading import read_all
from r2m.evaluation.request import Request
from r2m.evaluation.run import run_detector
from r2m.evaluation.statistics import estimated, under
from r2m.job import open_job
from r2m.log_odds import Calibration
from r2m.merge import merge_files
from r2m.options import Options
from r2m.output import Workplace, held
from r2m.places import new_file
from r2m.recipe import Recipe
from r2m.relink import refuse_lost
from r2m_kernels import Progress, checks
from r2m_kernels.errors import BadFile, BadOption, DoesNotFit
from r2m_kernels.streaming import usable_device

USUAL_FAKES = 0.5
_DIGITS = 6  # of what the recipe keeps


def calibrate(
    out: str,
    files: Sequence[str],
    request: Request,
    *,
    fakes: float | None = None,
    statistics: bool = False,
    options: Options | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Find temperature and bias of an output's log-odds, and write it anew with them in its classifier.

    Args:
        out: the output of a merge; of one that is calibrated, the calibration is replaced.
        files: pictures, videos and directories of them, without labels.
        request: ``data`` with labels instead; how the detector is loaded and run.
        fakes: the share of fakes that probabilities are for. None: without labels a half, with labels theirs.
        statistics: estimate running means and variances of batch normalisation from the pictures first.
        options: how it is merged again.
        progress: of that.
        quiet: no progress of pictures.

    Returns:
        The merge's report, and what could not be read, in lines.

    Raises:
        InvalidInput: no merge, no such pictures, or too few of them.
        OSError: a file cannot be read or written; ``filename`` is set.
    """
    if bool(files) == bool(request.data):
        raise BadOption("calibrate: expected pictures without labels (FILE…), or --data with labels")
    share = None if fakes is None else _share(fakes)

    def found(recipe: Recipe) -> tuple[Recipe, dict[str, Any], list[str]]:
        fake = fake_of("model", out, request)
        sign = 1 if fake.index == 1 else -1
        model = None
        if statistics:
            recipe, model = _with_statistics(out, files, request, recipe)
        one, scores, untold = (_labelled if request.data else _unlabelled)(out, files, request, quiet, model)
        before = (calibration_of(out, fake) or Calibration()).undone(one)
        if scores is None:
            of = USUAL_FAKES if share is None else share
            calibration, rule = without_labels(before, of), "spread and mean of log-odds, without labels,"
            judged: dict[str, Any] = {"before": None, "after": None}
        else:
            of = float(scores.mean()) if share is None else share
            calibration, rule = with_labels(Labelled(before, scores), of), "logistic regression on labels,"
            after = calibration.done(before)
            judged = {"before": _judged(before, scores), "after": _judged(after, scores)}
        about = {"rule": rule.rstrip(","), "pictures": len(one), "fakes": of, **judged}
        rounded = _short(calibration.temperature), _short(sign * calibration.bias)
        return replace(recipe, temperature=rounded[0], head_bias=rounded[1]), about, untold

    return _again(out, found, options or Options(), progress)


def undo(
    out: str, *, options: Options | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Write an output anew as it was before it was calibrated. Arguments and errors are :func:`calibrate`'s."""

    def without(recipe: Recipe) -> tuple[Recipe, None, list[str]]:
        if recipe.calibration is None and recipe.statistics is None:
            raise BadOption(f"calibrate: --undo: {out} is not calibrated")
        return replace(recipe, temperature=None, head_bias=None, statistics=None), None, []

    done = _again(out, without, options or Options(), progress)
    _file(out).unlink(missing_ok=True)
    return done


def _file(out: str) -> Path:
    """Beside an output: in it, it would be replaced before it is read."""
    return Path(os.path.abspath(out) + ".statistics.safetensors")


def _with_statistics(out: str, files: Sequence[str], request: Request, recipe: Recipe) -> tuple[Recipe, nn.Module]:
    """The recipe with running statistics from pictures, which go into a file beside the output, and its detector.

    Raises:
        BadFile: too few pictures.
        DoesNotFit: it has no such statistics, or no expert changed them in training.
    """
    label, place = f"model ({out})", usable_device(request.device)
    arranged = open_job(replace(recipe, statistics=None)).arranged
    preprocessing = preprocessing_of("model", out, request)
    model = load("model", out, request, adapters=False)
    assert isinstance(model, nn.Module)
    paths = files or [str(frame.path) for one in read_all(request).datasets.values() for frame in one.frames]
    seen = list(detection.images(paths, preprocessing, request.frames))
    if len(seen) < FEWEST:
        raise BadFile(f"calibrate: expected {FEWEST} pictures at least, better 32, got {len(seen)}")
    batches = (
        torch.stack(seen[start : start + request.batch]).to(place) for start in range(0, len(seen), request.batch)
    )
    found = under(arranged.base.specs, estimated(model.to(place), batches, label), label)
    if not any(_changed(arranged, name) for name in found):
        raise DoesNotFit(
            "calibrate: --statistics: every expert has the base's running means and variances: they were frozen in "
            "training, and with others the experts' weights do not mean what they learned"
        )
    new_file(_file(out), safetensors.torch.save({name: value.contiguous() for name, value in found.items()}))
    return replace(recipe, statistics=str(_file(out))), model


def _changed(arranged: Arranged, name: str) -> bool:
    """Whether an expert's tensor is not the base's."""
    base = arranged.base.read(name)
    return any(not torch.equal(expert.read(name), base) for expert in arranged.experts.values())


def _again(
    out: str,
    changed: Callable[[Recipe], tuple[Recipe, dict[str, Any] | None, list[str]]],
    options: Options,
    progress: Progress | None,
) -> tuple[dict[str, Any], list[str]]:
    """Merge an output again by a recipe that is made of its own."""
    former.recipe_of(out)  # where it is none, nothing is made beside it
    with held(out) as workplace:  # what two of these read at once, one would write without the other's
        if options.resume and workplace.ended:
            return _ended(out, workplace), []
        recipe = former.recipe_of(out)
        refuse_lost(recipe, out)
        now, about, untold = changed(recipe)
        running = replace(options, max_shard_size=former.shard_size(out), overwrite=True, reuse=True)
        report = merge_files(now, out, running, progress=progress, workplace=workplace, calibrated=about)
    return report, untold


def _ended(out: str, workplace: Workplace) -> dict[str, Any]:
    report = former.report_of(out)  # cut off when all was done
    workplace.clear()
    return report


def _unlabelled(
    out: str, files: Sequence[str], request: Request, quiet: bool, model: nn.Module | None
) -> tuple[Numbers, None, list[str]]:
    """(n,) log-odds of fake, of pictures and of videos, each of which is one, by ``model`` if there is one."""
    found = detection.detect(out, files, request, adapters=False, videos=False, quiet=quiet, loaded=model)
    scores = [row["score"] for row in found.rows if "score" in row and "frame" not in row]
    return log_odds([scores])[0], None, [f"left out: {line}" for line in detection.errors(found)]


def _labelled(
    out: str, _files: Sequence[str], request: Request, _quiet: bool, model: nn.Module | None
) -> tuple[Numbers, np.ndarray[Any, np.dtype[np.int64]], list[str]]:
    """The same of pictures with labels, and these; a picture that test sets share counts once."""
    data = read_all(request)
    preprocessing = preprocessing_of("model", out, request)
    detector = load("model", out, request, adapters=False) if model is None else model
    assert not hasattr(detector, "members")
    evaluated = run_detector("model", detector, data.datasets, preprocessing, request, lambda _: None)  # type: ignore[arg-type]
    rows = {str(frame.path): (frame.label, value) for one in evaluated.rows.values() for frame, value in one}
    labels = np.array([label for label, _ in rows.values()], np.int64)
    untold = [f"left out: {path}: {reason}" for path, reason in evaluated.unreadable.items()]
    return log_odds([[value for _, value in rows.values()]])[0], labels, [*data.told(), *untold]


def _judged(logits: Numbers, labels: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, Any]:
    """Calibration error, F1 at .5 and at the best threshold, and the reliability in bins."""
    probabilities = probability(logits)
    names = np.array([str(index) for index in range(len(labels))])
    scores = Scores(labels, probabilities, names, names)
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    best = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    known = metrics(scores)
    return {"ece": known["ece"], "f1": known["f1"], "best_f1": float(best.max()), "reliability": reliability(scores)}


def _share(fakes: float) -> float:
    share = checks.number("fakes", fakes)
    if not 0 < share < 1:
        raise BadOption(f"fakes: expected a share between 0 and 1, got {fakes:g}")
    return share


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
