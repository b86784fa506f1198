"""What tensors mean beside their numbers, told by names, shapes and dtypes (README §1).

The integers of a quantised weight mean nothing without the scales beside them, and a weight under weight_norm or
spectral_norm is a function of several tensors. Merged one by one they are another layer than the merge of the weights,
and nothing about the result shows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import torch

from ._stream.tensors import TensorSpec
from .errors import quoted


class Composite(NamedTuple):
    """A weight that is stored as something else than its numbers.

    Attributes:
        names: of its tensors, the main one first.
        sentence: what they are, what to bring instead.
        quantised: whether its numbers mean nothing without others, in whatever dtype they are.
    """

    names: tuple[str, ...]
    sentence: str
    quantised: bool = False


# Where a quantised weight's integers are, where its scales, beside each other; whose way that is.
QUANTISED = (
    ("qweight", "scales", "GPTQ or AWQ"),
    ("weight", "weight.absmax", "bitsandbytes in 4 bits"),
    ("weight", "SCB", "bitsandbytes in 8 bits"),
    ("weight_packed", "weight_scale", "compressed-tensors"),
    ("weight", "weight_scale", "compressed-tensors or torchao"),
    ("weight", "weight_scale_inv", "8-bit floating point in blocks"),
    ("weight", "weight_scales", "EETQ"),
    ("weight", "scales", "MLX"),
    ("weight._data", "weight._scale", "quanto"),
    ("W_q", "meta", "HQQ"),
)
# Integers of two dimensions under these names are a weight's, whatever stands beside them.
_PACKED = tuple(dict.fromkeys(packed for packed, _, _ in QUANTISED))
# Under other names they are where their module has what makes numbers of them: AQLM, EXL2, Marlin, MXFP4, VPTQ, …
_SCALE = re.compile(
    r"\w*(scales?(_inv|_\d+)?|absmax|codebooks?|centroids|zero_?points?|zeros|lut)|scale_\w+|SCB|S[UV]|s"
)
_INDEX = re.compile(r"\w*(ids|index|indices|mask|bias)")  # but for what is no weight anywhere

# torch.nn.utils.parametrize; original0 and so on where the weight is made from several.
_PARAMETRIZED = "parametrizations."
_ABSMAX = ".absmax"  # of bitsandbytes, beside a weight
_HOOKED = ("_v", "_u", "_mask", "sv0", ".u")
# What is beside a weight under a hook, the weight, how that is, and what undoes it.
_HOOKS = (
    ("_u", "_orig", "spectral_norm", "torch.nn.utils.remove_spectral_norm"),
    ("_u", "_bar", "spectral_norm", "its quotient by the norm"),
    ("sv0", "weight", "spectral_norm", "its quotient by the norm"),
    (".u", ".weight", "spectral_norm", "its quotient by the norm"),
    ("_mask", "_orig", "pruning", "torch.nn.utils.prune.remove"),
)
_PREFIX = re.compile(r"((?:.*\.)?parametrizations\.[^.]+\.)")

# Factors of an update that was never added to its weight: of LoRA by whoever wrote it, LoKr and LoHa.
_FACTOR = re.compile(
    r"(.*\.)?(lora_(A|B|down|up|mid|embedding_[AB]|magnitude_vector)|lokr_[wt]\d\w*|hada_[wt]\d\w*)(\..*)?"
)


def composites(tensors: Mapping[str, TensorSpec]) -> Iterator[Composite]:
    """Weights that must not be merged tensor by tensor.

    Args:
        tensors: all of a checkpoint, by name.
    """
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if _PARAMETRIZED in name and (match := _PREFIX.match(name)):
            groups.setdefault(match[1], []).append(name)
    # Integers in a row may be a weight's if their name says so: bits that were packed without a shape.
    whole = [
        name
        for name, spec in tensors.items()
        if _packs(spec.dtype) and (len(spec.shape) > 1 or (spec.shape and name.endswith(_PACKED)))
    ]
    # What four bits are packed into may be a type of any width.
    stored = (name.removesuffix(_ABSMAX) for name in tensors if name.endswith(_ABSMAX))
    whole += [name for name in stored if name in tensors and not _packs(tensors[name].dtype)]
    scales = _scales(tensors, {name.rpartition(".")[0] for name in whole}) if whole else {}
    quantised = {name: _quantised(name, tensors, scales) for name in whole}
    for name in tensors:  # of a million hardly any is one: little is done for each
        if (one := quantised.get(name)) is not None:
            yield one
        if name.endswith(_HOOKED) and (one := _normalised(name, tensors)) is not None:
            yield one
        if _PARAMETRIZED in name and (one := _parametrized(name, groups)) is not None:
            yield one
        if ("lora_" in name or "lokr_" in name or "hada_" in name) and (one := _factor(name)) is not None:
            yield one


def _packs(dtype: torch.dtype) -> bool:
    """Whether a type is one that weights are quantised to: integers, and floats of a byte."""
    return not dtype.is_complex and (not dtype.is_floating_point or dtype.itemsize == 1)


def _scales(tensors: Iterable[str], modules: Set[str]) -> dict[str, str]:
    """What may scale integers: a tensor of each of these modules that has one."""
    found: dict[str, str] = {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        if module in modules and _SCALE.fullmatch(last):
            found.setdefault(module, name)
    return found


def _quantised(name: str, tensors: Mapping[str, TensorSpec], others: Mapping[str, str]) -> Composite | None:
    """Integers that are a weight's, by their name or by a scale in their module, which ``others`` has.

    Floats of a byte may be a weight as it is: there a scale beside them has to say so.
    """
    packed = next((ending for ending in _PACKED if name == ending or name.endswith("." + ending)), None)
    module, _, last = name.rpartition(".")
    dtype, scales, whose = tensors[name].dtype, "", ""
    if packed is not None:
        start = name.removesuffix(packed)
        beside = ((start + scale, f" by {whose}") for one, scale, whose in QUANTISED if one == packed)
        scales, whose = next((one for one in beside if one[0] in tensors), ("", ""))
    if packed is None or ((dtype.is_floating_point or len(tensors[name].shape) == 1) and not scales):
        scales = others.get(module, name)
        counts = dtype is torch.int64 and (len(tensors[name].shape) == 1 or "weight" not in last)
        if counts or dtype is torch.bool or _INDEX.fullmatch(last) or scales == name:
            return None
    numbers = "integers" if not dtype.is_floating_point else "floats of a byte" if dtype.itemsize == 1 else "bits"
    how = f"{whose}, which {quoted(scales)} scales" if scales else ""
    return Composite(
        (name, scales) if scales else (name,),
        f"{quoted(name)} holds the {numbers} of a quantised weight{how}; expected floating-point numbers: dequantise "
        "it first, or take the checkpoint that it was made from",
        quantised=True,
    )


def _normalised(name: str, tensors: Mapping[str, TensorSpec]) -> Composite | None:
    """Weights under hooks: NAME_g and NAME_v of ``weight_norm``, and :data:`_HOOKS`."""
    for beside, main, how, todo in _HOOKS:
        weight = name.removesuffix(beside) + main
        if name.endswith(beside) and weight in tensors:
            return _function((weight, name), how, todo)
    length = name.removesuffix("v") + "g"
    if not name.endswith("_v") or length not in tensors:
        return None
    shape, lengths = tensors[name].shape, tensors[length].shape
    # One length for all of it, or for each index of one dimension; these may be a vector.
    kept = [size for size, one in zip(shape, lengths, strict=False) if size == one != 1]
    plain = all(one in (1, size) for size, one in zip(shape, lengths, strict=False))
    vector = len(lengths) == 1 and lengths[0] in (1, *shape)
    if lengths and not vector and not (len(lengths) == len(shape) and plain and len(kept) <= 1):
        return None
    return _function((length, name), "weight_norm", "torch.nn.utils.remove_weight_norm")


def _parametrized(name: str, groups: Mapping[str, Sequence[str]]) -> Composite | None:
    prefix = name.removesuffix("0").removesuffix("original")
    if prefix not in groups or not name.startswith(f"{prefix}original"):
        return None
    others = tuple(other for other in groups[prefix] if other != name)
    kinds = {"weight_norm": f"{prefix}original1", "spectral_norm": f"{prefix}0._u"}
    how = next((kind for kind, sign in kinds.items() if sign in others), "a parametrization")
    return _function((name, *others), how, "torch.nn.utils.parametrize.remove_parametrizations")


def _factor(name: str) -> Composite | None:
    if not _FACTOR.fullmatch(name):
        return None
    return Composite(
        (name,),
        f"{quoted(name)} is a factor of an adapter's update, and products of means are no mean of products; expected "
        "whole weights: merge the adapter into its base first (merge_and_unload), or give PEFT's directory of it",
    )


def _function(names: tuple[str, ...], how: str, todo: str) -> Composite:
    several = f"{quoted(names[0])} and {quoted(names[1])} are" if len(names) > 1 else f"{quoted(names[0])} is"
    return Composite(
        names,
        f"{several} a weight under {how}, which is no linear function of them; expected the weight itself: "
        f"{todo} before it is saved",
    )


Kept = Callable[[Sequence[str]], bool]


def refusal(label: str, tensors: Mapping[str, TensorSpec], kept: Kept) -> str:
    """Why a checkpoint cannot be merged as it stands: a line; empty where nothing is in the way.

    Args:
        label: how messages name the checkpoint.
        tensors: all of it, by name.
        kept: whether tensors of these names are the base's in the result.
    """
    found = [one for one in composites(tensors) if not kept(one.names)]
    if not found:
        return ""
    more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
    return f"{label}: {found[0].sentence}{more}; or keep the base's (keep, --keep)"
