"""Which detectors are trained, on which seeds, and how many pictures judge them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from r2m.demo.faces import SIZE
from r2m.demo.forgeries import TRAINED
from r2m.demo.training import FULL, Recipe

from bench.quality.forgeries import FURTHER_FORGERIES

# Everything is chosen on the first five (on their validation people) and judged on the ten fresh ones, by a protocol
# that was committed before one of them was scored.
DEVELOPMENT = (0, 1, 2, 3, 4)
FRESH = tuple(range(100, 110))
# Of detectors on the pretrained base, for one question, which docs/calibration.md put before one of them was scored.
CALIBRATION = tuple(range(110, 120))
# For a later question: nothing is trained on them.
LATER = tuple(range(120, 130))
# The second pretrained base has two fresh seeds, and takes what was chosen on the first base's.
SECOND_BASE = FRESH[:2]
# Where up to six specialists are merged, and where something is wrong with one of them.
MANY = (0, 1)
# Where specialists are fine-tuned longer or at other rates, for task vectors of 1 to 20 % of a pretrained base.
MOVED = (0, 1)
STEPS = (10, 3, 30)  # times the steps, at the usual rate; what tells most comes first
RATES = (3, 6, 12, 24)  # times the learning rate of the backbone
MAIN, FURTHER = TRAINED, tuple(FURTHER_FORGERIES)

REGIMES = {"cnn": "scratch", "vit": "scratch", "mobilenet": "pretrained", "lite0": "pretrained"}
"""Architecture → whether its base is trained here, on a generic task, or comes with weights of ImageNet."""


def development_of(architecture: str) -> tuple[int, ...]:
    """The seeds of an architecture that choices are made on."""
    return () if architecture == "lite0" else DEVELOPMENT


def fresh_of(architecture: str) -> tuple[int, ...]:
    """The seeds of an architecture that judge."""
    return SECOND_BASE if architecture == "lite0" else FRESH


class Draws(NamedTuple):
    """Crops of each photograph: of real pictures, and of each forgery."""

    real: int
    forged: int


@dataclass(frozen=True)
class Setting:
    """How a run is trained and judged."""

    base: Recipe | None  # the generic task; None: its weights come from a package
    specialist: Recipe
    joint: Recipe
    training: Draws
    validation: Draws
    test: Draws  # of the families that specialists are trained on
    unseen: int = 1  # of each forgery that nothing was trained on, in the pretrained regime
    size: int = SIZE  # pixels on a side
    independent: bool = False  # every detector draws its pictures in an order of its own


def _scratch(learning_rate: float) -> Setting:
    """The demo's, so that the CNN's first seed is the demo's."""
    specialist = replace(FULL.specialist, learning_rate=learning_rate)
    joint = replace(specialist, steps=3 * specialist.steps)
    return Setting(FULL.base, specialist, joint, Draws(12, 12), Draws(4, 4), Draws(2, 2))


_FINE_TUNED = Recipe(80, batch=32, learning_rate=1e-4, head_rate=10.0)
_PRETRAINED = Setting(
    None,
    _FINE_TUNED,
    replace(_FINE_TUNED, steps=160),
    Draws(5, 4),
    Draws(4, 2),
    Draws(3, 2),
    size=80,
    independent=True,
)
_SETTINGS = {"cnn": _scratch(1e-3), "vit": _scratch(2e-3), "mobilenet": _PRETRAINED, "lite0": _PRETRAINED}


def setting(architecture: str, quick: bool) -> Setting:
    """Training and judging of an architecture; with ``quick`` a tenth of the steps and one crop of each photograph."""
    full = _SETTINGS[architecture]
    if not quick:
        return full

    def short(recipe: Recipe) -> Recipe:
        return replace(recipe, steps=recipe.steps // 10)

    return replace(
        full,
        base=full.base and short(full.base),
        specialist=short(full.specialist),
        joint=short(full.joint),
        validation=Draws(1, 1),
        test=Draws(1, 1),
    )
