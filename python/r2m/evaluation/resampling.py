"""Intervals of AUCs, of their means over datasets and of their differences between models: a bootstrap over videos.

Frames of one video are alike: an interval that resampled frames would be too narrow. All models are looked at under
the same draws, so that differences are paired; and a video that several datasets share (reals, mostly) is drawn for all
of them at once, so that means over datasets are as uncertain as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from r2m.evaluation.metrics import VIDEO, Numbers, Scores

CONFIDENCE = 0.95
RESAMPLED = ("auc", f"{VIDEO}auc")  # metrics that have intervals
MEAN = "mean"  # in the place of a dataset's name: the mean over them
_Video = tuple[str, str]  # dataset, name


class Ranked:
    """Scores in order, for the AUC under many weights: scikit-learn's number without sorting again."""

    def __init__(self, scores: Scores) -> None:
        values, self._place = np.unique(scores.probabilities, return_inverse=True)
        self._count, self._fake = len(values), scores.labels == 1

    def auc(self, weights: Numbers) -> float:
        """How often a fake is above a real, half where they tie; NaN without one of the two."""
        fake = np.bincount(self._place[self._fake], weights[self._fake], self._count)
        real = np.bincount(self._place[~self._fake], weights[~self._fake], self._count)
        pairs = fake.sum() * real.sum()
        below = np.cumsum(real) - real
        return float((fake * (below + real / 2)).sum() / pairs) if pairs > 0 else np.nan


class Resampled:
    """AUCs of models on datasets under resamples of the videos.

    Args:
        scores: model → dataset → scores.
        count: of resamples.
        seed: of the draws.
    """

    def __init__(self, scores: Mapping[str, Mapping[str, Scores]], count: int, seed: int) -> None:
        self._videos = {model: {name: of.by_video() for name, of in one.items()} for model, one in scores.items()}
        places, strata = _strata(self._videos)
        judged = []
        # (resamples,) by model, dataset and metric
        self._values: dict[tuple[str, str, str], Numbers] = {}
        for model, one in scores.items():
            for name, frames in one.items():
                videos = self._videos[model][name]
                index = np.array([places[name, video] for video in videos.videos.tolist()])
                of_frame = index[np.searchsorted(videos.videos, frames.videos)]
                for key, of, at in zip(RESAMPLED, (frames, videos), (of_frame, index), strict=True):
                    if of is videos and len(videos.labels) == len(frames.labels):  # each frame is one
                        self._values[model, name, key] = self._values[model, name, RESAMPLED[0]]
                        continue
                    values = self._values[model, name, key] = np.full(count, np.nan)
                    judged.append((values, Ranked(of), at))
        for number, weights in enumerate(_draws(strata, count, seed)):
            for values, ranked, at in judged:
                values[number] = ranked.auc(weights[at])

    def interval(self, model: str, dataset: str, key: str) -> list[float] | None:
        """Of a metric; resamples of one class are left out, and None is where there are no others."""
        return _percentiles(self._values[model, dataset, key])

    def mean_interval(self, model: str, datasets: Sequence[str], key: str) -> list[float] | None:
        """Of the metric's mean over datasets; None where there are none."""
        return _percentiles(self._mean(model, datasets, key)) if datasets else None

    def difference(self, model: str, than: str, datasets: Sequence[str], key: str) -> list[float] | None:
        """Of the difference of the metric's means over datasets, or on one."""
        return _percentiles(self._mean(model, datasets, key) - self._mean(than, datasets, key))

    def paired(self, model: str, than: str, dataset: str) -> bool:
        """Whether both were judged on the same videos."""
        one, other = self._videos[model][dataset], self._videos[than][dataset]
        return np.array_equal(one.videos, other.videos) and np.array_equal(one.labels, other.labels)

    def _mean(self, model: str, datasets: Sequence[str], key: str) -> Numbers:
        values: Numbers = np.mean([self._values[model, name, key] for name in datasets], axis=0)
        return values


def _strata(scores: Mapping[str, Mapping[str, Scores]]) -> tuple[dict[_Video, int], list[int]]:
    """Where each dataset's videos stand among all, and how many are drawn from together, in that order.

    Videos are drawn from among those of the same datasets: whichever has a dataset of its own has as many in every
    resample as in truth.
    """
    named: dict[_Video, str | _Video] = {}
    for one in scores.values():
        for name, videos in one.items():
            paths = videos.videos if videos.paths is None else videos.paths
            for video, path in zip(videos.videos.tolist(), paths.tolist(), strict=True):
                named.setdefault((name, video), (name, video) if videos.paths is None else path)
    datasets: dict[str | _Video, set[str]] = {}
    for (name, _), identity in named.items():
        datasets.setdefault(identity, set()).add(name)
    together: dict[tuple[str, ...], list[str | _Video]] = {}
    for identity, of in sorted(datasets.items(), key=lambda item: str(item[0])):
        together.setdefault(tuple(sorted(of)), []).append(identity)
    ordered = [together[of] for of in sorted(together)]
    place = {identity: index for index, identity in enumerate(one for stratum in ordered for one in stratum)}
    return {video: place[identity] for video, identity in named.items()}, [len(stratum) for stratum in ordered]


def _draws(strata: Sequence[int], count: int, seed: int) -> Iterator[Numbers]:
    """How often each video is drawn, resample by resample."""
    dice = np.random.default_rng(seed)
    for _ in range(count):
        drawn = [np.bincount(dice.integers(0, size, size), minlength=size) for size in strata]
        yield np.concatenate(drawn).astype(np.float64)


def _percentiles(values: Numbers) -> list[float] | None:
    defined = values[~np.isnan(values)]
    tails = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
    return [float(one) for one in np.percentile(defined, tails)] if len(defined) else None
