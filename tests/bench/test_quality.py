"""The quality benchmark: choices see validation people alone, numbers are right, the page is the JSON's."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from r2m.demo.faces import split_people

from bench.quality import choosing, docs, groups, judging, methods, settings, tables
from bench.quality.docs import RULES
from bench.quality.models import Models, Run
from bench.quality.networks import new_network
from r2m_kernels import MergeConfig
from r2m_kernels.report import CALIBRATED

ROOT = Path(__file__).resolve().parents[2]
JSON = ROOT / "bench" / "results" / "quality.json"


def test_choices_cannot_see_a_test_group(monkeypatch):
    # By what the module can name …
    tree = ast.parse(Path(choosing.__file__).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "bench.quality.groups"
        for alias in node.names
    }
    assert imported == {"validation_group"}
    assert "bench.quality.studies" not in {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    # … and by what it does: whose pictures are made while it chooses.
    class Untrained(Models):
        def base(self):
            return new_network(self.run.architecture, 0).state_dict()

        def specialist(self, kind):
            return new_network(self.run.architecture, 1 + settings.MAIN.index(kind)).state_dict()

    asked = []

    def recorded(name):
        original = getattr(groups, name)

        def make(photographs, people, *rest, **keywords):
            asked.append(set(people))
            return original(photographs, people, *rest, **keywords)

        return make

    for name in ("make_pictures", "make_group"):
        monkeypatch.setattr(groups, name, recorded(name))
    monkeypatch.setattr(choosing, "Models", Untrained)
    run = Run("cnn", 3, quick=True)
    found = choosing.validate(run, [methods.Method("average", {"": MergeConfig.weight_average()})])
    assert 0 <= found["average"][""] <= 1
    people = split_people(3)
    assert asked
    assert all(one == set(people.validation) for one in asked)
    assert not set(people.validation) & set(people.test)


def test_the_best_mean_over_development_runs_is_chosen_for_each_architecture():
    validated = {
        "cnn-0": {"TIES": {"a": 0.9, "b": 0.5, "c": 0.7}},
        "cnn-1": {"TIES": {"a": 0.1, "b": 0.5, "c": 0.3}},
        "vit-0": {"TIES": {"a": 0.1, "b": 0.2, "c": 0.3}},
    }
    assert choosing.choose(validated) == {"cnn": {"TIES": "a"}, "vit": {"TIES": "c"}}  # a, b and c tie: the first


def test_every_method_has_the_same_budget():
    tuned = {method.name: len(method.candidates) for method in methods.all_methods() if method.tuned}
    assert max(tuned.values()) == methods.BUDGET
    assert {tuned[name] for name in ("task arithmetic", "TIES", "DARE", "CART", "TSV-M", "Iso-C", "STAR")} == {8}


def test_the_seeds_that_judge_are_not_those_that_choose():
    assert not set(settings.DEVELOPMENT) & set(settings.FRESH)
    assert not set(settings.FIRST_LOOK + settings.SECOND_LOOK) & set(settings.FRESH)


def test_paired_differences_have_bootstrap_intervals():
    assert judging.paired([0.02] * 5) == {"mean": 0.02, "low": 0.02, "high": 0.02, "wins": 5, "runs": 5}
    values = np.random.default_rng(0).normal(0.5, 1.0, 40)
    found = judging.paired(values.tolist())
    half = 1.96 * values.std() / np.sqrt(40)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert found["wins"] == int((values > 0).sum())


def test_calibration_error_by_hand():
    # A tenth and nine tenths sure, and right as often: nothing to complain of.
    low, high = np.log(0.15 / 0.85), np.log(0.85 / 0.15)
    scores = {"real": np.array([low] * 17 + [high] * 3), "a": np.array([low] * 3 + [high] * 17)}
    assert judging.calibration_error(scores) == pytest.approx(0.0, abs=1e-12)
    # Always wrong and sure of it.
    assert judging.calibration_error({"real": np.full(4, 50.0), "a": np.full(9, -50.0)}) == pytest.approx(1.0)
    # One class three times as large counts no more: half of all is right with 0.85, half wrong.
    uneven = {"real": np.array([low] * 4), "a": np.array([low] * 12)}
    assert judging.calibration_error(uneven) == pytest.approx(0.5 - 0.15)


def test_short_numbers():
    assert tables.short(0.8234) == ".823"
    assert tables.short(-0.0046, True) == "-.005"
    assert tables.short(0.0, True) == "+.000"
    assert tables.difference({"mean": 0.01, "low": -0.002, "high": 0.021, "wins": 7, "runs": 10}) == (
        "+.010 [-.002, +.021] 7/10"
    )


def test_the_page_is_what_the_json_gives():
    assert docs.main(["--check"]) == 0
    content = json.loads(JSON.read_text())
    name = content["fresh"][0]
    content["runs"][name]["R2M"]["auc"]["unseen"] += 0.1
    assert docs.text(content) != docs.PAGE.read_text()


def test_the_json_is_of_the_default_that_is_in_the_package():
    content = json.loads(JSON.read_text())
    # Options that came later have defaults that change nothing.
    then = {name: tuple(value) if isinstance(value, list) else value for name, value in content["default"].items()}
    # Measured by rows; the evidence issue measures the default again, and its page then says so.
    assert MergeConfig(**{"head": "merge", **then}) in (
        MergeConfig.r2m(),
        MergeConfig.r2m(rank=1.0, row_power=3.0, head="merge"),
    )
    assert [run.partition("-")[2] for run in content["fresh"]] == [
        str(seed) for seed in settings.FIRST_LOOK + settings.SECOND_LOOK
    ] * 2
    assert not content["quick"]


def test_warnings_use_the_thresholds_that_were_found():
    warning = {rule.number: rule.threshold for rule in RULES if rule.warns}
    assert warning == CALIBRATED


@pytest.mark.slow
def test_a_quick_run_prints_its_table_and_draws_and_does_it_again(tmp_path):
    def run(out):
        command = [sys.executable, "-m", "bench.quality", "--quick", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return done.stdout, json.loads((out / "quality.json").read_text())

    printed, first = run(tmp_path / "one")
    assert re.search(r"^ *R2M  ", printed, re.MULTILINE)
    for column in ("in-distribution", "cross", "unseen", "natural"):
        assert column in printed
    for picture in ("differences.svg", "sweeps.svg", "forgeries.png"):
        assert (tmp_path / "one" / f"quality_{picture}").stat().st_size > 10_000
    _, again = run(tmp_path / "two")
    assert {key: first[key] for key in ("runs", "validated", "chosen")} == {
        key: again[key] for key in ("runs", "validated", "chosen")
    }
    # Training too, and not only what the cache keeps.
    cached = Models(Run("cnn", 0, quick=True)).specialist("FS")
    retrained = Models(Run("cnn", 0, quick=True), tmp_path)
    torch.set_num_threads(1)
    assert all(torch.equal(tensor, cached[name]) for name, tensor in retrained.specialist("FS").items())


def test_training_pictures_are_of_training_people():
    trained = Models(Run("cnn", 2, quick=True))
    people = split_people(2)
    assert set(trained._of_people[1]) == set(people.train)
    assert not set(people.train) & (set(people.validation) | set(people.test))
