"""The section on the compressed ensemble: made of the committed runs, and its goal told by what they say."""

from __future__ import annotations

from bench.quality import compressed


def test_the_page_is_what_the_runs_give() -> None:
    assert compressed.main(["--check"]) == 0


def test_the_goal_is_told_by_means_and_numbers() -> None:
    def told(behind: float, numbers: int) -> str:
        ensemble = dict.fromkeys(("in-distribution", "code", "neural"), 0.8)
        rows = {row: {**ensemble, "code": 0.8 - behind} for row in compressed.ROWS}
        counts = {row: numbers if row == compressed.DEFAULT else 1000 for row in compressed.ROWS}
        return compressed.section({"a": {"auc": {"ensemble": ensemble, **rows}, "numbers": {"model": 1000, **counts}}})

    assert "is met by `--rank 0.05` (default)." in told(0.0039, 300)
    assert "is met by none of these." in told(0.0041, 300)
    assert "is met by none of these." in told(0.0039, 301)
    assert "| `--rank 0.05` (default) | 30.0 % | +0.0000 [+0.0000, +0.0000] | -0.0039" in told(0.0039, 300)


def test_the_candidate_whose_worst_group_is_best_is_chosen_of_those_within() -> None:
    groups = ("in-distribution", "code", "neural")
    runs = {"a": {"auc": {"ensemble": dict.fromkeys(groups, 0.8)}, "numbers": {"model": 1000}}}

    def told(**worst: float) -> str:
        judged = {
            name.replace("_", " "): {"a": {"auc": {**runs["a"]["auc"]["ensemble"], "code": 0.8 - one}, "numbers": 299}}
            for name, one in worst.items()
        }
        return compressed.compared(judged, runs)

    assert "| relative (chosen) | w_l = 1 / ‖theta_l‖^2 | 29.9 % |" in told(relative=0.0038, half_relative=0.0039)
    assert "half relative (chosen)" in told(relative=0.0039, half_relative=0.0038)
    assert "chosen)" not in told(relative=0.0041, half_relative=0.0041)


def test_what_was_asked_again_is_told_whatever_it_is() -> None:
    def told(behind: float) -> str:
        ensemble = dict.fromkeys(("in-distribution", "code", "neural"), 0.8)
        auc = {"ensemble": ensemble, compressed.AGAIN: {**ensemble, "neural": 0.8 - behind}}
        text = compressed.asked_again({"a": {"auc": auc, "numbers": {"model": 1000, compressed.AGAIN: 300}}})
        return " ".join(text.split())

    assert "Yes: +0.0000 [+0.0000, +0.0000] in-distribution" in told(0.0039)
    assert told(0.0041).endswith("-0.0041] neural, with 30.0 % more numbers.")
    assert "No: " in told(0.0041)
