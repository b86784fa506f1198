"""Where a network ends: the tensors of its classifier, told by names and shapes alone (README §1).

A classifier is a linear layer, or a convolution of one pixel, whose outputs no later layer takes. Layers are called
``fc`` or ``head`` in many other places, inside attention and squeeze-and-excitation, in pooling and before the last
layer, so that a name alone says little; and files are often sorted by name, so that order says less.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ._stream.tensors import TensorSpec

# A part of a name that is a classifier's wherever it stands, but for a conv_head and a language model's.
_STRONG = re.compile(
    r"heads?|(?!conv_|lm_)\w+_heads?|heads?_\w+|(\w+_)?classif(ier)?(_\w+)?|(last|final)_(linear|layer|fc)|to_logits"
)
# And one that is where nothing takes the outputs.
_WEAK = re.compile(r"_?fc\d?|\w+_fc|linear|logits|score")
# What may follow inside of a classifier.
_AFTER = re.compile(r"\d+|l|mlp|layers|dense|out_proj|projection|conv[123]?d?")
# Where a layer of one of these names is not the last.
_INNER = re.compile(
    r"\w*attn|\w*attention|e?se|se_module|\w*mlp\w*|ffn|rnn\w*|lstm|merger|aux\d|AuxLogits|aux_logits|pre_logits"
)
FEW = 8  # outputs of a classifier that has no such name


class _Layer(NamedTuple):
    path: list[str]  # of the module
    outputs: int
    inputs: int
    word: int | None  # place of the classifier's word in the path


def classifier(specs: Mapping[str, TensorSpec]) -> list[str]:
    """:func:`head_names` of a checkpoint, whose integers are no layers."""
    return head_names({name: spec.shape for name, spec in specs.items() if spec.dtype.is_floating_point})


def head_names(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of the classifier's tensors, its matrices first; none where the network has no classifier.

    Several where it has several, such as a distilled transformer's two. Of a classifier in several layers the last
    alone: what is before it makes features.

    Args:
        shapes: of all tensors by name, in the checkpoint's order.
    """
    layers = {name.removesuffix(".weight"): one for name, shape in shapes.items() if (one := _layer(name, shape))}
    patterns = [re.sub(r"(?<![^.])\d+(?![^.])", "*", module) for module in layers]
    often = Counter(patterns)
    repeated = {module for module, one in zip(layers, patterns, strict=True) if often[one] > 1}
    named = {
        module: one
        for module, one in layers.items()
        if one.word is not None and not (module in repeated and any(map(str.isdigit, one.path[: one.word])))
    }
    takers = _Takers.of(named, shapes)
    found = [module for module, one in named.items() if _is_last(one, takers)]
    if not found:
        found = _unnamed(layers, shapes)
    there = [f"{module}.weight" for module in found] + [f"{module}.bias" for module in found]
    return [name for name in there if name in shapes]


def _layer(name: str, shape: Sequence[int]) -> _Layer | None:
    """A linear layer or a convolution of one pixel that may be the last, by the name of its weight."""
    if not name.endswith(".weight") or len(shape) < 2 or shape[0] == shape[1] or any(size != 1 for size in shape[2:]):
        return None
    path = name.split(".")[:-1]
    word = None
    for place in reversed(range(len(path))):
        if _STRONG.fullmatch(path[place]) or _WEAK.fullmatch(path[place]):
            word = place
        elif not _AFTER.fullmatch(path[place]):
            break
    if any(_INNER.fullmatch(part) for part in path[:word]):
        return None
    return _Layer(path, shape[0], shape[1], word)


class _Takers(NamedTuple):
    """What may take a layer's outputs, by how many there are: a million layers are looked through once.

    Attributes:
        named: numbers of inputs of layers with a classifier's name.
        matrices: and of all tensors.
        norms: number of values → names of such vectors, in alphabetical order.
    """

    named: set[int]
    matrices: set[int]
    norms: dict[int, list[str]]

    @classmethod
    def of(cls, named: Mapping[str, _Layer], shapes: Mapping[str, Sequence[int]]) -> _Takers:
        norms: dict[int, list[str]] = {}
        for name in sorted(name for name, shape in shapes.items() if len(shape) == 1 and name.endswith(".weight")):
            norms.setdefault(shapes[name][0], []).append(name)
        inputs = {shape[1] for shape in shapes.values() if len(shape) > 1}
        return cls({one.inputs for one in named.values()}, inputs, norms)


def _is_last(layer: _Layer, takers: _Takers) -> bool:
    """Whether nothing takes the outputs of a layer with a classifier's name."""
    if layer.outputs in takers.named:
        return False
    assert layer.word is not None
    inside = ".".join([*layer.path[: layer.word + 1], ""])
    strong = any(map(_STRONG.fullmatch, layer.path[layer.word :]))
    norms = takers.norms.get(layer.outputs, [])
    if not strong:
        # Few outputs are as many as a group of channels somewhere has.
        return not norms and not (layer.outputs > FEW and layer.outputs in takers.matrices)
    after = bisect.bisect_left(norms, inside)
    return not (after < len(norms) and norms[after].startswith(inside))


def _unnamed(layers: Mapping[str, _Layer], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The last layer of a sequence without names, if it is one of very few outputs and all else is wider."""
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    few = [module for module, one in layers.items() if one.outputs <= FEW and 8 * one.outputs <= one.inputs]
    return few if len(few) == 1 and matrices[-1] == f"{few[0]}.weight" else []
