"""R²M, Real-aware Residual Model Merging (arXiv 2509.24367): specialists in, one detector out, no data needed.

>>> from r2m_kernels import merge
>>> merged = merge(base_state_dict, {"fs": fs_state_dict, "fr": fr_state_dict, "efs": efs_state_dict})
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import ops as ops
    from . import reference as reference
    from ._stream.tensors import TensorSink as TensorSink
    from ._stream.tensors import TensorSource as TensorSource
    from ._stream.tensors import TensorSpec as TensorSpec
    from .adapters import Adapters as Adapters
    from .config import MergeConfig as MergeConfig
    from .differentiation import Numbers as Numbers
    from .errors import BackendUnavailable as BackendUnavailable
    from .errors import InvalidInput as InvalidInput
    from .errors import R2MError as R2MError
    from .merging import Analysis as Analysis
    from .merging import analyze as analyze
    from .merging import merge as merge
    from .merging import screen as screen
    from .progress import Progress as Progress
    from .progress import ProgressEvent as ProgressEvent
    from .progress import ProgressLines as ProgressLines
    from .screening import Screening as Screening
    from .summary import Report as Report

logging.getLogger("r2m_kernels").addHandler(logging.NullHandler())  # silent unless somebody listens

# Loaded when they are asked for, so that who only wants to know the options does without torch.
_NAMES = {
    ".merging": ("Analysis", "analyze", "merge", "screen"),
    ".adapters": ("Adapters",),
    ".config": ("MergeConfig",),
    ".differentiation": ("Numbers",),
    ".errors": ("BackendUnavailable", "InvalidInput", "R2MError"),
    ".progress": ("Progress", "ProgressEvent", "ProgressLines"),
    ".screening": ("Screening",),
    ".summary": ("Report",),
    "._stream.tensors": ("TensorSink", "TensorSource", "TensorSpec"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("ops", "reference")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name], __name__), name)
    return value


__all__ = sorted(["__version__", *_HOMES, *_MODULES])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
