"""What tensors mean beside their numbers, told by names, shapes and dtypes (README §1).

The integers of a quantised weight mean nothing without the scales beside them, and a weight under weight_norm or
spectral_norm is a function of several tensors. Merged one by one they are another layer than the merge of the weights,
and nothing about the result shows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ._stream.tensors import TensorSpec
from .errors import quoted


class Composite(NamedTuple):
    """A weight that is stored as something else than its numbers.

    Attributes:
        names: of its tensors, the main one first.
        sentence: what they are, what to bring instead.
    """

    names: tuple[str, ...]
    sentence: str


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

# torch.nn.utils.parametrize; original0 and so on where the weight is made from several.
_PARAMETRIZED = "parametrizations."
_PREFIX = re.compile(r"((?:.*\.)?parametrizations\.[^.]+\.)")


def composites(tensors: Mapping[str, TensorSpec]) -> Iterator[Composite]:
    """Weights that must not be merged tensor by tensor.

    Args:
        tensors: all of a checkpoint, by name.
    """
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if _PARAMETRIZED in name and (match := _PREFIX.match(name)):
            groups.setdefault(match[1], []).append(name)
    for name, spec in tensors.items():
        found = (
            None if spec.dtype.is_floating_point else _quantised(name, tensors),
            _normalised(name, tensors) if name.endswith(("_orig", "_v")) else None,
            _parametrized(name, groups) if _PARAMETRIZED in name else None,
        )
        yield from filter(None, found)


def _quantised(name: str, tensors: Mapping[str, TensorSpec]) -> Composite | None:
    if tensors[name].dtype.is_floating_point or len(tensors[name].shape) < 2:
        return None
    packed = next((ending for ending in _PACKED if name == ending or name.endswith("." + ending)), None)
    if packed is None:
        return None
    module = name.removesuffix(packed)
    beside = next(
        ((module + scale, whose) for one, scale, whose in QUANTISED if one == packed and module + scale in tensors),
        None,
    )
    scales, whose = beside or ("", "")
    how = f" by {whose}, which {quoted(scales)} scales" if beside else ""
    return Composite(
        (name, scales) if beside else (name,),
        f"{quoted(name)} holds the integers of a quantised weight{how}; expected floating-point numbers: dequantise it "
        "first, or take the checkpoint that it was made from",
    )


def _normalised(name: str, tensors: Mapping[str, TensorSpec]) -> Composite | None:
    """``weight_norm`` and ``spectral_norm`` as hooks: NAME_g and NAME_v, NAME_orig and NAME_u."""
    if name.endswith("_orig") and (vector := name.removesuffix("orig") + "u") in tensors:
        return _function((name, vector), "spectral_norm", "remove_spectral_norm")
    length = name.removesuffix("v") + "g"
    if not name.endswith("_v") or length not in tensors:
        return None
    shape, lengths = tensors[name].shape, tensors[length].shape
    # One length for all of it, or for each index of one dimension.
    kept = [size for size, one in zip(shape, lengths, strict=False) if size == one != 1]
    plain = all(one in (1, size) for size, one in zip(shape, lengths, strict=False))
    if lengths and not (len(lengths) == len(shape) and plain and len(kept) <= 1):
        return None
    return _function((length, name), "weight_norm", "remove_weight_norm")


def _parametrized(name: str, groups: Mapping[str, Sequence[str]]) -> Composite | None:
    prefix = name.removesuffix("0").removesuffix("original")
    if prefix not in groups or not name.startswith(f"{prefix}original"):
        return None
    others = tuple(other for other in groups[prefix] if other != name)
    kinds = {"weight_norm": f"{prefix}original1", "spectral_norm": f"{prefix}0._u"}
    how = next((kind for kind, sign in kinds.items() if sign in others), "a parametrization")
    return _function((name, *others), how, "parametrize.remove_parametrizations")


def _function(names: tuple[str, ...], how: str, remover: str) -> Composite:
    several = f"{quoted(names[0])} and {quoted(names[1])} are" if len(names) > 1 else f"{quoted(names[0])} is"
    return Composite(
        names,
        f"{several} a weight under {how}, which is no linear function of them; expected the weight itself: "
        f"torch.nn.utils.{remover} before it is saved",
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
