"""The section on the compressed ensemble: made of the committed runs, and its goal told by what they say."""

from __future__ import annotations

from bench.quality import compressed


def test_the_page_is_what_the_runs_give() -> None:
    assert compressed.main(["--check"]) == 0


def test_the_goal_is_told_by_means_and_numbers() -> None:
    def told(behind: float, numbers: int) -> str:
        ensemble = dict.fromkeys(("in-distribution", "code", "neural"), 0.8)
        rows = {f"{rank:g}": {**ensemble, "code": 0.8 - behind} for rank in compressed.RANKS}
        counts = {f"{rank:g}": numbers if rank == compressed.DEFAULT else 1000 for rank in compressed.RANKS}
        return compressed.section({"a": {"auc": {"ensemble": ensemble, **rows}, "numbers": {"model": 1000, **counts}}})

    assert "is met at rank 0.05." in told(0.0039, 300)
    assert "is met at none of these ranks." in told(0.0041, 300)
    assert "is met at none of these ranks." in told(0.0039, 301)
    assert "| 0.05 (default) | 30 % | +0.0000 [+0.0000, +0.0000] | -0.0039" in told(0.0039, 300)
