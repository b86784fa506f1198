"""What is right: R²M on one page (:mod:`.r2m`), other methods a function each (:mod:`.others`); naive, in float64.

Task vectors, the Real subspace's basis and residuals are formed explicitly, and truncated by a full SVD. Every backend
is tested against it. It imports nothing of this package and is not fast.
"""

from . import others
from .r2m import merge, real_subspace

__all__ = ["merge", "others", "real_subspace"]
