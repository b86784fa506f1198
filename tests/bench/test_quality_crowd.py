"""Many specialists on the pretrained base: tables from the committed numbers, and who sees which people."""

from __future__ import annotations

import numpy as np

from bench.quality import crowd
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
    found = crowd.Crowd(Run("mobilenet", 0))
    people = len(found._of_people[1])
    person = np.broadcast_to(np.arange(people)[None, :, None], (2, people, crowd.PHOTOGRAPHS_EACH)).reshape(-1, 1, 1)
    found._pool = lambda kind: person
    thirds = []
    for part in range(crowd.THIRDS):
        real, (forged,) = found._third(part, "FS")
        assert np.array_equal(real, forged)
        assert len(real) == 2 * crowd.PHOTOGRAPHS_EACH * len(np.unique(real))
        thirds.append(set(real.ravel()))
    assert set.union(*thirds) == set(range(people))
    assert sum(map(len, thirds)) == people
