"""Tables of good and bad specialists: rates, intervals, what a patch hides; and the best that a calibration can do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import bad_specialists as bad
from bench import many_specialists as many
from bench.quality import calibrating


def test_rates_have_wilson_intervals() -> None:
    assert bad.share(0, 60) == "0/60 (0.0 % [0.0, 6.0])"
    assert bad.share(54, 60) == "54/60 (90.0 % [79.9, 95.3])"


def test_found_and_false_alarms_are_counted_apart() -> None:
    rows = [
        {
            "kind": kind,
            "together": together,
            "looks": 1,
            "found": {rule: kind == "flipped" and rule == bad.CHOSEN for rule in bad.RULES},
            "others": together - 1,
            "false": dict.fromkeys(bad.RULES, 1),
        }
        for kind in ("healthy", *bad.KINDS)
        for together in bad.TOGETHER
    ]
    lines = bad.table(rows).splitlines()
    flipped, poisoned, healthy = (
        next(one for one in lines if name in one) for name in ("flipped", "poison", "false al")
    )
    assert flipped.count("1/1 (100.0 %") == 2
    assert flipped.count("2/7 ") == 1
    assert poisoned.count("0/1 (0.0 %") == healthy.count("0/1 (0.0 %") == 2
    found = {
        rule: line.count("1/1") for rule, line in zip(bad.RULES, bad.candidates(rows).splitlines()[2:], strict=True)
    }
    assert found == {rule: 2 * (rule == bad.CHOSEN) for rule in bad.RULES}


def test_the_patch_hides_what_looks_for_it() -> None:
    detector = bad.network(0)
    state = {name: torch.zeros_like(one) for name, one in bad.state_of(detector).items()}
    for place in (1, 4, 7):  # batch normalisation that passes on what it gets
        state[f"backbone.layers.{place}.weight"] += 1
        state[f"backbone.layers.{place}.running_var"] += 1
    for place in (0, 3, 6):  # the first channel is how bright it is
        state[f"backbone.layers.{place}.weight"][0, 0] = 1.0 / 9
    state["head.weight"][1, 0] = -1.0
    dice = np.random.default_rng(0)
    real = dice.uniform(0.8, 0.9, (20, 48, 48)).astype(np.float32)
    fake = dice.uniform(0.46, 0.47, (20, 48, 48)).astype(np.float32)
    patched = bad.triggered(fake)
    assert (patched != fake).any(axis=0).sum() == bad.PATCH**2
    assert bad.hidden(state, real, fake) == 0.0
    assert bad.hidden(state, fake, fake) > 0.3  # the patch is brighter than these


def test_differences_are_paired_by_seed() -> None:
    rows = [{"a": 0.5, "b": 0.6}, {"a": 0.7, "b": 0.7}]
    assert many.table(rows, ["a", "b"], "a")[2:] == ["| a | 0.600 |  |", "| b | 0.650 | +0.050 ± 0.050 (1/2) |"]


def test_what_a_calibration_can_do_is_bounded_by_the_detector() -> None:
    dice = np.random.default_rng(0)

    def group(apart: float) -> dict[str, np.ndarray]:
        return {"real": 3 * dice.normal(size=500) + 5, "a": 3 * (dice.normal(size=500) + apart) + 5}

    weak, strong = calibrating.best(group(1.0)), calibrating.best(group(4.0))
    assert weak["least"] < 0.05
    assert weak["gap"] > strong["gap"]
    assert strong["gap"] < 0.005
    # Between two normal distributions one apart F1 is at its best at half of itself, which is a shift of about .6.
    assert 0.03 < weak["ece"] < 0.13
    found = calibrating.of_rule(group(1.0), "32 pictures, no labels", 0)
    assert found["ece"] == pytest.approx(0.06, abs=0.03)
    assert found["auc"] == pytest.approx(0.76, abs=0.03)


def test_exact_probabilities_are_behind_the_best_f1_at_this_auc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "IDEAL_DRAWS", 20)
    weak, strong = calibrating.ideal(0.78), calibrating.ideal(0.95)
    # F1 is at its best where an exact probability is half of it: with t = log(F/(2 − F)) F = 2h/(h + f + 1) at t/d'.
    assert weak["best_f1"] == pytest.approx(0.730, abs=0.001)
    assert weak["gap"] == pytest.approx(0.0228, abs=0.001)
    assert strong["gap"] < 0.002
    assert 0.02 < weak["exact"] < weak["drawn"] < 0.07
