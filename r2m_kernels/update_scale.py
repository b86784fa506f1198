"""How far a merged change reaches, against the specialists' own changes (README §6): ``scale``, restored cores.

The mean of task vectors that are nearly orthogonal is much shorter than each of them.
"""

from __future__ import annotations

from torch import Tensor

# A change is lengthened at most so much: specialists that cancel leave little but rounding to lengthen.
MOST = 4.0


def gain(gram: Tensor, weights: Tensor) -> float:
    """(Σ w_j ‖τ_j‖ / ‖mean τ‖)^½ of one tensor or of all, at most ``MOST``; 1 where nothing changed.

    Args:
        gram: (N, N) of the task vectors.
        weights: (N,) w.
    """
    lengths = float(weights @ gram.diag().clamp_min(0).sqrt())
    mean = float((weights @ gram @ weights).clamp_min(0).sqrt())
    if lengths == 0:
        return 1.0
    return float((lengths / max(mean, lengths / MOST**2)) ** 0.5)
