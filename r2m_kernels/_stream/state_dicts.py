"""State dicts and modules as sources of tensors, and a sink that makes a state dict."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import BadOption, quoted
from .plan import Plan
from .tensors import TensorSource, TensorSpec

logger = logging.getLogger(__name__)
Checkpoint = Mapping[str, Tensor] | nn.Module | TensorSource
Experts = Mapping[str, Checkpoint] | Sequence[Checkpoint]


def open_checkpoints(base: Checkpoint, experts: Experts) -> tuple[TensorSource, dict[str, TensorSource]]:
    """The base and the experts by name; those of a sequence are called ``expert0`` and so on.

    Raises:
        BadOption: one of them is no checkpoint.
    """
    if not isinstance(experts, Mapping | Sequence) or isinstance(experts, str):
        raise BadOption(f"experts: expected a sequence or a mapping by name, got {type(experts).__name__}")
    named = experts if isinstance(experts, Mapping) else {f"expert{i}": item for i, item in enumerate(experts)}
    source = open_checkpoint("base", base)
    opened = {name: open_checkpoint(f"expert {quoted(name)}", item) for name, item in named.items()}
    return source, {name: _named_as(source, item) for name, item in opened.items()}


def open_checkpoint(label: str, checkpoint: Checkpoint) -> TensorSource:
    """A checkpoint as a source that error messages call ``label``.

    Raises:
        BadOption: it is none, or holds what is no dense tensor.
    """
    if isinstance(checkpoint, nn.Module):
        checkpoint = checkpoint.state_dict()
    if not isinstance(checkpoint, Mapping):
        if isinstance(checkpoint, TensorSource):
            return checkpoint
        raise BadOption(f"{label}: expected a state dict, a module or a TensorSource, got {type(checkpoint).__name__}")
    wrong = next((key for key, value in checkpoint.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise BadOption(
            f"{label}: expected a state dict of tensors, got {type(checkpoint[wrong]).__name__} for {wrong!r}"
        )
    for name, tensor in checkpoint.items():
        if not isinstance(name, str):
            raise BadOption(f"{label}: expected names of tensors, got {name!r}")
        if tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
            kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
            kind = "that is nested" if tensor.is_nested else kind
            raise BadOption(f"{label}: expected dense tensors with data, got {quoted(name)} {kind}")
    return StateDictSource(label, checkpoint)


def _named_as(base: TensorSource, expert: TensorSource) -> TensorSource:
    """An expert under the base's names, where wrappers alone tell them apart, such as ``torch.compile`` adds."""
    if not (isinstance(base, StateDictSource) and isinstance(expert, StateDictSource)):
        return expert
    if expert.specs.keys() <= base.specs.keys():
        return expert
    known = {plain: name for name, plain in _without_wrappers(base.specs).items()}
    names = {name: known.get(plain, plain) for name, plain in _without_wrappers(expert.specs).items()}
    fewer = len({*names.values()} & base.specs.keys()) <= len(expert.specs.keys() & base.specs.keys())
    if fewer or len({*names.values()}) < len(names):
        return expert
    first = next(name for name, new in names.items() if new != name)
    note = f"{expert.label}: named as a compiled or parallel module has it, {quoted(first)} taken as "
    renamed = StateDictSource(expert.label, {new: expert.read(name) for name, new in names.items()})
    renamed.differentiated = expert.differentiated
    renamed.notes = (f"{note}{quoted(names[first])}",)
    logger.info("%s", renamed.notes[0])
    return renamed


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Name → what it is in the module that is wrapped: without ``_orig_mod.``, and ``module.`` before all of them."""
    plain = {name: ".".join(part for part in name.split(".") if part != "_orig_mod") for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: inner.removeprefix("module.") for name, inner in plain.items()}
    return plain


def device_of(source: TensorSource, plan: Plan) -> torch.device:
    """Where the first planned tensor of a state dict lies; the CPU for other sources."""
    if isinstance(source, StateDictSource):
        for tensor in plan.tensors:
            if tensor.name in source.devices:
                return source.devices[tensor.name]
    return torch.device("cpu")


class StateDictSource:
    """A state dict as a :class:`TensorSource`; tensors are handed out as they are, without a copy.

    Attributes:
        differentiated: the first tensor that requires gradients, which end here; ``None``: none does.
    """

    def __init__(self, label: str, state_dict: Mapping[str, Tensor]) -> None:
        self.label = label
        self.differentiated = next((name for name, tensor in state_dict.items() if tensor.requires_grad), None)
        self.notes: tuple[str, ...] = ()  # on what was understood in another way than it was given
        self._tensors = {
            name: tensor.detach() if tensor.requires_grad else tensor for name, tensor in state_dict.items()
        }
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }
        self.aliases: Mapping[str, str] = _shared_storage(self._tensors)
        self.devices = {name: tensor.device for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor itself, without its history."""
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

    def device_of(self, name: str) -> torch.device:
        """Where a tensor is to be."""
        return self._devices.get(name, torch.device("cpu"))

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep the tensor, on the device its name asks for; a tied name comes after the one it is tied to."""
        first, device = self._tensors.get(self._aliases.get(name, name)), self.device_of(name)
        self._tensors[name] = tensor.to(device) if first is None or first.device != device else first

    def write_elements(self, name: str, start: int, elements: Tensor) -> None:
        """Keep a run; the tensor is laid down with its first one."""
        with self._lock:
            whole = self._tensors[name]
            if whole is None:
                first, device = self._tensors.get(self._aliases.get(name, name)), self.device_of(name)
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
