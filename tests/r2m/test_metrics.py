"""Metrics are scikit-learn's and their definitions; intervals, differences and doubts are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from r2m.evaluation.comparison import Role, baselines
from r2m.evaluation.judging import CRITERIA, chosen_threshold, judge_all
from r2m.evaluation.metrics import KEYS, METRICS, Scores, average, judge, metrics, reliability, worst
from r2m.evaluation.request import Request
from r2m.evaluation.resampling import Ranked, Resampled
from sklearn.calibration import calibration_curve

from r2m_kernels.errors import BadOption


def scores(labels: list[int], values: list[float], videos: list[str] | None = None) -> Scores:
    names = [str(index) for index in range(len(labels))] if videos is None else videos
    return Scores(np.array(labels), np.array(values, dtype=float), np.array(names))


def pairs(labels: np.ndarray, values: np.ndarray, weights: np.ndarray) -> float:
    """The AUC as it is defined: how often a fake is above a real, half where they tie."""
    wins = total = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            weight = weights[i] * weights[j]
            wins += weight * (1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0)
            total += weight
    return wins / total


VALUES = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.5000001, 0.7, 0.7000000000000001, 1.0])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), VALUES), min_size=2, max_size=30), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_metrics_are_the_definitions_with_ties(rows: list[tuple[int, float]], threshold: float) -> None:
    labels, values = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found = metrics(scores(labels.tolist(), values.tolist()), threshold)
    assert found.keys() == METRICS.keys()
    called, fake = values > threshold, labels == 1
    assert found["acc"] == pytest.approx(sk.accuracy_score(labels, called))
    assert found["brier"] == pytest.approx(np.mean((values - labels) ** 2))
    if len(set(labels.tolist())) == 1:
        assert {name for name, value in found.items() if value is None} == {
            *("balanced_acc", "f1", "mcc", "auc", "eer", "ap", "tpr_at_fpr_1", "tpr_at_fpr_5"),
            "acc_fake" if labels[0] == 0 else "acc_real",
        }
        return
    hits, misses = int((called & fake).sum()), int((~called & fake).sum())
    alarms, passes = int((called & ~fake).sum()), int((~called & ~fake).sum())
    assert found["balanced_acc"] == pytest.approx((hits / (hits + misses) + passes / (alarms + passes)) / 2)
    assert (
        found["f1"]
        == pytest.approx(2 * hits / (2 * hits + misses + alarms))
        == pytest.approx(sk.f1_score(labels, called))
    )
    root = float((hits + alarms) * (hits + misses) * (passes + alarms) * (passes + misses)) ** 0.5
    assert found["mcc"] == pytest.approx((hits * passes - alarms * misses) / root if root else 0.0)
    assert found["auc"] == pytest.approx(pairs(labels, values, np.ones(len(labels))))
    assert found["auc"] == pytest.approx(sk.roc_auc_score(labels, values))
    assert found["ap"] == pytest.approx(sk.average_precision_score(labels, values))
    fpr, tpr, _ = sk.roc_curve(labels, values)
    assert found["eer"] == pytest.approx(fpr[np.argmin(np.abs((1 - tpr) - fpr))])
    for name, most in (("tpr_at_fpr_1", 0.01), ("tpr_at_fpr_5", 0.05)):
        cuts = [values >= cut for cut in (*values, 2.0)]
        assert found[name] == max(cut[fake].mean() for cut in cuts if cut[~fake].mean() <= most)


def test_a_false_positive_rate_may_be_met_by_a_few_of_many_reals() -> None:
    """Of 100 reals one may be called fake, of 200 two."""
    labels = [0] * 100 + [1] * 10
    values = [*np.linspace(0, 0.5, 98).tolist(), 0.8, 0.9, *[0.85] * 4, *[0.7] * 3, *[0.1] * 3]
    found = metrics(scores(labels, values))
    assert found["tpr_at_fpr_1"] == 0.4
    assert found["tpr_at_fpr_5"] == 0.7
    # In a straight stretch of the curve, from (0, 0) on, where scikit-learn keeps only the ends.
    steps = np.linspace(1, 0.5, 100).tolist()
    found = metrics(scores([0] * 200 + [1] * 100, [*steps, *[0.0] * 100, *steps]))
    assert (found["tpr_at_fpr_1"], found["tpr_at_fpr_5"]) == (0.02, 0.1)


def test_reliability_is_scikit_learns_and_the_calibration_error_by_hand() -> None:
    dice = np.random.default_rng(0)
    labels, values = dice.integers(0, 2, 200), np.concatenate([dice.random(180), np.linspace(0, 1, 20).round(1)])
    bins = reliability(scores(labels.tolist(), values.tolist()))
    fakes, predicted = calibration_curve(labels, values, n_bins=10)
    assert [one["fakes"] for one in bins] == pytest.approx(fakes)
    assert [one["probability"] for one in bins] == pytest.approx(predicted)
    assert sum(one["count"] for one in bins) == 200
    by_hand = scores([0, 0, 1, 1], [0.1, 0.12, 0.95, 1.0])
    assert [(one["from"], one["to"], one["count"]) for one in reliability(by_hand)] == [
        (0.0, 0.1, 1),  # an edge belongs to the bin below it
        (0.1, 0.2, 1),
        (0.9, 1.0, 2),
    ]
    assert METRICS["ece"].of(by_hand) == pytest.approx((0.1 + 0.12 + 2 * 0.025) / 4)


def test_weights_count_frames_several_times() -> None:
    dice = np.random.default_rng(0)
    labels, values, weights = dice.integers(0, 2, 40), dice.random(40).round(1), dice.integers(0, 4, 40)
    repeated = scores(np.repeat(labels, weights).tolist(), np.repeat(values, weights).tolist())
    ranked = Ranked(scores(labels.tolist(), values.tolist()))
    assert ranked.auc(weights.astype(float)) == pytest.approx(metrics(repeated)["auc"])
    assert ranked.auc(weights.astype(float)) == pytest.approx(sk.roc_auc_score(labels, values, sample_weight=weights))
    assert np.isnan(ranked.auc((labels == 1).astype(float)))


def test_deepfakebenchs_video_key_by_hand() -> None:
    """Two manipulations of one name become one video; a real and a fake of one name become a real one."""
    frames = scores([1, 1, 1, 0, 0, 1], [0.9, 0.7, 0.2, 0.1, 0.6, 0.8], ["000", "000", "000", "001", "002", "002"])
    videos = frames.by_video()
    assert videos.videos.tolist() == ["000", "001", "002"]
    assert videos.labels.tolist() == [1, 0, 0]  # int(mean of labels), as theirs: 002 is half fake
    assert videos.probabilities.tolist() == pytest.approx([0.6, 0.1, 0.7])
    # Real 0.1 below 0.6, real 0.7 above it: half of the pairs.
    assert judge(frames)["video_auc"] == 0.5
    whole = scores(
        [1, 1, 1, 0, 0, 1], [0.9, 0.7, 0.2, 0.1, 0.6, 0.8], ["a/000", "b/000", "b/000", "r/001", "r/002", "f/002"]
    )
    # By whole paths: fakes 0.9, 0.45, 0.8 against reals 0.1, 0.6: five of six pairs.
    assert judge(whole)["video_auc"] == pytest.approx(5 / 6)


def interval(of: Scores, count: int = 200, key: str = "auc") -> list[float] | None:
    return Resampled({"m": {"d": of}}, count, 0).interval("m", "d", key)


def drawn(dice: np.random.Generator, videos: int, each: int = 4, shift: float = 0.1) -> Scores:
    labels = np.repeat(np.arange(videos) % 2, each)
    values = np.clip(0.5 + shift * (labels - 0.5) + 0.2 * dice.normal(size=each * videos), 0, 1)
    return scores(labels.tolist(), values.tolist(), np.repeat(np.arange(videos), each).astype(str).tolist())


def test_intervals_hold_the_value_and_narrow_with_more_videos() -> None:
    dice = np.random.default_rng(1)

    def width(videos: int) -> float:
        of = drawn(dice, videos)
        found = interval(of)
        assert found is not None
        assert found == interval(of)  # a seed is a seed
        assert found[0] < sk.roc_auc_score(of.labels, of.probabilities) < found[1]
        return found[1] - found[0]

    assert width(400) < 0.6 * width(40)
    # Copies of frames are no news: the interval is that of the videos.
    labels, values = dice.integers(0, 2, 30).tolist(), dice.random(30).tolist()
    names = [str(index) for index in range(30)]
    for key in ("auc", "video_auc"):
        copied = interval(scores(labels * 5, values * 5, names * 5), 100, key)
        assert copied == pytest.approx(interval(scores(labels, values, names), 100, key))
    assert interval(scores([1, 1], [0.1, 0.2]), 50) is None
    assert interval(scores([0, 1], [0.1, 0.2]), 0) is None


def test_where_each_frame_is_a_video_both_intervals_are_one() -> None:
    of = drawn(np.random.default_rng(7), 60, 1)
    assert interval(of) == interval(of, key="video_auc") is not None
    twice = Scores(*(np.repeat(one, 2) for one in (of.labels, of.probabilities, of.videos)))
    assert interval(twice, key="video_auc") == pytest.approx(interval(of))


def test_differences_are_paired() -> None:
    """Two detectors that err on the same videos: their difference is far more certain than either."""
    dice = np.random.default_rng(2)
    one = drawn(dice, 200)
    other = Scores(one.labels, np.clip(one.probabilities + 0.02 * (one.labels - 0.5), 0, 1), one.videos)
    found = Resampled({"a": {"d": other}, "b": {"d": one}}, 300, 0)
    low, high = found.difference("a", "b", ["d"], "auc") or [0.0, 0.0]
    alone = found.interval("a", "d", "auc") or [0.0, 0.0]
    truth = sk.roc_auc_score(other.labels, other.probabilities) - sk.roc_auc_score(one.labels, one.probabilities)
    assert 0 < low < truth < high
    assert high - low < 0.2 * (alone[1] - alone[0])
    assert found.difference("a", "a", ["d"], "auc") == [0.0, 0.0]
    # Whoever else is judged changes nobody's numbers.
    assert Resampled({"b": {"d": one}}, 300, 0).interval("b", "d", "auc") == found.interval("b", "d", "auc")


def with_paths(of: Scores, place: str) -> Scores:
    paths = [
        f"{'reals' if label == 0 else place}/{video}.png" for label, video in zip(of.labels, of.videos, strict=True)
    ]
    return Scores(of.labels, of.probabilities, of.videos, np.array(paths, object))


def test_videos_that_datasets_share_are_drawn_for_all_of_them() -> None:
    """Of the same real videos, drawn apart, a mean over six datasets would look more certain than it is."""
    dice = np.random.default_rng(3)
    of = drawn(dice, 80, 1, 0.3)
    names = [f"d{number}" for number in range(6)]

    def width(datasets: dict[str, Scores]) -> float:
        low, high = Resampled({"m": datasets}, 400, 0).mean_interval("m", names, "auc") or [0.0, 0.0]
        return high - low

    apart = width(dict.fromkeys(names, of))
    shared = width({name: with_paths(of, name) for name in names})
    same = width({name: with_paths(of, "one") for name in names})
    assert apart < 0.8 * shared < 0.7 * same
    low, high = interval(with_paths(of, "one"), 400) or [0.0, 0.0]
    assert same == pytest.approx(high - low)


def test_means_and_the_worst_are_over_what_is_defined() -> None:
    none: dict[str, Any] = dict.fromkeys(KEYS)
    judged = {"a": none | {"auc": 0.8, "ece": 0.1}, "b": none, "c": none | {"auc": 0.6, "ece": 0.3}}
    assert average(judged) == none | {"auc": pytest.approx(0.7), "ece": pytest.approx(0.2)}
    assert worst(judged) == none | {
        "auc": {"dataset": "c", "value": 0.6},
        "ece": {"dataset": "c", "value": 0.3},  # of errors the largest
    }


@settings(deadline=None, max_examples=80)
@given(st.lists(VALUES, min_size=1, max_size=15), st.lists(VALUES, min_size=1, max_size=15))
def test_thresholds_meet_their_criteria(reals: list[float], fakes: list[float]) -> None:
    of = scores([0] * len(reals) + [1] * len(fakes), reals + fakes)

    def rates(threshold: float) -> tuple[float, float]:
        called = of.fake(threshold)
        return float(called[of.labels == 0].mean()), float(called[of.labels == 1].mean())

    possible = [rates(threshold) for threshold in {*reals, *fakes, 1.0}]
    found = {by: chosen_threshold(of, by) for by in CRITERIA}
    assert all(0 <= threshold <= 1 for threshold in found.values())
    fpr, tpr = rates(found["balanced_acc"])
    assert tpr - fpr == pytest.approx(max(0.0, *(tpr - fpr for fpr, tpr in possible)))
    for by, most in (("fpr_1", 0.01), ("fpr_5", 0.05)):
        fpr, tpr = rates(found[by])
        assert fpr <= most
        assert tpr == max(tpr for fpr, tpr in possible if fpr <= most)
    fpr, tpr = rates(found["eer"])
    assert abs(1 - tpr - fpr) <= min(abs(1 - tpr - fpr) for fpr, tpr in possible) + 1e-12


def test_thresholds_from_reals_that_others_share_are_doubted() -> None:
    of = drawn(np.random.default_rng(8), 40, 1, 0.8)
    datasets = {"val": with_paths(of, "val"), "x": with_paths(of, "x"), "own": of}
    (warning,) = judged({"m": datasets}, threshold_from="val")["warnings"]
    assert warning.startswith("thresholds were chosen on pictures of 'val' that are also in 'x', whose accuracies look")
    assert judged({"m": datasets}, threshold_from="own")["warnings"] == judged({"m": datasets})["warnings"] == []


def test_a_threshold_lies_in_the_middle_between_two_scores() -> None:
    apart = scores([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9])
    assert {by: chosen_threshold(apart, by) for by in CRITERIA} == dict.fromkeys(CRITERIA, pytest.approx(0.4))
    assert chosen_threshold(scores([0, 1], [0.7, 0.6]), "fpr_1") == pytest.approx(0.85)  # nothing is fake


def judged(datasets: dict[str, dict[str, Scores]], **asked: Any) -> dict[str, Any]:
    return judge_all(datasets, Request(bootstrap=20, **asked))


def test_a_threshold_that_one_set_gave_is_used_on_the_others() -> None:
    dice = np.random.default_rng(4)
    low = {name: drawn(dice, 60, 1, 0.8) for name in ("val", "x", "y")}
    low = {name: Scores(of.labels, of.probabilities / 10, of.videos) for name, of in low.items()}
    plain = judged({"m": low})["models"]["m"]
    tuned = judged({"m": low}, threshold_from="val")["models"]["m"]
    threshold = chosen_threshold(low["val"], "balanced_acc")
    assert {one["threshold"] for one in plain["datasets"].values()} == {0.5}
    assert {one["threshold"] for one in tuned["datasets"].values()} == {threshold}
    assert plain["average"]["acc"] == pytest.approx(0.5)
    assert tuned["average"]["acc"] == np.mean([tuned["datasets"][name]["acc"] for name in ("x", "y")])
    assert tuned["average"]["acc"] > 0.9
    assert tuned["worst"]["acc"]["dataset"] in ("x", "y")
    fixed = judged({"m": low}, threshold=threshold)["models"]["m"]["datasets"]
    assert fixed == tuned["datasets"]
    with pytest.raises(BadOption, match="--threshold-from z: model 'm' has no scores on it; expected one of 'val'"):
        judged({"m": low}, threshold_from="z")
    with pytest.raises(BadOption, match="expected real and fake pictures, got one of the two alone"):
        judged({"m": {"val": scores([1, 1], [0.1, 0.2])}}, threshold_from="val")


def test_whom_models_are_compared_with() -> None:
    names = ["merged", "fs", "fr", "mean", "other"]
    roles = {
        "merged": Role("merge", ("fs", "fr")),
        "fs": Role("specialist"),
        "mean": Role("average", ("fs", "fr")),
        "other": Role("average", ("else",)),
    }
    assert baselines(roles, (), names) == {"merged": ["fs", "fr", "mean"]}
    assert baselines({}, (), names) == {name: ["merged"] for name in names[1:]}
    assert baselines(roles, ("fr", "mean"), ["fr", "mean", "fs"]) == {
        "fr": ["mean"],
        "mean": ["fr"],
        "fs": ["fr", "mean"],
    }
    assert baselines({}, (), ["merged"]) == {}
    with pytest.raises(BadOption, match="--against sf: no model is called that; expected one of 'merged', 'fs'"):
        baselines(roles, ("sf",), names)


def test_differences_are_told_where_videos_are_the_same() -> None:
    dice = np.random.default_rng(5)
    one = {name: drawn(dice, 40, 2, 0.2) for name in ("x", "y", "z")}
    other = {name: Scores(of.labels, np.sqrt(of.probabilities), of.videos) for name, of in one.items()}
    other["z"] = drawn(dice, 44, 2)
    found = judged({"b": one, "a": other}, threshold_from="y")
    rows = {(row["dataset"], row["metric"]): row for row in found["differences"]}
    assert set(rows) == {(dataset, key) for dataset in ("x", "y") for key in ("auc", "video_auc")}
    for (dataset, key), row in rows.items():
        assert (row["model"], row["than"]) == ("a", "b")
        values = [found["models"][name]["datasets"][dataset][key] for name in "ab"]
        assert row["difference"] == pytest.approx(values[0] - values[1])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    assert found["warnings"] == ["'a' and 'b' have scores of different videos on 'z': no difference is told"]
    found = judged({"b": one, "a": {"x": one["x"], "y": other["y"]}})
    means = {row["metric"]: row["difference"] for row in found["differences"] if row["dataset"] == "mean"}
    aucs = [found["models"][name]["datasets"]["y"]["auc"] for name in "ab"]
    assert means["auc"] == pytest.approx((aucs[0] - aucs[1]) / 2)


def test_an_auc_far_below_chance_is_doubted() -> None:
    dice = np.random.default_rng(6)
    good = drawn(dice, 40, 2, 0.8)
    swapped = Scores(1 - good.labels, good.probabilities, good.videos)
    few = scores([0, 1], [0.9, 0.1])
    found = judged({"m": {"good": good, "bad": swapped, "few": few, "chance": drawn(dice, 40, 2, -0.02)}})
    (warning,) = found["warnings"]
    auc = found["models"]["m"]["datasets"]["bad"]["auc"]
    assert auc < 0.1  # and stays as it is
    assert warning.startswith(f"'m' on 'bad': AUC {auc:.3f}: labels swapped?")
