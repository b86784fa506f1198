"""What the merge reads and writes: checkpoints seen as named tensors.

The engine (:mod:`r2m_kernels._stream.engine`) knows two protocols and no storage: a :class:`TensorSource` gives tensors
one at a time, a :class:`TensorSink` takes them one at a time. Dictionaries are served here; files by the
application.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what can be merged


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and so on, as messages and reports say it."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """What these are computed in: float64 where one of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored."""
        return self.numel * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint that is read tensor by tensor, from several threads at once.

    Attributes:
        label: how error messages name the checkpoint: a path as the user gave it, or ``base``, ``expert 'fs'``.
        specs: name → :class:`TensorSpec`, in the checkpoint's own order.
        aliases: name → the earlier name that is the same stored tensor (tied weights); empty where there are none.
    """

    @property
    def label(self) -> str:
        """See the class."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See the class."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """See the class."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, with the shape and dtype of ``specs[name]``. The caller does not modify it."""
        ...


@runtime_checkable
class PartialSource(TensorSource, Protocol):
    """A checkpoint that also gives parts of a tensor, so that one larger than memory can be merged."""

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor: (stop − start,), in its dtype."""
        ...


class TensorSink(Protocol):
    """Takes the merged tensors, in any order and from several threads at once."""

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Called once, before the first write, with every tensor to come in output order."""
        ...

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; its shape and dtype are those announced."""
        ...


@runtime_checkable
class PartialSink(TensorSink, Protocol):
    """Also takes a tensor in parts, which together are the whole."""

    def write_elements(self, name: str, start: int, elements: Tensor) -> None:
        """Store a run of the flattened tensor, from element ``start`` on; its dtype is the one announced."""
        ...


class StateDictSource:
    """A state dict as a :class:`TensorSource`; tensors are handed out as they are, without a copy."""

    def __init__(self, label: str, state_dict: Mapping[str, Tensor]) -> None:
        self.label = label
        self._tensors = {name: tensor.detach() for name, tensor in state_dict.items()}
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }
        self.aliases: Mapping[str, str] = _shared_storage(self._tensors)
        self.devices = {name: tensor.device for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor itself, detached."""
        return self._tensors[name]

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """A run of its elements; a view where they lie side by side."""
        tensor = self._tensors[name]
        if tensor.is_contiguous():
            return tensor.view(-1)[start:stop]
        rest = max(1, tensor[0].numel())  # rows that hold the run, and not the whole, are copied
        first = start // rest
        rows = tensor[first : -(-stop // rest)].reshape(-1)
        return rows[start - first * rest : stop - first * rest]


class StateDictSink:
    """Collects the merged tensors in :attr:`state_dict`, in the announced order.

    Args:
        devices: name → device of the output; CPU where a name is absent.
        aliases: name → the name it is tied to: both become one tensor.
    """

    def __init__(
        self, devices: Mapping[str, torch.device] | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self._devices = devices or {}
        self._aliases = aliases or {}
        self._specs: Mapping[str, TensorSpec] = {}
        self._tensors: dict[str, Tensor | None] = {}
        self._lock = threading.Lock()

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Lay down the keys."""
        # Keys come first, so that their order does not depend on which thread finishes first.
        self._specs, self._tensors = specs, dict.fromkeys(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep the tensor, on the device its name asks for; a tied name comes after the one it is tied to."""
        first = self._tensors.get(self._aliases.get(name, name))
        device = self._devices.get(name, torch.device("cpu"))
        self._tensors[name] = tensor.to(device) if first is None or first.device != device else first

    def write_elements(self, name: str, start: int, elements: Tensor) -> None:
        """Keep a run; the tensor is laid down with its first one."""
        with self._lock:
            whole = self._tensors[name]
            if whole is None:
                first = self._tensors.get(self._aliases.get(name, name))
                device = self._devices.get(name, torch.device("cpu"))
                if first is not None and first.device == device:
                    whole = first
                else:
                    whole = torch.empty(self._specs[name].shape, dtype=self._specs[name].dtype, device=device)
                self._tensors[name] = whole
        whole.view(-1)[start : start + elements.numel()] = elements

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The merged tensors; complete once the merge has returned."""
        return {name: tensor for name, tensor in self._tensors.items() if tensor is not None}


def _shared_storage(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases
