"""Many specialists on the pretrained base: tables from the committed numbers, and who sees which people."""

from __future__ import annotations

import numpy as np
import pytest

from bench.quality import crowd, crowd_models
from bench.quality.models import Run


def test_the_page_is_what_the_numbers_give() -> None:
    assert crowd.main(["--check"]) == 0


def test_rows_are_compared_with_the_row_of_the_same_specialists() -> None:
    def row(value: float) -> dict[str, float]:
        return dict.fromkeys(crowd.FAMILIES, value)

    runs = [
        {"ensemble, 3": row(0.7 + shift), "weight average, 3": row(0.6), "ensemble, 6": row(0.8)}
        | {"weight average, 6": row(0.9)}
        for shift in (0.0, 0.02)
    ]
    made = crowd.section({"a": {"How many": runs[0]}, "b": {"How many": runs[1]}}).splitlines()
    assert made[0].startswith("| How many (2 runs) |")
    assert made[2:] == [
        "| ensemble, 3 | .710 | +.110 (2/2) |",
        "| weight average, 3 | .600 |  |",
        "| ensemble, 6 | .800 | -.100 (0/2) |",
        "| weight average, 6 | .900 |  |",
    ]


def test_thirds_of_the_people_share_nobody() -> None:
    found = crowd_models.Crowd(Run("mobilenet", 0))
    people = len(found._of_people[1])
    pictures = (2, people, crowd_models.PHOTOGRAPHS_EACH)
    person = np.broadcast_to(np.arange(people)[None, :, None], pictures).reshape(-1, 1, 1)
    found._pool = lambda kind: person
    thirds = []
    for part in range(crowd_models.THIRDS):
        real, (forged,) = found._third(part, "FS")
        assert np.array_equal(real, forged)
        assert len(real) == 2 * pictures[-1] * len(np.unique(real))
        thirds.append(set(real.ravel()))
    assert set.union(*thirds) == set(range(people))
    assert sum(map(len, thirds)) == people


def test_a_run_that_is_no_development_run_of_the_pretrained_base_is_refused(capsys) -> None:
    for strange in ("lite0-0", "mobilenet-100", "cnn-0", "mobilenet"):
        with pytest.raises(SystemExit) as refused:
            crowd.main([strange])
        assert refused.value.code == 2
        assert f"argument runs: expected one of mobilenet-0, mobilenet-1, got {strange}\n" in capsys.readouterr().err
