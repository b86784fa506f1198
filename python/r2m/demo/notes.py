"""The lines below the table: what it shows, what was picked, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping

from r2m.demo.faces import CREDIT, PHOTOGRAPHS_EACH, Split
from r2m.demo.forgeries import UNSEEN
from r2m.demo.merges import Choice
from r2m.demo.settings import Setting


def make_notes(
    split: Split, setting: Setting, choices: Mapping[str, Choice], seed: int, quick: bool
) -> tuple[str, ...]:
    """Write the lines below the table.

    Args:
        split: the people of each part.
        setting: the sizes of the run.
        choices: method → what was picked for it on the validation people.
        seed: of the run.
        quick: whether training was cut short.
    """
    photographs = PHOTOGRAPHS_EACH * len(split.test)
    pictures = photographs * setting.test_draws
    picked = "; ".join(f"{method} {choice.label}" for method, choice in choices.items())
    notes = (
        f"Tested on {photographs} photographs of {len(split.test)} people ({len(split.train)} others to "
        f"train, {len(split.validation)} to validate): {pictures} real pictures, {pictures} of each forgery.",
        "FS, FR, EFS: face swap, reenactment, entire face synthesis, as in training; in-distribution: their "
        "mean; cross: all three with shifted parameters and another camera; unseen: mean of "
        f"{len(UNSEEN)} other forgeries.",
        f"Picked on the validation people: {picked}. R2M and weight average: defaults, nothing picked.",
        "Chance is 0.5; the base's head is untrained. Joint training needs all the data, the ensemble all the models.",
        f"One seed ({seed}) and few people: differences below 0.01 are noise. Photographs: {CREDIT}.",
    )
    return ("Quick run: far too little training, so these numbers mean nothing.", *notes) if quick else notes
