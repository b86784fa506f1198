"""How often those tests are repeated that find more the longer they go on: one option of pytest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numbers:
    """Of tests that are marked ``heavy``."""

    kills: int
    inputs: int  # of three kinds in all


NUMBERS = {"change": Numbers(kills=8, inputs=400), "notes": Numbers(kills=25, inputs=2000)}
