"""Finds, judges and calls the shared library of ``csrc/``; the ABI is described in ``csrc/r2m_native.h``.

``R2M_NATIVE``: ``auto`` (default) uses the library where it is there, ``off`` never, ``require`` makes its absence an
error. ``R2M_NATIVE_LIBRARY`` names another file than the package's own, such as one built with a sanitizer.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, BadOption

ABI_VERSION = 3
POLICIES = ("auto", "require", "off")
# By the bit of r2m_capabilities, of each kind of machine the slowest first.
VARIANTS = ("portable", "avx2", "avx512", "neon")
BFLOAT16_PRODUCTS = 8
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FAILURES = {1: "out of memory", 2: "bad argument", 3: "this CPU lacks the variant's instructions"}

INT, LONG, DOUBLE, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
# Types of every function's arguments after variant and compute type: operators declare theirs.
DECLARED: dict[str, tuple[Any, ...]] = {}


def declare(name: str, *arguments: Any) -> str:
    """A function of ``csrc/r2m_native.h`` that is going to be called, by its name."""
    DECLARED[name] = arguments
    return name


class Matrix(ctypes.Structure):
    """``r2m_matrix``."""

    _fields_ = (("data", POINTER), ("row_stride", LONG), ("dtype", LONG))


class Library:
    """The loaded library and the variant in use.

    Attributes:
        path: its file.
        variant: index into :data:`VARIANTS`.
        multiplies_bfloat16: whether the CPU has instructions for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendUnavailable(f"the native library cannot be loaded ({error})") from None
        try:
            version = int(functions.r2m_abi_version())
        except AttributeError:
            raise BackendUnavailable(f"'{path}' is not the native library of r2m_kernels") from None
        if version != ABI_VERSION:
            raise BackendUnavailable(
                f"the native library '{path}' has ABI {version}, and this version of r2m_kernels needs {ABI_VERSION}; "
                "install the package again"
            )
        capabilities = int(functions.r2m_capabilities())
        self.variants = [index for index in range(len(VARIANTS)) if capabilities >> index & 1]
        self.variant = self.variants[-1]
        self.multiplies_bfloat16 = bool(capabilities >> BFLOAT16_PRODUCTS & 1)
        self._functions = {}
        for name, arguments in DECLARED.items():
            function = getattr(functions, name, None)
            if function is None:
                raise BackendUnavailable(f"the native library '{path}' lacks {name}; install the package again")
            function.argtypes, function.restype = (INT, INT, *arguments), INT
            self._functions[name] = function

    def call(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        """Run a kernel in the compute type ``dtype``; other threads run meanwhile."""
        code = self._functions[name](self.variant, int(dtype == torch.float64), *arguments)
        if code == 1:
            raise MemoryError(f"{name}: out of memory")
        if code != 0:
            raise RuntimeError(f"{name}: {FAILURES.get(code, f'code {code}')}")

    def largest(self, name: str, dtype: torch.dtype, *arguments: object) -> float:
        """Run a kernel that writes, and whose last argument is where it tells the largest magnitude of that."""
        found = ctypes.c_double()
        self.call(name, dtype, *arguments, ctypes.byref(found))
        return found.value


@functools.cache
def _library(path: Path) -> Library:
    return Library(path)


def policy() -> str:
    """``R2M_NATIVE``; BadOption if it is none of the three."""
    value = os.environ.get("R2M_NATIVE") or "auto"
    if value not in POLICIES:
        raise BadOption(f"R2M_NATIVE: expected one of 'auto', 'require', 'off', got '{value}'")
    return value


# At most one, with what the environment said.
_in_use: list[tuple[Library, tuple[Any, Any]]] = []
# Asked in every call of an operator. `os.environ.get` takes a microsecond to say that a name is not there.
_environment: dict[Any, Any] = vars(os.environ)["_data"]
_NAMES = tuple(map(os.environ.encodekey, ("R2M_NATIVE", "R2M_NATIVE_LIBRARY")))


def load() -> Library:
    """The library that the environment names now, which operators use from here on; a file is loaded once.

    Raises:
        BackendUnavailable: it is switched off, missing, of another ABI or foreign.
        InvalidInput: ``R2M_NATIVE`` has no meaning.
    """
    environment = _environment.get(_NAMES[0]), _environment.get(_NAMES[1])
    if _in_use and _in_use[0][1] == environment:
        return _in_use[0][0]
    if policy() == "off":
        raise BackendUnavailable("the native kernels are switched off by R2M_NATIVE=off")
    given = os.environ.get("R2M_NATIVE_LIBRARY")
    path = Path(given) if given else Path(__file__).with_name("libr2m_native.so")
    if not path.is_file():
        why = "there is no such file" if given else "this installation has no compiled CPU kernels"
        raise BackendUnavailable(f"the native library '{path}' is missing: {why}")
    _in_use[:] = [(_library(path), environment)]
    return _in_use[0][0]


def loaded() -> Library:
    """The library in use: what the environment says is read when a backend is chosen, not in every call."""
    return _in_use[0][0] if _in_use else load()


def rows_of(tensor: Tensor) -> Tensor:
    """The same matrix with neighbouring elements of a row side by side; a copy where they are not."""
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def flat(tensor: Tensor) -> Tensor:
    """All elements as one row, side by side; a copy where they are not."""
    return rows_of(tensor.reshape(1, -1))


def matrices(tensors: Sequence[Tensor]) -> ctypes.Array[Matrix]:
    """``r2m_matrix`` of 2-D tensors from :func:`rows_of`; the caller keeps the tensors alive."""
    entries = (Matrix * len(tensors))()
    for entry, tensor in zip(entries, tensors, strict=True):
        entry.data, entry.row_stride, entry.dtype = tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype]
    return entries
