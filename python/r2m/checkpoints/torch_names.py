"""What the names in a file of ``torch.save`` stand for: tensors and what else is harmless, as descriptions.

Nothing is imported or called by name. What is not known here is refused: who loads such a file elsewhere runs it.

Reference: ``torch._utils``, ``torch.serialization``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from r2m.checkpoints.pickles import Refused, put

_MOST_DIMENSIONS = 64  # of a tensor; torch's own bound
_MOST_ARGUMENTS = 16  # of a call

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "Untyped": torch.uint8,
}
_REBUILT = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3")}
_PARAMETERS = {f"torch._utils._rebuild_parameter{kind}" for kind in ("", "_with_state")}
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
# What else is rebuilt, and what it is: no weight can be taken from it.
_STRANGE = {
    "torch._utils._rebuild_sparse_tensor": "one of torch.{0}",
    "torch._utils._rebuild_meta_tensor_no_storage": "one without data",
    "torch._utils._rebuild_qtensor": "a quantized one",
    "torch._utils._rebuild_nested_tensor": "a nested one",
}
_ENCODE = "_codecs.encode"
_ORDERED = "collections.OrderedDict"
# Whose results are of no interest, and which do nothing where they are loaded.
_HARMLESS = {
    _ENCODE,
    _ORDERED,
    "collections.Counter",
    "collections.defaultdict",
    "torch.Tensor",
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.serialization._get_layout",
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"{place}.{kind}" for place in ("builtins", "__builtin__") for kind in ("set", "frozenset", "complex", "slice")),
    *(f"{place}.{kind}" for place in ("builtins", "__builtin__") for kind in ("dict", "list", "int", "float", "str")),
    *(f"pathlib.{kind}Path" for kind in ("", "Posix", "PurePosix", "Windows", "PureWindows")),
    *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
}
_KNOWN = {*_REBUILT, *_PARAMETERS, _OF_TYPE, *_STRANGE, *_HARMLESS}


@dataclass(frozen=True, slots=True)
class Named:
    """Something of a module, by its name alone."""

    name: str


@dataclass(frozen=True, slots=True)
class Called:
    """What a harmless call would give."""

    name: str
    word: str = ""  # its first argument, where that is a text


@dataclass(frozen=True, slots=True)
class Storage:
    """What tensors lie in.

    Attributes:
        dtype: of what it is counted in.
        key: tells it from others of the file.
        first: where in the file's storage of that key it begins.
    """

    dtype: torch.dtype
    key: str
    first: int


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor.

    Attributes:
        strange: what it is, where it is no plain tensor; then the rest says nothing.
        dtype, shape, strides: its own; in elements.
        key: of its storage.
        offset: of its first element in that, in bytes.
    """

    strange: str
    dtype: torch.dtype = torch.uint8
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    key: str = ""
    offset: int = 0


class TorchNames:
    """What a pickle's names stand for, as :func:`r2m.checkpoints.pickles.read` asks for it.

    Args:
        most: entries that lists may have which are copied: their pickle's bytes.

    Attributes:
        storages: key of each that was named → the type it is counted in.
    """

    def __init__(self, most: int) -> None:
        self.storages: dict[str, torch.dtype] = {}
        self._left = most

    def named(self, module: str, name: str) -> Any:
        """A type as it is, a function or class by its name."""
        whole = f"{module}.{name}"
        if name.endswith("Storage") and module in ("torch", "torch.storage", "torch.cuda"):
            dtype = _STORAGES.get(name.removesuffix("Storage"))
            if dtype is not None:
                return dtype
        of_torch = getattr(torch, name, None) if module == "torch" else None
        if isinstance(of_torch, torch.dtype | torch.qscheme):
            return of_torch
        if whole not in _KNOWN:
            raise Refused(f"names {whole}", program=whole)
        return Named(whole)

    def called(self, function: Any, arguments: Any) -> Any:
        """What a call would give, described."""
        if not isinstance(function, Named) or not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            raise TypeError
        name = function.name
        if name == _OF_TYPE:
            function, kind, arguments, *_ = arguments
            if not isinstance(kind, Named) or function == Named(_OF_TYPE):
                raise TypeError
            return self.called(function, arguments)
        if name in _REBUILT:
            return _rebuilt(arguments, typed=name.endswith("v3"))
        if name in _PARAMETERS or name == "torch.Size":
            return arguments[0]
        if name in _STRANGE:
            layout = arguments[0].word.removeprefix("torch.") if isinstance(arguments[0], Called) else ""
            return Described(_STRANGE[name].format(layout))
        if name == _ORDERED:
            return self._ordered(*arguments)
        if name == _ENCODE and arguments[1:] != ("latin1",):
            raise Refused("encodes texts", program=_ENCODE)
        return Called(name, arguments[0] if arguments and isinstance(arguments[0], str) else "")

    def stored(self, identity: Any) -> Storage:
        """A storage, or a view of one as files from before torch 1.6 have it."""
        if not isinstance(identity, tuple) or len(identity) > _MOST_ARGUMENTS:
            raise TypeError
        kind, dtype, key, _, count, *more = identity
        view = more[0] if more else None
        whole = isinstance(dtype, torch.dtype) and isinstance(key, str) and isinstance(count, int)
        if kind != "storage" or not whole:
            raise TypeError
        if self.storages.setdefault(key, dtype) != dtype:
            raise Refused("names a storage of two types")
        return Storage(dtype, key, 0 if view is None else view[1])

    def _ordered(self, pairs: Any = ()) -> dict[Any, Any]:
        """An OrderedDict of pairs, as Python 2 has them. Only here one list may be copied many times."""
        self._left -= len(pairs)
        if self._left < 0:
            raise Refused("says much more than it holds")
        values: dict[Any, Any] = {}
        for name, value in pairs:
            put(values, name, value)
        return values


def _rebuilt(arguments: tuple[Any, ...], *, typed: bool) -> Described:
    storage, offset, shape, strides, *more = arguments
    dtype = more[2] if typed else storage.dtype
    metadata = more[3 if typed else 2 :]
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise TypeError
    if max(len(shape), len(strides)) > _MOST_DIMENSIONS or len(shape) != len(strides):
        raise ValueError
    numbers = (storage.first, offset, *shape, *strides)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError
    if metadata and metadata[0]:
        return Described("a conjugate or negative view")
    first = storage.first * storage.dtype.itemsize + offset * dtype.itemsize
    return Described("", dtype, tuple(shape), tuple(strides), storage.key, first)
