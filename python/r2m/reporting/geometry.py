"""Pictures of a merge itself: how far and how alike its specialists moved, and what truncation kept."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from r2m.reporting.figures import Picture, Rows, bars, bars_size, matrix_picture, picture
from r2m.reporting.matrix import Matrix, number
from r2m.shorten import shorten

_REST = "other"  # kind of a matrix that is no part of a layer
_DEPTH = 4  # components of a name that may count layers


def of_merge(report: Mapping[str, Any]) -> Iterator[Picture]:
    """What a merge's report says of task vectors, core and residuals."""
    names = report["experts"]
    short = shorten(names)
    shown = [short[name] for name in names]
    cosines = report["task_vectors"]["cosines"]
    yield matrix_picture(
        "cosines",
        "How alike the specialists moved",
        "Cosines between their task vectors. Near 1 they learned the same; near 0 they have nothing in common, and "
        "little of what each learned is shared.",
        [{"expert": a, **dict(zip(names, row, strict=True))} for a, row in zip(names, cosines, strict=True)],
        Matrix(shown, shown, cosines, -0.2),
    )
    norms, core = report["task_vectors"]["norms"], report["core"]["coefficients"]
    yield picture(
        "lengths",
        "How far each specialist moved",
        "Lengths of their task vectors. One that is much longer than the others was trained longer or harder, and "
        "leads the core.",
        [{"expert": name, "norm": norms[name]} for name in names],
        [lambda axes: bars(axes, shown, {"": [norms[name] for name in names]}, "‖task vector‖")],
        bars_size(len(names)),
    )
    yield picture(
        "core",
        "Who makes up the shared Real component",
        "Coefficients of the specialists in the core: equal ones share it equally; one alone dominates it.",
        [{"expert": name, "coefficient": core[name]} for name in names],
        [lambda axes: bars(axes, shown, {"": [core[name] for name in names]}, "coefficient in the core")],
        bars_size(len(names)),
    )
    before, scales = report["residual"]["norms"], report["residual"]["scales"]
    if before is not None:
        after = {name: before[name] * scales[name] for name in names}
        where = "in the weights of rows, " if report["config"]["row_power"] > 0 else ""
        series = {title: [of[name] for name in names] for title, of in (("before", before), ("after", after))}
        yield picture(
            "norms",
            "Residuals before and after norm matching",
            f"What each specialist has beyond the core. After matching, {where}all have one norm, so that no forgery "
            "family drowns the others.",
            [{"expert": name, "before": before[name], "after": after[name], "scale": scales[name]} for name in names],
            [lambda axes: bars(axes, shown, series, "‖residual‖")],
            bars_size(len(names), 2),
        )


def of_truncation(report: Mapping[str, Any]) -> Iterator[Picture]:
    """What it kept of residuals; nothing where it kept all."""
    kept = [row for row in report["tensors"] if row["role"] == "matrix" and row.get("kept_energy")]
    if any(value is not None and value < 1 for row in kept for value in row["kept_energy"].values()):
        yield _kept_energy(report["experts"], kept)


def _kept_energy(experts: Sequence[str], kept: Rows) -> Picture:
    place = layers_and_kinds([row["name"] for row in kept])
    layers, kinds = (list(dict.fromkeys(one)) for one in zip(*place.values(), strict=True))
    layers.sort(key=by_number)
    kinds.sort(key=_REST.__eq__)
    short_layers, short_kinds, short = shorten(layers), shorten(kinds), shorten(experts)
    values: list[list[float | None]] = [[None] * len(kinds) for _ in layers]
    titles = {}
    for row in kept:
        at = layers.index(place[row["name"]][0]), kinds.index(place[row["name"]][1])
        known = {name: value for name, value in row["kept_energy"].items() if value is not None}
        values[at[0]][at[1]] = float(np.mean(list(known.values()))) if known else None
        each = ", ".join(f"{short[name]} {number(value)}" for name, value in known.items())
        titles[at] = f"{row['name']}, rank {row['rank']}: {each}"
    return matrix_picture(
        "kept_energy",
        "What truncation kept",
        "The share of the residuals' energy that is left at their rank, on the average of the specialists: a row for "
        "each layer, a column for each kind of matrix. Dark everywhere: residuals are spread over all directions, "
        "mostly noise; bright: a few directions say it all.",
        [{"tensor": row["name"], "rank": row["rank"], **row["kept_energy"]} for row in kept],
        Matrix([short_layers[one] for one in layers], [short_kinds[one] for one in kinds], values, 0.0, titles=titles),
    )


def by_number(name: str) -> list[tuple[int, str]]:
    """By which names are sorted so that layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def layers_and_kinds(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """In which layer each matrix is, and which of its matrices it is; no two matrices are the same of both.

    A layer's name ends with a number. Of the ways to take some numbers in as the layer's and leave others to the kind,
    that one is chosen by which most matrices have their like in other layers and others in theirs, and then the one
    with the fewest kinds.

    Args:
        names: of weights, such as ``blocks.3.attn.qkv.weight``.
    """
    parts = {name: name.removesuffix(".weight").split(".") for name in names}
    splits = [
        {name: split for name, one in parts.items() if (split := _split(one, depth)) is not None}
        for depth in range(1, _DEPTH + 1)
    ]
    best = max(splits, key=_regularity)
    place = {name: best.get(name, (".".join(one), _REST)) for name, one in parts.items()}
    return place if len(set(place.values())) == len(names) else {name: (name, _REST) for name in names}


def _split(parts: Sequence[str], depth: int) -> tuple[str, str] | None:
    numbered = [index for index, part in enumerate(parts[:-1]) if re.search(r"\d$", part)]
    if len(numbered) < depth:
        return None
    end = numbered[depth - 1] + 1
    return ".".join(parts[:end]), ".".join(parts[end:])


def _regularity(split: Mapping[str, tuple[str, str]]) -> tuple[int, int]:
    layers, kinds = (Counter(one) for one in zip(*split.values(), strict=True)) if split else (Counter[str](),) * 2
    shared = itertools.filterfalse(lambda one: layers[one[0]] < 2 or kinds[one[1]] < 2, split.values())
    return len(list(shared)), -len(kinds)
