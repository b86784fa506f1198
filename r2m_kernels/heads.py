"""Where a network ends: the tensors of its classifier, told by names and shapes alone (README §1).

A classifier is a linear layer, or a convolution of one pixel, whose outputs no later layer takes. Layers are called
``fc`` or ``head`` in many other places, inside attention and squeeze-and-excitation, in pooling and before the last
layer, so that a name alone says little; and files are often sorted by name, so that order says less.
"""

from __future__ import annotations

import bisect
import functools
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

    @property
    def is_few(self) -> bool:
        """Whether it makes very few numbers of many."""
        return self.outputs <= FEW and 8 * self.outputs <= self.inputs


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
    named: dict[str, _Layer] = {}
    few: list[str] = []  # modules of very few outputs
    for name, shape in shapes.items():  # a million of them: what is nobody's head is let go at once
        if (one := _layer(name, shape)) is None:
            continue
        if one.word is not None:
            named[name.removesuffix(".weight")] = one
        if one.is_few:
            few.append(name.removesuffix(".weight"))
    patterns = {module: re.sub(r"(?<![^.])\d+(?![^.])", "*", module) for module in named}
    often = Counter(patterns.values())
    named = {
        module: one
        for module, one in named.items()
        if not (often[patterns[module]] > 1 and any(map(str.isdigit, one.path[: one.word])))
    }
    takers = _Takers.of(named, shapes) if named else None
    found = [module for module, one in named.items() if takers and _is_last(one, takers)]
    if not found:
        found = _unnamed(few, shapes)
    there = [f"{module}.weight" for module in found] + [f"{module}.bias" for module in found]
    return [name for name in there if name in shapes]


def _layer(name: str, shape: Sequence[int]) -> _Layer | None:
    """A linear layer or a convolution of one pixel that may be the last, by its weight's name or few outputs."""
    if len(shape) < 2 or shape[0] == shape[1] or not name.endswith(".weight"):
        return None
    if len(shape) > 2 and any(size != 1 for size in shape[2:]):
        return None
    path, word = name.split(".")[:-1], None
    for place in reversed(range(len(path))):
        meaning = _meaning(path[place])
        if meaning.word:
            word = place
        elif not meaning.after:
            break
    one = _Layer(path, shape[0], shape[1], word)
    if (word is None and not one.is_few) or any(_meaning(part).inner for part in path[:word]):
        return None
    return one


class _Meaning(NamedTuple):
    """What a part of a name can be."""

    word: bool
    after: bool
    inner: bool


@functools.lru_cache(maxsize=4096)  # a million names are made of few parts
def _meaning(part: str) -> _Meaning:
    word = bool(_STRONG.fullmatch(part) or _WEAK.fullmatch(part))
    return _Meaning(word, bool(_AFTER.fullmatch(part)), bool(_INNER.fullmatch(part)))


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


def _unnamed(few: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The last layer of a sequence without names, if it is one of very few outputs and all else is wider."""
    last = next(name for name in reversed(list(shapes)) if len(shapes[name]) > 1) if len(few) == 1 else ""
    return list(few) if last and last == f"{few[0]}.weight" else []
