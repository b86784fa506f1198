"""What is right: R²M on one page (:mod:`.r2m`), other methods a function each (:mod:`.others`); naive, in float64.

Task vectors, the Real subspace's basis and residuals are formed explicitly, and truncated by a full SVD. Every backend
is tested against it. It imports nothing of this package and is not fast.
"""

from .others import (
    cart,
    columns_scaled,
    iso_c,
    layers_scaled,
    star,
    task_arithmetic,
    ties,
    tsv_m,
    weight_average,
)
from .r2m import merge, real_subspace

__all__ = [
    "cart",
    "columns_scaled",
    "iso_c",
    "layers_scaled",
    "merge",
    "real_subspace",
    "star",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "weight_average",
]
