"""The timing of ``r2m detect`` beside ``evaluate`` compares what is the same."""

from __future__ import annotations

from bench.detect import ROUNDS, measure


def test_both_score_the_same_pictures() -> None:
    found = measure(6)
    assert found["largest difference of scores"] <= 1e-6
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"evaluate": ROUNDS, "detect": ROUNDS}
    assert found["detect by evaluate"] > 0
