"""Temperature and bias of log-odds; imports nothing that is slow, since recipes have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What becomes of a detector's log-odds z: z/T + b.

    Attributes:
        temperature: T > 0.
        bias: b, of the second output against the first, or of the only one.
    """

    temperature: float = 1.0
    bias: float = 0.0

    def done(self, logits: Numbers) -> Numbers:
        """(n,) log-odds after it."""
        return logits / self.temperature + self.bias

    def undone(self, logits: Numbers) -> Numbers:
        """And those before it."""
        return (logits - self.bias) * self.temperature
