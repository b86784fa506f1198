"""From logits to pages: what is kept, what tables make of it, what the protocol decides, what pages say."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from r2m.demo.detectors import SPECIALISTS
from sklearn.metrics import roc_auc_score

from bench.machine import output
from bench.quality import docs, judging, protocol, settings, store, study_pages, tables
from bench.quality.methods import all_methods, key
from r2m_kernels import MergeConfig

GROUPS = {
    "scratch": {"in-distribution": ("FS", "FR"), "unseen": ("a", "b")},
    "pretrained": {"in-distribution": ("FS", "FR"), "code": ("a",), "neural": ("n",)},
}
# How far apart Real and Fake are for a row, beside the seed's luck.
SKILL = {
    "weight average": 0.5,
    "weight average × 1.2": 0.55,
    "TSV-M × 1": 0.7,
    tables.DEFAULT: 0.9,
    "joint training": 2.0,
}
SKILL |= {"base": 0.0, **dict.fromkeys(SPECIALISTS.values(), 0.8)}
PROTOCOL = {
    "question": "Which?",
    "groups": {"scratch": ["in-distribution", "unseen"], "pretrained": ["in-distribution", "code"]},
    "candidates": {tables.DEFAULT: "", "TSV-M × 1": ""},
    "baselines": ["weight average", "weight average × 1.2"],
    "bar": -0.005,
    "fallback": tables.DEFAULT,
    "conditions": {"more": [["TSV-M × 1", tables.DEFAULT, "pretrained", "code", "low"]]},
}


def judged(run, skill=SKILL, pictures=30):
    """A run whose logits are drawn."""
    architecture, seed = run.split("-")
    groups = GROUPS[settings.REGIMES[architecture]]
    rng, places, end = np.random.default_rng(int(seed)), {}, pictures
    for group, kinds in groups.items():
        places[group] = {"real": (0, pictures)}
        for kind in kinds:
            places[group][kind] = (end, end := end + pictures)
    made = store.Judged(places, about={"commit": "0", "seconds": 1})
    noise = rng.normal(size=end)
    for row, distance in skill.items():
        made.add(row, noise + 0.3 * rng.normal(size=end) + distance * (np.arange(end) >= pictures), "x")
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A directory of results with two fresh seeds in each regime, and one of a second base; and their summary."""
    directory = tmp_path_factory.mktemp("results")
    path = directory / "protocol.json"
    path.write_text(json.dumps(PROTOCOL))
    runs = [f"{name}-{seed}" for name in ("cnn", "vit", "mobilenet") for seed in settings.FRESH[:2]]
    for run in [*runs, "lite0-100", "cnn-0"]:
        store.save(judged(run), store.logits_of(run, directory))
    validated = {run: {"TSV-M": {"α 1": 0.5, "α 2": 0.6}} for run in ("cnn-0", "vit-0", "mobilenet-0")}
    (directory / "validated.json").write_text(json.dumps(validated))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "PATH", path)
        return directory, tables.summarize(directory)


def test_a_file_of_logits_comes_back_and_is_the_same_bytes_again(tmp_path):
    made, path = judged("cnn-3"), tmp_path / "cnn-3.npz"
    store.save(made, path)
    first, found = path.read_bytes(), store.load(path)
    assert (found.places, found.made_of, found.about) == (made.places, made.made_of, made.about)
    assert all(np.array_equal(found.logits[row], made.logits[row]) for row in SKILL)
    assert (
        found.scores(tables.DEFAULT)["unseen"]["b"].tolist() == made.logits[tables.DEFAULT][-30:].astype(float).tolist()
    )
    store.save(found, path)
    assert path.read_bytes() == first
    with pytest.raises(ValueError, match="R2M: logits that are no finite float16, the largest 1e"):
        made.add("R2M", np.full(3, 1e6), "x")


def test_tables_are_of_the_logits(results):
    directory, content = results
    section = content["sections"]["scratch"]["fresh"]
    assert section["runs"] == ["cnn-100", "cnn-101", "vit-100", "vit-101"]
    assert section["seeds"] == 2
    row = section["rows"][tables.DEFAULT]
    scores = store.load(store.logits_of("cnn-101", directory)).scores(tables.DEFAULT)["unseen"]
    labels = np.repeat([0.0, 1.0], 30)
    by_hand = [roc_auc_score(labels, np.concatenate([scores["real"], scores[kind]])) for kind in ("a", "b")]
    assert row["auc"]["unseen"][1] == pytest.approx(np.mean(by_hand))
    assert row["mean"]["unseen"] == pytest.approx(np.mean(row["auc"]["unseen"]))
    average = section["rows"]["weight average"]
    assert row["minus"]["weight average"]["unseen"]["mean"] == pytest.approx(
        row["mean"]["unseen"] - average["mean"]["unseen"]
    )
    ensemble = section["rows"]["ensemble"]
    share = (row["mean"]["unseen"] - average["mean"]["unseen"]) / (
        ensemble["mean"]["unseen"] - average["mean"]["unseen"]
    )
    assert row["share"]["unseen"] == pytest.approx(share)
    assert ensemble["share"]["unseen"] == pytest.approx(1.0)
    assert content["sections"]["second base"]["fresh"]["runs"] == ["lite0-100"]
    assert content["sections"]["scratch"]["development"]["runs"] == ["cnn-0"]
    assert content["chosen"]["vit"] == {"TSV-M": "α 2"}


def test_the_ensemble_is_the_mean_logit_of_the_specialists(results):
    path = store.logits_of("cnn-0", results[0])
    found = store.load(path)
    mean = np.mean([found.logits[row].astype(float) for row in SPECIALISTS.values()], axis=0)
    labels, places = np.repeat([0.0, 1.0], 30), found.places["unseen"]["b"]
    auc = roc_auc_score(labels, np.concatenate([mean[:30], mean[slice(*places)]]))
    assert tables.numbers_of(path)["rows"]["ensemble"]["forgeries"]["unseen"]["b"] == pytest.approx(auc)


def test_a_row_that_some_run_lacks_is_in_no_table_and_the_same_logits_make_the_same_tables(results, tmp_path):
    store.save(judged("cnn-100"), store.logits_of("cnn-100", tmp_path))
    kept = {row: skill for row, skill in SKILL.items() if row != "TSV-M × 1"}
    store.save(judged("cnn-101", kept), store.logits_of("cnn-101", tmp_path))
    store.save(
        judged("vit-100", {"base": 0.0, **dict.fromkeys(SPECIALISTS.values(), 0.8)}),
        store.logits_of("vit-100", tmp_path),
    )
    content = tables.summarize(tmp_path)
    assert content["sections"]["scratch"]["fresh"]["runs"] == ["cnn-100", "cnn-101"]  # the third is hardly begun
    assert list(content["sections"]["scratch"]["fresh"]["rows"]) == [
        row for row in results[1]["sections"]["scratch"]["fresh"]["rows"] if row != "TSV-M × 1"
    ]
    assert content["protocol"]["decided"] is None  # nor is anything decided
    assert json.dumps(content) == json.dumps(tables.summarize(tmp_path))


@pytest.mark.parametrize(
    ("gains", "default", "more"),
    [
        ({}, tables.DEFAULT, False),
        ({"TSV-M × 1": 0.2}, "TSV-M × 1", True),
        ({tables.DEFAULT: 0.02}, "TSV-M × 1", True),
        ({tables.DEFAULT: 0.02, "TSV-M × 1": 0.0}, tables.DEFAULT, False),
    ],
)
def test_the_protocol_decides(gains, default, more):
    over_average = {
        tables.DEFAULT: 0.05,
        "TSV-M × 1": 0.04,
        "weight average": 0.0,
        "weight average × 1.2": 0.01,
    } | gains

    def against(regime, row, other, group):
        mean = over_average[row] - over_average[other]
        return {"mean": mean, "low": mean - 0.02}

    content = {**PROTOCOL, "conditions": {"more": [["TSV-M × 1", tables.DEFAULT, "pretrained", "code", "mean"]]}}
    decided = protocol.decide(content, against)
    assert decided["default"] == default
    assert [held for *_, held in decided["conditions"]["more"]] == [more]
    assert all(len(bars) == 8 for bars in decided["bars"].values())
    for row, bars in decided["bars"].items():
        assert (row in decided["holding"]) == all(found["low"] >= -0.005 for *_, found in bars)
    by_low = {**content, "conditions": {"more": [["TSV-M × 1", tables.DEFAULT, "pretrained", "code", "low"]]}}
    lows = over_average["TSV-M × 1"] - over_average[tables.DEFAULT] - 0.02
    assert protocol.decide(by_low, against)["conditions"]["more"][0][-1] == (lows > 0)


def test_the_protocol_decides_on_its_groups(results):
    decided = results[1]["protocol"]["decided"]
    bars = decided["bars"][tables.DEFAULT]
    assert [bar[:3] for bar in bars[:2]] == [
        ["scratch", "in-distribution", "weight average"],
        ["scratch", "in-distribution", "weight average × 1.2"],
    ]
    row = results[1]["sections"]["scratch"]["fresh"]["rows"][tables.DEFAULT]
    assert bars[0][3] == row["minus"]["weight average"]["in-distribution"]


def test_the_protocol_is_known_by_its_commit(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x", *words], check=True)

    path = tmp_path / "protocol.json"
    monkeypatch.setattr(protocol, "PATH", path)
    path.write_text("{}")
    git("init", "-q")
    for change in ("", " "):
        path.write_text("{}" + change)
        with pytest.raises(
            SystemExit, match=r"after the protocol is committed: .*protocol.json is not, or was changed"
        ):
            protocol.committed()
        git("add", ".")
        git("commit", "-qm", "one")
    found = protocol.committed()
    assert found["sha256"] == protocol.digest()
    assert found["commit"] == output("git", "-C", str(tmp_path), "rev-parse", "HEAD")


def test_the_committed_protocol_is_about_rows_that_there_are():
    content, methods = protocol.read(), {method.name: method for method in all_methods()}
    protocol.check(content, methods)
    assert 1 <= len(content["candidates"]) <= 4
    assert content["fallback"] in content["candidates"]


def test_the_protocol_names_rows_that_are_what_they_were():
    methods = {method.name: method for method in all_methods()}
    (average,) = methods["weight average"].candidates.values()
    content = {**PROTOCOL, "candidates": {"weight average": key(average)}, "conditions": {}}
    protocol.check(content, methods)
    with pytest.raises(SystemExit, match="the protocol names 'nobody', which"):
        protocol.check({**content, "baselines": ["nobody"]}, methods)
    with pytest.raises(SystemExit, match="the protocol means 'another'"):
        protocol.check({**content, "candidates": {"weight average": "another"}}, methods)


def test_pages_say_what_the_tables_have(results):
    content = json.loads(json.dumps(results[1]))  # which other tests read
    text = {path.name: page for path, page in docs.pages(content).items()}
    found = content["sections"]["scratch"]["fresh"]["rows"][tables.DEFAULT]["minus"]["weight average"]["unseen"]
    for page in ("quality.md", "quality-methods.md", "README.md", "quality-protocol.md"):
        assert tables.difference(found) in text[page], page
    (missing,) = {line for line in text["quality-methods.md"].splitlines() if line.startswith("Not judged here")}
    assert " SCORE;" in missing  # and what was judged is not said to be missing
    assert " TSV-M × 1;" not in missing
    found["mean"] += 0.1
    changed = {path.name: page for path, page in docs.pages(content).items()}
    assert {name for name in text if text[name] != changed[name]} == {"quality.md", "quality-methods.md", "README.md"}


def test_shares_are_of_the_ensembles_and_of_joint_trainings_gain(results):
    content = json.loads(json.dumps(results[1]))
    rows = content["sections"]["pretrained"]["fresh"]["rows"]

    def gains(**of):
        for row, gain in of.items():
            found = rows[tables.DEFAULT if row == "default" else row.replace("_", " ")]
            for group in ("in-distribution", "code"):
                found["minus"]["weight average"][group]["mean"] = gain

    gains(ensemble=0.04, joint_training=0.05, default=0.03)
    rows[tables.DEFAULT]["mean"]["in-distribution"] = 1.0  # the best there is
    page = docs.pages(content)[docs.DOCS / "quality.md"]
    assert "pretrained | +.030 | 75 % | 60 % | +.030 | 75 % | 60 % |" in page
    made = "reached: in-distribution R2M, the default makes {} of the ensemble's and {} of joint training's"
    assert f"\nnot {made.format('75 %', '60 %')}, unseen 75 % of the ensemble's." in page
    gains(default=0.032)
    assert f"\n{made.format('80 %', '64 %')}, unseen" in docs.pages(content)[docs.DOCS / "quality.md"]
    gains(ensemble=-0.01)  # of nothing there is no share
    assert "pretrained | +.032 | – | 64 % | +.032 | – | 64 % |" in docs.pages(content)[docs.DOCS / "quality.md"]


def moved(way, length, *gains, own=0.8):
    """An entry of lengths.json: where decorrelated, at .75, is ahead of the default by ``gains``."""
    rows = dict.fromkeys(("ensemble", "weight average", "TSV-M × 1", "R2M decorrelated, by tensor"), 0.7)
    rows |= {"R2M decorrelated": 0.75, tables.DEFAULT: None}
    groups = ("in-distribution", "code")
    auc = {row: dict.fromkeys(groups, value) for row, value in rows.items()}
    auc[tables.DEFAULT] = {group: 0.75 - gain for group, gain in zip(groups, gains, strict=True)}
    return {**way, "relative_to_base": [length] * 3, "own_families": [own + 0.1, own, own - 0.1], "auc": auc}


def page_of_lengths(results, runs):
    page = docs.pages({**results[1], "lengths": runs})[docs.DOCS / "quality-studies.md"]
    return page.partition("## How far specialists may move")[2]


def test_the_page_says_where_decorrelated_and_default_change_places(results):
    runs = {
        "mobilenet-0": [moved({"rate": 1}, 0.01, 0.02, 0.01), moved({"rate": 6}, 0.05, 0.01, -0.02)],
        "mobilenet-1": [moved({"rate": 1}, 0.012, 0.03, -0.01), moved({"rate": 6}, 0.05, -0.01, -0.03)],
    }
    page = page_of_lengths(results, runs)
    assert "vectors of 1.1 % to 5.0 % of the base's length." in page
    assert "| 1 | 1.1 % | .800 | .700 | +.000 | +.050 | +.000 | +.000 | +.025 |" in page
    assert "| 6 | 5.0 % | +.010 -.010 | -.020 -.030 |" in page
    assert (
        "In every run, in-distribution, decorrelated is ahead at 1.1 % (own family .800); behind at no length." in page
    )
    assert "In every run, code, decorrelated is ahead at no length; behind at 5.0 % (own family .800)." in page
    assert "that is not asked" not in page
    assert "### More steps" not in page
    for run in runs.values():
        run[1]["auc"]["weight average"]["in-distribution"] = 0.55
    page = page_of_lengths(results, runs)
    assert "In every run, code, decorrelated is ahead at no length; behind at no length." in page
    assert "At 5.0 % that is not asked: the average is hardly above chance" in page
    assert "Not run yet.\n" in docs.pages(results[1])[docs.DOCS / "quality-studies.md"]


def test_the_page_says_from_which_length_on_decorrelated_is_behind(results):
    # In the order in which they were judged, and as far as the study has come.
    runs = {
        "mobilenet-0": [
            moved({"rate": 1}, 0.01, 0.02, -0.01),
            moved({"rate": 6}, 0.2, 0.02, -0.02, own=0.6),
            moved({"steps": 10}, 0.05, -0.01, -0.02),
            moved({"steps": 3}, 0.03, -0.02, -0.02, own=0.79),
            moved({"steps": 30}, 0.08, 0.01, 0.03),
        ],
        "mobilenet-1": [
            moved({"rate": 1}, 0.01, 0.02, -0.01),
            moved({"steps": 10}, 0.05, -0.02, -0.03),
            moved({"steps": 3}, 0.03, -0.02, -0.02, own=0.79),
        ],
    }
    longer, _, faster = page_of_lengths(results, runs).partition("### Higher rates")
    assert "Up to 30 times the usual steps, at the usual rate: task vectors of 1.0 % to 8.0 %" in longer
    cells = [row.split(" | ")[0] for row in longer.splitlines() if row.startswith("| ")]
    assert cells == 3 * ["| steps", "| ---", "| 1", "| 3", "| 10", "| 30, 1 run only"]
    assert "| 30, 1 run only | 8.0 % | +.010 | +.030 |" in longer
    assert "; behind at 3.0 % (own family .790), 5.0 % (own family .800). In every run, code," in longer
    assert "is ahead at 8.0 % (own family .800, 1 run only); behind at 1.0 %" in longer
    # One run is none of all, so 30 times is no way back; in code it is the usual specialists too.
    assert "at most .020 of what usual ones have on their own families: in-distribution, from" in longer.replace(
        "\n", " "
    )
    assert ": in-distribution, from 3.0 % on; code, at every length, the usual one too." in longer
    assert "behind in all of 2 runs at one length of 4." in longer
    assert "| 6, 1 run only | 20.0 % | .600 |" in faster
    assert "from no length" not in longer + faster
    # Bad specialists draw no border …
    for entry in (runs["mobilenet-0"][3], runs["mobilenet-1"][2]):
        entry["own_families"] = [0.7] * 3
    longer, _, _ = page_of_lengths(results, runs).partition("### Higher rates")
    assert ": in-distribution, from 5.0 % on;" in longer
    # … and there is none before a length at which decorrelated is not behind.
    runs["mobilenet-1"].append(moved({"steps": 30}, 0.08, -0.01, -0.03))
    longer, _, _ = page_of_lengths(results, runs).partition("### Higher rates")
    assert ": in-distribution, from no length on;" in longer


def test_the_page_says_what_of_the_cost_was_measured(results):
    def page(cost):
        made = docs.pages({**results[1], "cost": cost})[docs.DOCS / "quality-protocol.md"]
        return made.partition("## What judging costs")[2].replace("\n", " ")

    assert "Not measured yet." in page({})
    fresh = [f"{name}-{seed}" for name in settings.REGIMES for seed in settings.fresh_of(name)]
    one = {"models": 65, "pictures": 1700, "cpu_seconds": 90.0}
    cost = {"machine": {"cpu": "EPYC", "torch": "2"}, "runs": {fresh[0]: one, "cnn-0": one}, "fresh": None}
    assert "Not measured yet." in page(cost)
    cost["fresh"] = {"runs": 32, "cpu_seconds": 2700.0}
    assert f"all {len(fresh)} fresh runs from trained detectors takes 45 CPU minutes, by scaling: the" in page(cost)
    assert "The goal is 45 minutes on 2 cores, which have 90." in page(cost)
    assert f"| {fresh[0]} | 65 | 1700 | 1.5 |" in page(cost)
    assert "cnn-0 " not in page(cost)  # no fresh one
    assert "takes 45 CPU minutes. The goal" in page({**cost, "runs": dict.fromkeys(fresh, one)})


def test_studies_say_of_how_many_runs_they_are():
    def merge(count, value):
        return {"experts": ["FS"] * count, "auc": {tables.DEFAULT: {"six families": value}}}

    case = {"as trained": {tables.DEFAULT: {"in-distribution": 0.8}}}
    runs = {"cnn-0": {"many": [merge(1, 0.5), merge(2, 0.6), merge(1, 0.7), merge(2, 0.7)], "robustness": case}}
    runs["cnn-1"], runs["cnn-2"] = {"robustness": {"as trained": {tables.DEFAULT: {"in-distribution": 0.7}}}}, {}
    several, wrong = study_pages._several(runs, "cnn"), study_pages._wrong(runs, "cnn")
    assert several == {
        "header": ["specialists", "1", "2"],
        "rows": [["**R2M, the default**", ".600", ".650"]],
        "runs": "1 run",
    }
    assert wrong["runs"] == "2 runs"
    assert wrong["header"] == ["case", "**R2M, the default**"]
    assert wrong["rows"] == [["as trained", ".750"]]
    assert not study_pages._several(runs, "vit")["rows"]


def test_pages_are_what_the_summary_gives():
    assert docs.main(["--check"]) == 0


def test_short_numbers():
    assert tables.short(0.8234) == ".823"
    assert tables.short(-0.0046, True) == "-.005"
    assert tables.short(0.0, True) == "+.000"
    assert tables.difference({"mean": 0.01, "low": -0.002, "high": 0.021, "wins": 7, "runs": 10}) == (
        "+.010 [-.002, +.021] 7/10"
    )


COMMITTED = sorted(store.STORE.glob("logits/*.npz"))


def test_committed_logits_are_small():
    assert sum(path.stat().st_size for path in COMMITTED) < 20e6


def test_fresh_seeds_were_judged_after_the_protocol():
    for path in COMMITTED:
        if int(path.stem.split("-")[1]) not in settings.FRESH:
            continue
        made = store.load(path).about["protocol"]
        assert made["sha256"] == protocol.digest(), path.stem
        judged_at = output("git", "log", "-1", "--format=%H", "--", str(path))
        if judged_at and output("git", "cat-file", "-t", made["commit"]):
            order = ["git", "merge-base", "--is-ancestor", made["commit"], judged_at]
            assert subprocess.run(order, cwd=store.STORE, check=False).returncode == 0, path.stem


def test_rows_were_merged_by_the_configurations_that_they_name():
    fixed = {one.name: candidate for one in all_methods() if not one.tuned for candidate in one.candidates.values()}
    for path in COMMITTED:
        for row, made_from in store.load(path).made_of.items():
            if isinstance(fixed.get(row), MergeConfig):
                assert made_from.split()[1] == judging.made_of(judging.identity(fixed[row])), (path.stem, row)


@pytest.mark.slow
def test_the_summary_is_what_the_committed_logits_give():
    again = json.loads(json.dumps(tables.summarize(store.STORE)), parse_float=tables.rounded)
    assert again == json.loads(docs.SUMMARY.read_text())
