"""Which numbers of the report tell a bad merge: thresholds, and how often they err.

Thresholds were set on the development runs; those that became warnings stand in ``r2m_kernels/diagnostics.py`` too, and
a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from r2m.demo.evaluation import auc

# A merge is bad where it ranks this much worse than the ensemble of the same specialists (AUC).
BAD = 0.10


@dataclass(frozen=True)
class Rule:
    """An alarm on one number of the report.

    Attributes:
        number: as ``studies`` calls it.
        side: ``above`` or ``below`` the threshold is alarming.
        warns: whether the package warns of it.
    """

    number: str
    side: str
    threshold: float
    warns: bool = False


RULES = (
    Rule("smallest cosine", "below", 0.05, warns=True),
    Rule("mean cosine", "below", 0.06),
    Rule("longest/median task vector", "above", 3.0, warns=True),
    Rule("largest/smallest task vector", "above", 3.5),
    Rule("leading expert's share of the core", "above", 0.9, warns=True),
    Rule("‖core‖/‖mean‖", "below", 0.9),
    Rule("mean/mean norm", "below", 0.7),
    Rule("largest scale", "above", 1.5),
    Rule("gap", "below", 0.3),
)


def judged(runs: Mapping[str, Sequence[Mapping[str, Any]]], rule: Rule) -> dict[str, float]:
    """How a rule does on the merges of some runs.

    Returns:
        ``bad``, ``good``: how many merges; ``found``: bad ones with an alarm; ``false``: good ones with an alarm;
        ``auc``: of the number, bad above good. Merges whose report lacks the number count as without alarm.
    """
    merges = [one for found in runs.values() for one in found]
    known = [one for one in merges if one["report"][rule.number] is not None]
    sign = 1.0 if rule.side == "above" else -1.0

    def alarm(one: Mapping[str, Any]) -> bool:
        return bool(sign * one["report"][rule.number] > sign * rule.threshold)

    bad, good = ([one for one in merges if (one["shortfall"] > BAD) == wanted] for wanted in (True, False))
    alarmed = [one for one in known if alarm(one)]
    values = [
        np.array([sign * one["report"][rule.number] for one in known if (one["shortfall"] > BAD) == wanted])
        for wanted in (False, True)
    ]
    return {
        "bad": len(bad),
        "good": len(good),
        "found": sum(one["shortfall"] > BAD for one in alarmed),
        "false": sum(one["shortfall"] <= BAD for one in alarmed),
        "auc": auc(*values) if all(map(len, values)) else float("nan"),
    }
