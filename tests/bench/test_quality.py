"""The quality benchmark: choices see validation people alone, numbers are right, nothing is judged twice."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from r2m.demo.detectors import SPECIALISTS
from r2m.demo.faces import split_people
from r2m.demo.samples import Group

from bench.quality import choosing, groups, judging, lengths, methods, models, run, settings, store, studies, tables
from bench.quality.models import Models, Run
from bench.quality.networks import new_network
from bench.quality.study_pages import RULES
from r2m_kernels import MergeConfig
from r2m_kernels.report import CALIBRATED

# Averages, choices of the package's and of a rule in plain PyTorch, the default, several models, an ablation.
A_QUICK_RUNS = (
    "weight average",
    "weight average × 1.2",
    "TIES",
    "DC-Merge",
    "R2M by rows, rank .4, small matrices whole",
    "compressed ensemble, rank 1",
    "default, row power 2",
)


class Untrained(Models):
    """Detectors of a run that nobody trained."""

    def base(self):
        return new_network(self.run.architecture, 0).state_dict()

    def specialist(self, kind):
        return new_network(self.run.architecture, 1 + settings.MAIN.index(kind)).state_dict()

    def joint(self, kinds=settings.MAIN):
        return new_network(self.run.architecture, 9).state_dict()


def test_choices_cannot_see_a_test_group(monkeypatch, tmp_path):
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
    candidates = {"1": MergeConfig.weight_average(), "2": MergeConfig.task_arithmetic(0.5)}
    found = choosing.validate(Run("cnn", 3, quick=True), [methods.Method("average", candidates)], tmp_path)
    assert list(found["average"]) == ["1", "2"]
    assert all(0 <= auc <= 1 for auc in found["average"].values())
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
    assert set(tuned.values()) == {methods.BUDGET}
    assert {"TIES", "CART", "STAR", "SCORE", "SWUDI", "MonoSoup", "LARV", "ResMerge", "DC-Merge"} <= tuned.keys()


def test_the_seeds_that_judge_are_not_those_that_choose():
    assert not set(settings.DEVELOPMENT) & set(settings.FRESH)
    assert not set(settings.LATER) & set(settings.DEVELOPMENT + settings.FRESH)


def test_paired_differences_have_bootstrap_intervals_over_seeds():
    same = judging.paired({seed: [0.02, 0.02] for seed in range(5)})
    assert same == {"mean": pytest.approx(0.02), "low": pytest.approx(0.02), "high": pytest.approx(0.02)} | {
        "wins": 10,
        "runs": 10,
    }
    values = np.random.default_rng(0).normal(0.5, 1.0, 40)
    found = judging.paired({seed: [value] for seed, value in enumerate(values)})
    half = 1.96 * values.std() / np.sqrt(40)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert found["wins"] == int((values > 0).sum())
    # Two runs of a seed that say the same are one piece of evidence.
    doubled = judging.paired({seed: [value, value] for seed, value in enumerate(values)})
    assert (doubled["low"], doubled["high"]) == pytest.approx((found["low"], found["high"]))


def test_calibration_error_by_hand():
    # A tenth and nine tenths sure, and right as often: nothing to complain of.
    low, high = np.log(0.15 / 0.85), np.log(0.85 / 0.15)
    scores = {"real": np.array([low] * 17 + [high] * 3), "a": np.array([low] * 3 + [high] * 17)}
    assert judging.calibration(scores)["ece"] == pytest.approx(0.0, abs=1e-12)
    # Always wrong and sure of it.
    assert judging.calibration({"real": np.full(4, 50.0), "a": np.full(9, -50.0)})["ece"] == pytest.approx(1.0)
    # One class three times as large counts no more: half of all is right with 0.85, half wrong.
    uneven = {"real": np.array([low] * 4), "a": np.array([low] * 12)}
    assert judging.calibration(uneven)["ece"] == pytest.approx(0.5 - 0.15)


def test_f1_by_hand():
    # A threshold at 0 finds one forgery of two and no real picture; one at -1.5 both, with half of the real ones.
    scores = {"real": np.array([-2.0, -1.0] * 4), "a": np.array([1.0, -1.25])}
    found = judging.calibration(scores)
    assert found["f1"] == pytest.approx(2 * 0.5 / 1.5)
    assert found["best_f1"] == pytest.approx(2 * 1.0 / (1.5 + 1.0))


def test_pictures_that_groups_share_are_scored_once():
    real, forged, other = (np.full((count, 2, 2), value, np.float32) for value, count in ((0, 2), (1, 3), (2, 1)))
    pictures = judging.Pictures({"a": Group(real, {"x": forged}), "b": Group(real, {"y": other})})
    assert pictures.places == {"a": {"real": (0, 2), "x": (2, 5)}, "b": {"real": (0, 2), "y": (5, 6)}}
    split = pictures.split(np.arange(6.0))
    assert split["b"]["y"].tolist() == [5.0]
    assert split["b"]["real"].tolist() == split["a"]["real"].tolist() == [0.0, 1.0]


@pytest.fixture
def judging_here(monkeypatch, tmp_path):
    """Judges an untrained run, and tells which merges were made."""
    few = {"in-distribution": Group(*(np.random.default_rng(0).random((2, 4, 48, 48)).astype(np.float32)))}
    few["in-distribution"] = Group(few["in-distribution"].real, {"FS": few["in-distribution"].forged})
    monkeypatch.setattr(run, "groups_of", lambda _: few)
    monkeypatch.setattr(run, "Models", Untrained)
    made = []
    monkeypatch.setattr(run, "merged", lambda *given: (made.append(given[0]), methods.merged(*given))[1])

    def judge(rows, whole=True, seed=0, again=()):
        made.clear()
        run.judge(Run("cnn", seed), rows, run.Judging(tmp_path, again), whole)
        return list(made), store.load(store.logits_of(f"cnn-{seed}", tmp_path))

    return judge


def test_what_was_judged_is_not_judged_again(judging_here):
    average, longer = MergeConfig.weight_average(), MergeConfig.task_arithmetic(0.5)
    made, first = judging_here({"a": average, "b": longer})
    assert made == [average, longer]
    assert list(first.logits) == ["base", *SPECIALISTS.values(), "joint training", "a", "b"]
    assert {"seconds", "cpu_seconds"} <= first.about.keys()
    made, again = judging_here({"a": average, "b": average}, whole=False)
    assert not made  # b is another now, and has been judged by the name of a
    assert again.logits["b"].tolist() == again.logits["a"].tolist() == first.logits["a"].tolist()
    assert judging_here({"a": average}, whole=False)[1].logits.keys() == first.logits.keys()
    made, last = judging_here({"a": average})
    assert not made
    assert "b" not in last.logits


def test_rows_that_are_named_are_judged_again_and_no_others(judging_here):
    average, longer, longest = MergeConfig.weight_average(), *map(MergeConfig.task_arithmetic, (0.5, 0.6))
    _, first = judging_here({"average": average, "twin": longer, "sum": longer, "sum, longer": longest})
    made, again = judging_here({"average": average, "sum": longer}, whole=False, again=("sum*",))
    assert made == [longer]  # and the twin's scores are not taken for its own
    assert again.logits["sum"].tolist() == first.logits["sum"].tolist()
    assert set(again.logits) == set(first.logits)  # what was not asked for stays


def test_a_look_that_is_known_is_not_taken_again(monkeypatch):
    looks = ("features", "diagnosis", "many", "robustness")
    for name in looks:
        monkeypatch.setattr(studies, name, lambda run, name=name: f"{name} of {run.name}")
    found = studies.study(Run("cnn", 0), {"features": "known"})
    assert found == {name: "known" if name == "features" else f"{name} of cnn-0" for name in looks}
    assert studies.study(Run("cnn", 4), {}).keys() == {"features", "diagnosis"}  # no further specialists


def test_lengths_that_are_in_the_file_are_not_judged_again(monkeypatch, tmp_path):
    judged = []
    monkeypatch.setattr(lengths, "Models", Untrained)
    monkeypatch.setattr(Untrained, "base", lambda self: {})  # weights of ImageNet are not everywhere
    monkeypatch.setattr(Untrained, "specialist", lambda self, kind: (self.run.seed, "rate", 1, kind))
    monkeypatch.setattr(Untrained, "moved", lambda self, kind, rate: (self.run.seed, "rate", rate, kind))
    monkeypatch.setattr(Untrained, "longer", lambda self, kind, times: (self.run.seed, "steps", times, kind))
    monkeypatch.setattr(lengths, "Pictures", lambda groups: groups)
    monkeypatch.setattr(lengths, "groups_of", lambda run: f"of {run.name}")

    def noted(run, base, experts, pictures):
        assert pictures == f"of {run.name}"
        assert [expert[3] for expert in experts] == list(settings.MAIN)
        judged.append(experts[0][:3])
        return {"third": 1 / 3}

    monkeypatch.setattr(lengths, "_judged", noted)
    known = {"mobilenet-0": [{"rate": 1}, {"rate": 3}, {"steps": settings.STEPS[0]}]}
    out = tmp_path / "lengths.json"
    out.write_text(json.dumps(known))
    assert lengths.main(["--out", str(out)]) == 0
    found = json.loads(out.read_text())
    ways = [("rate", 1), *(("steps", times) for times in settings.STEPS), *(("rate", rate) for rate in settings.RATES)]
    for run_of in ("mobilenet-0", "mobilenet-1"):
        had = [next((how, entry[how]) for how in ("rate", "steps") if how in entry) for entry in found[run_of]]
        assert sorted(had) == sorted(ways)
    assert found["mobilenet-1"][0] == {"rate": 1, "third": 0.33333}
    missing = {0: set(ways) - {("rate", 1), ("rate", 3), ("steps", settings.STEPS[0])}, 1: set(ways)}
    # One way on every seed before the next, so that what is there at any time compares.
    assert judged == [(seed, *way) for way in ways for seed in settings.MOVED if way in missing[seed]]
    assert lengths.main(["--out", str(out)]) == 0
    assert json.loads(out.read_text()) == found
    assert len(judged) == 2 * len(ways) - 3


def test_what_judging_all_takes_is_scaled_from_runs_of_each_architecture(tmp_path):
    def judge(name, seconds, **about):
        judged = store.Judged({}, about={**about, **({"cpu_seconds": seconds} if seconds else {})})
        for row in ("base", "weight average"):
            judged.add(row, np.zeros(5), "made of")
        store.save(judged, store.logits_of(name, tmp_path))

    assert run._cost(tmp_path) is None
    for name, seconds in {
        "cnn-100": 10.0,
        "cnn-101": 20.0,
        "cnn-0": 99.0,
        "vit-100": 2.0,
        "mobilenet-100": 50.0,
    }.items():
        judge(name, seconds)
    known = run._cost(tmp_path)
    assert known["runs"]["cnn-101"] == {"models": 2, "pictures": 5, "cpu_seconds": 20.0}
    assert known["cpu_seconds"] == 181.0
    assert known["fresh"] is None  # no lite0
    judge("lite0-101", 30.0)
    fresh = {name: len(settings.fresh_of(name)) for name in settings.REGIMES}
    whole = 15.0 * fresh["cnn"] + 2.0 * fresh["vit"] + 50.0 * fresh["mobilenet"] + 30.0 * fresh["lite0"]
    assert run._cost(tmp_path)["fresh"] == {"runs": sum(fresh.values()), "cpu_seconds": whole}
    judge("lite0-100", None)
    assert run._cost(tmp_path) is None


def test_all_runs_of_an_architecture_judge_as_many_models_on_as_many_pictures():
    for architecture in settings.REGIMES:
        judged = [
            store.load(store.logits_of(f"{architecture}-{seed}", store.STORE))
            for seed in settings.fresh_of(architecture)
        ]
        assert len({np.stack(list(one.logits.values())).shape for one in judged}) == 1  # or cost.json scales wrongly


def test_a_fresh_seed_is_refused_without_a_committed_protocol(judging_here, monkeypatch, tmp_path):
    protocol_of_tests = tmp_path / "protocol.json"
    protocol_of_tests.write_text("{}")
    monkeypatch.setattr(run.protocol, "PATH", protocol_of_tests)
    with pytest.raises(SystemExit, match="fresh seeds are scored after the protocol is committed"):
        judging_here({"a": MergeConfig.weight_average()}, seed=settings.FRESH[0])
    assert not store.logits_of("cnn-100", tmp_path).exists()


def test_warnings_use_the_thresholds_that_were_found():
    warning = {rule.number: rule.threshold for rule in RULES if rule.warns}
    assert warning == CALIBRATED


@pytest.mark.slow
def test_a_quick_run_prints_its_table_and_draws_and_does_it_again(tmp_path, monkeypatch, capsys):
    # One row of each kind; that every candidate makes detectors is test_quality_rules.py's.
    rows = [one for one in methods.all_methods() if one.name in A_QUICK_RUNS]
    assert len(rows) == len(A_QUICK_RUNS)
    monkeypatch.setattr(run, "all_methods", lambda: rows)

    def quick(out):
        assert run.main(["--quick", "--runs", "cnn-*", "--out", str(out)]) == 0
        return capsys.readouterr().out, json.loads((out / "summary.json").read_text())

    printed, first = quick(tmp_path / "one")
    assert re.search(r"^ *R2M, the default  ", printed, re.MULTILINE)
    assert set(first["chosen"]["cnn"]) == {"TIES", "DC-Merge"}
    assert set(A_QUICK_RUNS) <= first["sections"]["scratch"]["development"]["rows"].keys()
    for column in ("in-distribution", "cross", "unseen", "natural"):
        assert column in printed
    for picture in ("scratch.svg", "forgeries.png"):
        assert (tmp_path / "one" / picture).stat().st_size > 10_000
    cost = json.loads((tmp_path / "one" / "cost.json").read_text())
    models = cost["runs"]["cnn-0-quick"]["models"]
    assert models == len(["base", *SPECIALISTS, "joint training"]) + len(A_QUICK_RUNS)
    assert 0 < cost["runs"]["cnn-0-quick"]["cpu_seconds"] == cost["cpu_seconds"]
    assert first["cost"] == json.loads(json.dumps(cost), parse_float=tables.rounded)
    assert cost["fresh"] is None
    _, again = quick(tmp_path / "two")
    assert {key: first[key] for key in ("sections", "validated", "chosen")} == {
        key: again[key] for key in ("sections", "validated", "chosen")
    }
    # Training too, and not only what the cache keeps.
    cached = Models(Run("cnn", 0, quick=True)).specialist("FS")
    retrained = Models(Run("cnn", 0, quick=True), tmp_path)
    torch.set_num_threads(1)
    assert all(torch.equal(tensor, cached[name]) for name, tensor in retrained.specialist("FS").items())


def test_words_and_recipes_of_others_train_nothing_anew(monkeypatch):
    def code(source):
        monkeypatch.setattr(models.inspect, "getsource", lambda _: source)
        return models.code_of(models)

    before = (
        'def f(x):\n    """Of x."""\n    if x < 0:\n        raise ValueError("no")\n    return x\nQUICK = Setting(1)'
    )
    after = "import os\nQUICK = Setting(2)\ndef f(x):\n    if x < 0:  # below\n        raise BadOption()\n    return x"
    assert code(before) == code(after)
    assert code(before) != code(before.replace("x < 0", "x < 1")) != code(before.replace("return x", "return -x"))
    assert code("N = 1") != code("N = 2")


def test_training_pictures_are_of_training_people():
    trained = Models(Run("cnn", 2, quick=True))
    people = split_people(2)
    assert set(trained._of_people[1]) == set(people.train)
    assert not set(people.train) & (set(people.validation) | set(people.test))
