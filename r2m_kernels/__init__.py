"""R²M, Real-aware Residual Model Merging (arXiv 2509.24367): specialists in, one detector out, no data needed.

>>> from r2m_kernels import merge
>>> merged = merge(base_state_dict, {"fs": fs_state_dict, "fr": fr_state_dict, "efs": efs_state_dict})
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import ops, reference
    from ._stream.run import ProgressEvent
    from ._stream.tensors import TensorSink, TensorSource, TensorSpec
    from .config import MergeConfig
    from .errors import BackendUnavailable, InvalidInput, R2MError
    from .merging import Analysis, analyze, merge

# Where each name is: loaded when it is asked for, so that who only wants to know the options does without torch.
_HOMES = {
    "Analysis": ".merging",
    "BackendUnavailable": ".errors",
    "InvalidInput": ".errors",
    "MergeConfig": ".config",
    "ProgressEvent": "._stream.run",
    "R2MError": ".errors",
    "TensorSink": "._stream.tensors",
    "TensorSource": "._stream.tensors",
    "TensorSpec": "._stream.tensors",
    "analyze": ".merging",
    "merge": ".merging",
}
_MODULES = ("ops", "reference")

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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
