"""How much the demo trains and how many pictures it makes."""

from __future__ import annotations

from dataclasses import dataclass

from r2m.demo.training import Recipe


@dataclass(frozen=True)
class Setting:
    """Sizes of a run.

    Attributes:
        base: recipe of the generic pretraining.
        specialist: recipe of each of the three specialists, the same for all.
        joint: recipe of the joint model: three times a specialist's steps, so that it sees as many
            forgeries of each family as that family's specialist.
        training_draws, validation_draws, test_draws: crops of each photograph, real and for each forgery.
    """

    base: Recipe
    specialist: Recipe
    joint: Recipe
    training_draws: int
    validation_draws: int
    test_draws: int


FULL = Setting(
    base=Recipe(steps=400, learning_rate=2e-3),
    specialist=Recipe(steps=300),
    joint=Recipe(steps=900),
    training_draws=12,
    validation_draws=4,
    test_draws=4,
)
# The same flow and files in seconds; what it measures means little.
QUICK = Setting(
    base=Recipe(steps=16, batch=32, learning_rate=2e-3),
    specialist=Recipe(steps=12, batch=32),
    joint=Recipe(steps=36, batch=32),
    training_draws=2,
    validation_draws=1,
    test_draws=1,
)
