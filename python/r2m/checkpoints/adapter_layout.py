"""What of a model adapters of PEFT carry, from names and shapes alone: by factors, whole, or not at all.

A module is known by the names of its tensors: ``blocks.0.attn.qkv`` by ``blocks.0.attn.qkv.weight``.

Reference: ``peft.tuners.lora.layer``, ``peft.utils.other._set_trainable`` 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from r2m_kernels.streaming import TensorSpec

WEIGHT, BIAS, IN_PROJECTION = ".weight", ".bias", ".in_proj_weight"
OUT_PROJECTION = ".out_proj"
_EMBEDDING = re.compile(r"emb(ed(ding)?s?)?$|^w[tp]e$", re.IGNORECASE)
_IMAGE_CHANNELS = 3
# A convolution with so many times fewer inputs than outputs is taken for a grouped one.
_GROUPED = 16
# Layers without a bias are saved whole, so that all others may have theirs, where they are at most this share.
_FEW = 1 / 20


@dataclass(frozen=True)
class Layout:
    """What becomes of a model's tensors.

    Attributes:
        targets: module → its weight's name, of those whose change is a product.
        biased: whether their biases are changed, too.
        saved: module → its tensors, which are saved whole: PEFT asks for all of them.
        averaged: tensors in which adapters differ from their experts: they are the model's.
    """

    targets: Mapping[str, str]
    biased: bool = False
    saved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()


def layers(specs: Mapping[str, TensorSpec], matrices: Iterable[str]) -> dict[str, str]:
    """Module → weight, of the matrices that PEFT changes by factors.

    Of PyTorch's attention it changes both projections, at one rank, or none.

    Args:
        specs: all tensors of the model.
        matrices: names of some.
    """
    found = {_module(name): name for name in matrices if _is_layer(name, specs[name])}
    pairs = {module: _attention(module, specs) for module in found}
    return {module: name for module, name in found.items() if pairs[module] <= found.keys()}


def carrying_biases(specs: Mapping[str, TensorSpec], targets: Mapping[str, str]) -> dict[str, str]:
    """The layers of which an adapter has factors, such that it has biases, too.

    It has them on all of its layers or on none. Layers without are left out where they are few.
    """
    without = {module: name for module, name in targets.items() if not _has_bias(module, specs)}
    numbers, all_numbers = (sum(specs[name].numel for name in one.values()) for one in (without, targets))
    few = numbers <= _FEW * all_numbers
    return {module: name for module, name in targets.items() if not few or module not in without}


def changed_layers(
    specs: Mapping[str, TensorSpec], targets: Mapping[str, str], changed: Collection[str]
) -> dict[str, str]:
    """The layers whose weight is one of those that changed, or the other projection's of their attention is."""
    names = {module: {name, *(targets[one] for one in _attention(module, specs))} for module, name in targets.items()}
    return {module: name for module, name in targets.items() if names[module] & {*changed}}


def layout(
    specs: Mapping[str, TensorSpec],
    targets: Mapping[str, str],
    moved: Collection[str],
    shared: Collection[str] = (),
) -> Layout:
    """All of it.

    Args:
        specs: all tensors of the model.
        targets: of :func:`layers`.
        moved: tensors other than the targets' weights in which experts differ.
        shared: for whose sake no module is saved.
    """
    biased = all(_has_bias(module, specs) for module in targets)
    biased = biased and any(module + BIAS in moved for module in targets)
    carried = {*targets.values(), *(module + BIAS for module in targets if biased)}
    rest = {name: _module(name) for name in moved if name not in carried}
    modules = {module for name in specs for module in _above(name)}
    kept = {module for target in targets for module in _above(f"{target}.")}  # that hold an adapted layer
    saved = {module for name, module in rest.items() if module and module not in kept and name not in shared}
    while True:
        saved = {module for module in saved if not saved & {*_above(module)}}
        # PEFT wraps every module whose name ends as one that is saved.
        alike = {one: {other for other in modules if other.endswith(one) and other != one} for one in saved}
        inside = {one for one in modules if saved & {*_above(one)}}
        refused = {one for one, others in alike.items() if others & (kept | inside)}
        more = {other for one in saved - refused for other in alike[one]} | (saved - refused)
        if more == saved:
            break
        kept, saved = kept | refused, more - refused
    of_saved = {module: tuple(name for name in specs if name.startswith(f"{module}.")) for module in sorted(saved)}
    whole = {name for names in of_saved.values() for name in names}
    return Layout(targets, biased, of_saved, tuple(name for name in rest if name not in whole))


def of_norms(specs: Mapping[str, TensorSpec]) -> set[str]:
    """The tensors of modules that hold vectors and numbers alone."""
    matrices = {_module(name) for name, spec in specs.items() if len(spec.shape) > 1}
    return {name for name in specs if _module(name) not in matrices}


def together(targets: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The targets' weights, those of which PEFT has one rank side by side: both projections of PyTorch's attention."""
    second = {one + OUT_PROJECTION: one for one, name in targets.items() if name.endswith(IN_PROJECTION)}
    groups: dict[str, tuple[str, ...]] = {}
    for module, name in targets.items():
        first = second.get(module, module)
        groups[first] = (*groups.get(first, ()), name)
    return list(groups.values())


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _attention(module: str, specs: Mapping[str, TensorSpec]) -> set[str]:
    """Both projections, where a module is one of PyTorch's attention."""
    whole = module.removesuffix(OUT_PROJECTION)
    return {whole, whole + OUT_PROJECTION} if whole + IN_PROJECTION in specs else set()


def _has_bias(module: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether PEFT can change a layer's bias."""
    return module + BIAS in specs and not _attention(module, specs)


def _above(name: str) -> list[str]:
    """The modules that a name lies in, the innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _is_layer(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is the weight of a linear layer or of a convolution of one group."""
    module, dimensions = _module(name), len(spec.shape)
    if name.endswith(IN_PROJECTION):
        return dimensions == 2
    if not name.endswith(WEIGHT) or not module or not 2 <= dimensions <= 5:
        return False
    if dimensions == 2:
        return not _EMBEDDING.search(module.rpartition(".")[2])
    outputs, inputs = spec.shape[:2]
    grouped = inputs == 1 or (outputs > _GROUPED * inputs and inputs != _IMAGE_CHANNELS)
    return not (grouped and math.prod(spec.shape[2:]) > 1)
