"""Pictures of an evaluation: scores, ROC curves and reliability by test set, and specialists against forgeries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from r2m.evaluation.calibrating import probability
from r2m.evaluation.ensemble import log_odds
from r2m.evaluation.metrics import Scores, metrics, reliability
from r2m.log_odds import Calibration
from r2m.reporting.figures import OTHERS, WIDTH, Picture, Rows, colour, finish, legend, matrix_picture, picture
from r2m.reporting.matrix import Matrix, number
from r2m.reporting.standing import FRAMES, Standing
from r2m.shorten import clip, shorten

_BINS = 20  # of scores
_LETTERS = 13  # of a model's name beside its scores
_TITLE = 40  # of a test set over its panel
_NAMED = 6  # models with a colour of their own
_DOT = 60.0  # square points of a dot for all frames
_STEPS = 250  # places on each side of a ROC curve that can be told apart in a panel
_THRESHOLD = 0.5  # of evaluations that do not say which
_SQUARE = (WIDTH, WIDTH)
_FRAMED = "framed: the forgeries that the specialist's name says it was trained on"
_BEFORE, _AFTER = "before", "now"
ByModel = Mapping[str, Scores]


def of_evaluation(of: Standing, scores: Mapping[str, ByModel]) -> Iterator[Picture]:
    """All of them.

    Args:
        of: the evaluation.
        scores: model → dataset → what it said of the frames.
    """
    held = {
        dataset: {name: scores[name][dataset] for name in of.ranked if dataset in scores.get(name, {})}
        for dataset in of.datasets
    }
    held = {dataset: models for dataset, models in held.items() if models}
    if held:
        yield _histograms(of, held)
    both = {dataset: _of_both(models) for dataset, models in held.items() if _of_both(models)}
    if both:
        yield _roc(of, both)
    bins = {
        dataset: {name: found for name in of.ranked if (found := _reliability(of, name, dataset))}
        for dataset in of.datasets
    }
    if any(bins.values()):
        yield _reliabilities(of, {dataset: models for dataset, models in bins.items() if models})
    calibrated = {} if of.merged is None else _calibrated(of, scores.get(of.merged, {}))
    if calibrated:
        yield _calibration(of, calibrated)
    if len(of.specialists) > 1:
        yield _training_against_forgeries(of)


def _of_both(models: ByModel) -> dict[str, Scores]:
    """Those with real and fake videos."""
    return {name: one for name, one in models.items() if len(np.unique(one.by_video().labels)) == 2}


def _histograms(of: Standing, held: Mapping[str, ByModel]) -> Picture:
    edges = np.linspace(0, 1, _BINS + 1)
    counts = {
        (dataset, name): [np.histogram(one.probabilities[one.labels == label], edges)[0] for label in (0, 1)]
        for dataset, models in held.items()
        for name, one in models.items()
    }

    def panel(dataset: str) -> Callable[[Axes], None]:
        return lambda axes: _ridges(axes, of, dataset, {name: counts[dataset, name] for name in held[dataset]})

    rows = [
        {
            "dataset": dataset,
            "model": name,
            "from": float(edges[bin_]),
            "real": int(real[bin_]),
            "fake": int(fake[bin_]),
        }
        for (dataset, name), (real, fake) in counts.items()
        for bin_ in range(_BINS)
    ]
    most = max(map(len, held.values()))
    return picture(
        "scores",
        "Scores",
        "Probability of fake, frame by frame: fakes stand up, reals hang down, each scaled to its highest bar. The "
        "less the two share, the better; both on one side of the mark, above which a frame is called fake: the "
        "threshold is wrong for this set.",
        rows,
        [panel(dataset) for dataset in held],
        (WIDTH, 1.2 + 0.34 * most),
    )


def _ridges(axes: Axes, of: Standing, dataset: str, counts: Mapping[str, Sequence[NDArray[np.int64]]]) -> None:
    edges, names = np.linspace(0, 1, _BINS + 1), shorten(of.specialists, list(of.roles), limit=_LETTERS)
    for place, (name, found) in enumerate(counts.items()):
        for count, sign, index in zip(found, (-1, 1), (0, 1), strict=True):
            heights = -place + sign * 0.45 * count / max(count.max(), 1)
            label = ("real", "fake")[index] if place == 0 else None
            axes.stairs(heights, edges, baseline=-place, fill=True, color=colour(index), label=label)
        threshold = of.models[name]["datasets"].get(dataset, {}).get("threshold", _THRESHOLD)
        axes.plot([threshold] * 2, [-place - 0.45, -place + 0.45], color=axes.xaxis.label.get_color(), linewidth=1.2)
    axes.set_yticks([-place for place in range(len(counts))], [names[name] for name in counts])
    axes.set_xlim(0, 1)
    axes.set_ylim(-len(counts) + 0.4, 0.6)
    axes.tick_params(axis="y", length=0)
    finish(axes, "P(fake)", "", clip(of.sets[dataset], _TITLE))
    # On the line of the label, below the numbers.
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0), ncols=2, handlelength=1, columnspacing=1, borderaxespad=2.0)


def _roc(of: Standing, both: Mapping[str, ByModel]) -> Picture:
    from sklearn.metrics import roc_curve

    counted = {
        (dataset, name): one if of.metric == FRAMES else one.by_video()
        for dataset, models in both.items()
        for name, one in models.items()
    }
    rates = {place: np.stack(roc_curve(one.labels, one.probabilities)[:2]) for place, one in counted.items()}

    def panel(dataset: str) -> Callable[[Axes], None]:
        shown = {name: _thinned(rates[dataset, name]) for name in both[dataset]}
        texts = {name: f"{of.short[name]} {number(of.value(name, dataset))}" for name in shown}
        return lambda axes: _square(
            axes, shown, texts, f"real {of.unit} called fake", "fakes found", of.sets[dataset], loc="lower right"
        )

    rows = [
        {"dataset": dataset, "model": name, "false positive rate": fpr, "true positive rate": tpr}
        for (dataset, name), points in rates.items()
        for fpr, tpr in points.T.tolist()
    ]
    return picture(
        "roc",
        "ROC curves",
        f"Of all {of.unit}, with the AUC beside each name. The further to the upper left, the better; the dotted line "
        "is chance." + _grey(of),
        rows,
        [panel(dataset) for dataset in both],
        _SQUARE,
    )


def _thinned(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, n) of a curve without what nobody could see."""
    places = np.round(points * _STEPS)
    new = np.any(np.diff(places, axis=1, prepend=-1) != 0, axis=0)
    new |= np.any(np.diff(places, axis=1, append=-1) != 0, axis=0)  # and where a run of the same ends
    return points[:, new]


def _grey(of: Standing) -> str:
    others = len(of.roles) - _NAMED
    return f" {others} more models are grey; the table has their numbers." if others > 0 else ""


def _square(
    axes: Axes,
    curves: Mapping[str, NDArray[np.float64]],
    texts: Mapping[str, str],
    x: str,
    y: str,
    title: str,
    *,
    sizes: Mapping[str, NDArray[np.float64]] | None = None,
    **where: Any,
) -> None:
    """A line for each model in a square with its diagonal; the first above all others."""
    axes.plot([0, 1], [0, 1], ":", color=OTHERS, linewidth=1)
    handles = [
        axes.plot(
            *points,
            color=colour(index),
            linewidth=2.2 if index == 0 else 1.3 if index < _NAMED else 0.6,
            zorder=5 - min(index, _NAMED) / 10,
        )[0]
        for index, points in enumerate(curves.values())
    ]
    for index, (name, dots) in enumerate((sizes or {}).items()):
        if index < _NAMED:
            axes.scatter(
                curves[name][0], curves[name][1], dots, color=colour(index), zorder=5 - index / 10, linewidth=0
            )
    legend(axes, handles, [texts[name] for name in curves], **where)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_box_aspect(1)
    finish(axes, x, y, clip(title, _TITLE))


def _reliability(of: Standing, name: str, dataset: str) -> Rows:
    found: Rows = of.models[name]["datasets"].get(dataset, {}).get("reliability") or ()
    return found


def _reliabilities(of: Standing, bins: Mapping[str, Mapping[str, Rows]]) -> Picture:
    def panel(dataset: str) -> Callable[[Axes], None]:
        shown = {
            name: np.array([[one["probability"] for one in found], [one["fakes"] for one in found]])
            for name, found in bins[dataset].items()
        }
        texts = {name: f"{of.short[name]} {number(of.value(name, dataset, 'ece'))}" for name in shown}
        counts = {name: np.array([float(one["count"]) for one in found]) for name, found in bins[dataset].items()}
        sizes = {name: 2 + _DOT * count / count.sum() for name, count in counts.items()}
        return lambda axes: _square(
            axes, shown, texts, "probability of fake", "share of fakes", of.sets[dataset], sizes=sizes, loc="upper left"
        )

    rows = [
        {"dataset": dataset, "model": name, **one}
        for dataset, models in bins.items()
        for name, found in models.items()
        for one in found
    ]
    return picture(
        "reliability",
        "Reliability",
        "How often a frame is fake, against the probability that was given; beside each name the expected calibration "
        "error, and a dot is the larger the more frames it stands for. On the dotted line probabilities mean what they "
        "say; below it the model is too sure of fakes, above it too sure of reals. It depends on how many fakes a test "
        "set has." + _grey(of),
        rows,
        [panel(dataset) for dataset in bins],
        _SQUARE,
    )


def _calibrated(of: Standing, scores: ByModel) -> dict[str, dict[str, Scores]]:
    """By dataset what the merge says, and what it said before r2m calibrate; empty where that was never."""
    found = of.models[of.first].get("calibration")
    if found is None:
        return {}
    one = Calibration(found["temperature"], found["bias"])

    def before(now: Scores) -> Scores:
        return replace(now, probabilities=probability(one.undone(log_odds([now.probabilities.tolist()])[0])))

    return {dataset: {_BEFORE: before(now), _AFTER: now} for dataset, now in scores.items()}


def _calibration(of: Standing, calibrated: Mapping[str, ByModel]) -> Picture:
    bins = {dataset: {when: reliability(one) for when, one in both.items()} for dataset, both in calibrated.items()}
    errors = {
        dataset: {when: metrics(one)["ece"] for when, one in both.items()} for dataset, both in calibrated.items()
    }

    def panel(dataset: str) -> Callable[[Axes], None]:
        shown = {
            when: np.array([[one["probability"] for one in found], [one["fakes"] for one in found]])
            for when, found in reversed(bins[dataset].items())
        }
        texts = {when: f"{when} {number(errors[dataset][when])}" for when in shown}
        return lambda axes: _square(
            axes, shown, texts, "probability of fake", "share of fakes", of.sets[dataset], loc="upper left"
        )

    found = of.models[of.first]["calibration"]
    return picture(
        "calibration",
        "Before and after calibration",
        "How often a frame is fake, against the probability that the merge gives now, and gave before its log-odds "
        f"were divided by {found['temperature']:.4g} and {found['bias']:+.4g} was added (r2m calibrate); beside each "
        "the expected calibration error.",
        [
            {"dataset": dataset, "when": when, **one}
            for dataset, both in bins.items()
            for when, of_bins in both.items()
            for one in of_bins
        ],
        [panel(dataset) for dataset in bins],
        _SQUARE,
    )


def _training_against_forgeries(of: Standing) -> Picture:
    names = of.specialists
    own = {name: [one for one in of.datasets if _speaks_of(of.short[name], one)] for name in names}
    first = list(dict.fromkeys(dataset for name in names for dataset in own[name]))
    datasets = first + [dataset for dataset in of.datasets if dataset not in first]
    lines = [*names, *(name for name in (of.merged, of.average) if name is not None)]
    values = [[of.value(name, dataset) for dataset in datasets] for name in lines]
    framed = {(lines.index(name), datasets.index(dataset)) for name in names for dataset in own[name]}
    matrix = Matrix(
        [of.short[name] for name in lines],
        [of.sets[dataset] for dataset in datasets],
        values,
        0.4,
        titles={(i, j): f"{name} on {dataset}" for i, name in enumerate(lines) for j, dataset in enumerate(datasets)},
        framed=framed,
        corner="trained on ↓ tested on →",
    )
    return matrix_picture(
        "forgeries",
        "Specialists against forgeries",
        "AUC of each specialist on each test set, above the merge. Bright along a diagonal and dark elsewhere: "
        "specialists know their own forgeries alone, and a merge has something to gain"
        + (f"; {_FRAMED}." if framed else "."),
        [{"model": name, **dict(zip(datasets, row, strict=True))} for name, row in zip(lines, values, strict=True)],
        matrix,
    )


def _speaks_of(specialist: str, dataset: str) -> bool:
    """Whether a test set's name has all words of a specialist's."""
    words, others = ({*re.findall(r"[0-9a-z]+", name.lower())} for name in (specialist, dataset))
    return bool(words) and words <= others
