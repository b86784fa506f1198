"""Checkpoints as shapes, for :mod:`bench.cost_model`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shapes:
    """A checkpoint as shapes, each shape once."""

    name: str
    matrices: tuple[tuple[int, int, int], ...]  # m, n, how many
    vectors: tuple[tuple[int, int], ...] = ()  # elements, how many

    @classmethod
    def of(cls, name: str, shapes: Iterable[tuple[int, ...]]) -> Shapes:
        """From the shapes of all its tensors; two dimensions or more are a matrix, first dimension × the rest."""
        counted = Counter((s[0], math.prod(s[1:])) if len(s) > 1 else (math.prod(s),) for s in shapes)
        matrices = tuple((key[0], key[1], count) for key, count in counted.items() if len(key) == 2)
        return cls(name, matrices, tuple((key[0], count) for key, count in counted.items() if len(key) == 1))

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(m * n * count for m, n, count in self.matrices) + sum(size * count for size, count in self.vectors)


def _vit(name: str, layers: int, width: int, mlp: int, patch: int, tokens: int, projection: int) -> Shapes:
    """CLIP's vision tower: separate q, k, v and out, biases, a norm before and one after the layers."""
    layer: list[tuple[int, ...]] = [*[(width, width)] * 4, (mlp, width), (width, mlp), *[(width,)] * 9, (mlp,)]
    ends: list[tuple[int, ...]] = [(width, 3, patch, patch), (tokens, width), (projection, width), *[(width,)] * 5]
    return Shapes.of(name, layer * layers + ends)


def _llama(name: str, layers: int, width: int, mlp: int, vocabulary: int) -> Shapes:
    layer: list[tuple[int, ...]] = [*[(width, width)] * 4, *[(mlp, width)] * 2, (width, mlp), (width,), (width,)]
    return Shapes.of(name, [*layer * layers, (vocabulary, width), (vocabulary, width), (width,)])


MODELS = {
    model.name: model
    for model in (
        _vit("vit_b_16", layers=12, width=768, mlp=3072, patch=16, tokens=197, projection=512),
        _vit("vit_l_14", layers=24, width=1024, mlp=4096, patch=14, tokens=257, projection=768),
        _llama("7b", layers=32, width=4096, mlp=11008, vocabulary=32000),
    )
}
