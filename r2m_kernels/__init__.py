"""R²M, Real-aware Residual Model Merging (arXiv 2509.24367): specialists in, one detector out, no data needed.

>>> from r2m_kernels import merge
>>> merged = merge(base_state_dict, {"fs": fs_state_dict, "fr": fr_state_dict, "efs": efs_state_dict})
"""

from r2m_kernels import ops, reference
from r2m_kernels._version import __version__
from r2m_kernels.config import MergeConfig
from r2m_kernels.errors import BackendUnavailable, InvalidInput, R2MError
from r2m_kernels.merging import Analysis, ProgressEvent, analyze, merge
from r2m_kernels.tensors import TensorSink, TensorSource, TensorSpec

__all__ = [
    "Analysis",
    "BackendUnavailable",
    "InvalidInput",
    "MergeConfig",
    "ProgressEvent",
    "R2MError",
    "TensorSink",
    "TensorSource",
    "TensorSpec",
    "__version__",
    "analyze",
    "merge",
    "ops",
    "reference",
]
