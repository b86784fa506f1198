"""Adapters of PEFT as checkpoints: their factors by the names of the model they belong to, and folded onto a base.

The update of a weight is scale · B · A and is never stored whole; what an adapter does not touch is the base's.

Reference: ``peft.tuners.lora.layer`` 0.21, ``get_delta_weight`` and ``merge``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from r2m.checkpoints import hub
from r2m.checkpoints.adapter_config import CONFIG, UNLOADED, AdapterConfig
from r2m.checkpoints.files import Checkpoint, TensorFile
from r2m.checkpoints.formats import INDEXES, OUTPUTS
from r2m.checkpoints.layout import some
from r2m.checkpoints.low_rank import Factors, added
from r2m.checkpoints.saved_names import FAMILIES, in_files
from r2m.checkpoints.view import LazyTensor, View, zeros
from r2m_kernels.errors import BadCheckpoint, DoesNotFit, NotFinite, printable, quoted
from r2m_kernels.streaming import FLOATING, TensorSpec, dtype_name

_PROJECTION = ".out_proj"  # of torch.nn.MultiheadAttention
# What PEFT puts around the modules it changes.
_AROUND = re.compile(r"^base_model\.model\.|(?<=\.)(?:base_layer|modules_to_save)\.")
# Where biases are saved, a module that is saved whole has its own three times.
_COPY, _UNUSED = ".modules_to_save.", ".original_module."
# Of one module: factors of a linear layer or a convolution, of an embedding, magnitudes, and what is added to a bias.
_PARTS = {
    "lora_A.weight": "right",
    "lora_B.weight": "left",
    "lora_embedding_A": "right",
    "lora_embedding_B": "left",
    "lora_magnitude_vector": "magnitudes",
    "lora_magnitude_vector.weight": "magnitudes",
    "lora_B.bias": "bias",
}
_PART = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_LAST = re.compile(r"[^.]+(?:\.\d+)*(?:\.bias)?$")  # of a name: what the module is
_OF_PEFT = re.compile(r"(^|\.)(lora_[^.]*|token_adapter|parametrizations|base_model)(\.|$)")


@dataclass(frozen=True)
class Change(LazyTensor):
    """What an adapter adds to one tensor.

    Attributes:
        names: of its factors, for messages.
        factors: whose product it is.
        kind: of the module: linear, convolution, embedding or bias.
        magnitudes: of the rows (DoRA), or of an embedding's columns.
        start: what it is added to, where that is not the base's.
    """

    names: tuple[str, str] = ("", "")
    factors: Factors = field(kw_only=True)
    kind: str = "linear"
    magnitudes: LazyTensor | None = None
    start: LazyTensor | None = None


def under_model_names(file: TensorFile, what: str) -> TensorFile:
    """An adapter's file with its tensors under the names that the model has without the adapter.

    Raises:
        BadCheckpoint: two tensors get one name.
    """
    names: dict[str, str] = {}
    for name in sorted(file.specs, key=lambda name: _COPY in name):
        plain = _AROUND.sub("", name)
        if plain in names and _COPY not in name:
            raise BadCheckpoint(f"{what}: {quoted(names[plain])} and {quoted(name)} are the same tensor")
        if _UNUSED not in name:
            names.setdefault(plain, name)
    return replace(
        file,
        specs={plain: file.specs[name] for plain, name in names.items()},
        locations={plain: file.locations[name] for plain, name in names.items()},
        aliases={},
    )


def changes(source: Checkpoint) -> View:
    """What an adapter does, by the names of the tensors it does it to: :class:`Change`, or a tensor instead.

    A module of PyTorch's attention has its change under the name that a weight of it would have.

    Raises:
        BadCheckpoint: a factor is missing, or they do not fit each other or the configuration.
    """
    assert source.adapter is not None
    modules: dict[str, dict[str, str]] = {}
    tensors: dict[str, LazyTensor] = {}
    for name in source.specs:
        match = _PART.fullmatch(name)
        if match is None and _OF_PEFT.search(name):
            raise BadCheckpoint(f"{source.label}: holds {quoted(name)}, which is no part of a plain LoRA; {UNLOADED}")
        if match is None:
            tensors[name] = LazyTensor.stored(source, name)
        else:
            modules.setdefault(match["module"], {})[_PARTS[match["part"]]] = name
    for module, parts in modules.items():
        # PEFT adds this one twice to PyTorch's attention, also where it trains.
        times = 2 if module.endswith(_PROJECTION) and module.removesuffix(_PROJECTION) in modules else 1
        for name, change in _of_module(source, source.adapter, module, parts, times).items():
            tensors[name] = replace(change, start=tensors[name]) if name in tensors else change
    return View(source, tensors, {})


def onto(base: View, adapter: View) -> View:
    """A base with an adapter's changes, as a checkpoint of its own.

    Args:
        base: what the adapter belongs to.
        adapter: of :func:`changes`, under the same names, or under those that transformers has for them in a model; all
            may have one beginning more or less.

    Raises:
        DoesNotFit: the base has no such tensor, or one of another shape.
    """
    adapter, places, way = _placed(base, adapter)
    made = _made(adapter)
    _refuse_squares(base, adapter, made, places)
    tensors, aliases = dict(base.tensors), dict(base.aliases)
    for name, one in adapter.tensors.items():
        if name not in made:
            moved = way.named(name) if name.startswith(way.old) else name
            place = moved if name not in base.specs and moved in base.specs else name
            tensors[place] = one
            aliases = {alias: first for alias, first in aliases.items() if place not in (alias, first)}
    done: dict[str, str] = {}
    for name, change in made.items():
        place = places[name]
        folded = _folded(base, adapter, change, place)
        first = aliases.get(place, place)
        for tied in (first, *(alias for alias, other in aliases.items() if other == first)):
            if tied in done:
                raise DoesNotFit(
                    f"{adapter.label}: {quoted(done[tied])} and {quoted(name)} change one tensor of the base, "
                    f"{quoted(first)}"
                )
            tensors[tied], done[tied] = folded, name
    return View(adapter.source, tensors, aliases)


def described(source: Checkpoint, base: str | None = None) -> dict[str, str]:
    """What an adapter is, for people, by what it is about.

    Args:
        source: its files.
        base: the one that is given, if one is.
    """
    config = source.adapter
    assert config is not None
    view = changes(source)
    made = _made(view)
    products = [one.factors for one in made.values() if one.kind != "bias"]
    whole = [name for name in view.tensors if name not in made]
    told = {True: ": the one given", False: ": not the one given", None: "; whether it is the one given cannot be told"}
    same = "" if base is None else told[made_for(config.base, base, source.files[0].parent)]
    return {
        "adapter": config.title,
        "rank": _counted(str(one.rank) for one in products),
        "scale": _counted(f"{one.scale:.4g}" for one in products),
        "changes": _counted(_LAST.findall(name.removesuffix(".weight"))[0] for name in made),
        "whole": some(whole),
        "base": f"{printable(config.base or 'not named')}, by its {CONFIG}{same}",
    }


def made_for(named: str | None, base: str, adapter: Path | None = None) -> bool | None:
    """Whether the base that an adapter names is the one that is given; ``None``: that cannot be told.

    Args:
        named: a path, or a repository of the Hub.
        base: as it was given.
        adapter: its directory. One that still lies in the output that it is named after is for the model there.
    """
    if named is None:
        return None
    out = None if adapter is None else adapter.resolve().parent.parent
    if out is not None and out.name == named and any((out / file).exists() for file in (*OUTPUTS, *INDEXES)):
        return os.path.realpath(base) in {os.path.realpath(place) for place in (out, *map(out.joinpath, OUTPUTS))}
    if hub.is_reference(base):
        given = "/".join(base.removeprefix(hub.SCHEME).partition("@")[0].split("/")[:2])
        of_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not os.path.exists(named)
        return given.lower() == named.lower() or (False if of_the_hub else None)
    place = os.path.realpath(base)
    cached = f"/models--{named.replace('/', '--')}/" in f"{place}/"
    return True if cached or place == os.path.realpath(named) else None


def _counted(words: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{printable(word)} ({count})" for word, count in counts.items())


def _of_module(
    source: Checkpoint, config: AdapterConfig, module: str, parts: Mapping[str, str], times: int
) -> dict[str, Change]:
    missing = next((side for side in ("left", "right") if side not in parts), None)
    if missing is not None:
        raise BadCheckpoint(f"{source.label}: holds {quoted(next(iter(parts.values())))} without its other factor")
    if config.dora != ("magnitudes" in parts):
        which = "lacks magnitudes, expected some" if config.dora else "has magnitudes, expected none"
        raise BadCheckpoint(f"{source.label}: {quoted(module)} {which} by its {CONFIG}")
    if config.biased != ("bias" in parts):
        which = "lacks a bias, expected one" if config.biased else "has a bias, expected none"
        raise BadCheckpoint(f"{source.label}: {quoted(module)} {which} by lora_bias of its {CONFIG}")
    names = (parts["left"], parts["right"])
    left, right = (source.specs[name] for name in names)
    embedding = "lora_embedding" in names[0]
    _refuse_shapes(source, names, left, right, config.rank_of(module))
    shape = (right.shape[1], left.shape[0]) if embedding else (left.shape[0], *right.shape[1:])
    rank, m, n = right.shape[0], left.shape[0], right.numel // right.shape[0]
    factors = Factors(
        (m, n),
        rank,
        times * config.scale_of(module),
        torch.promote_types(left.dtype, right.dtype),
        _finite(source, names[0], (m, rank)),
        _finite(source, names[1], (rank, n)),
    )
    kind = "embedding" if embedding else "linear" if len(shape) == 2 else "convolution"
    if embedding:
        factors = factors.transposed
    magnitudes = LazyTensor.stored(source, parts["magnitudes"]) if config.dora else None
    made = {f"{module}.weight": _change(shape, names, factors, kind, magnitudes)}
    if "bias" in parts:
        name, spec = parts["bias"], source.specs[parts["bias"]]
        one = torch.ones(1, 1)
        shift = Factors((m, 1), 1, config.scale_of(module), spec.dtype, _finite(source, name, (m, 1)), lambda: one)
        if spec.shape != (m,):
            raise BadCheckpoint(f"{source.label}: tensor {quoted(name)}: expected {m} numbers, got {spec.shape}")
        made[f"{module}.bias"] = _change((m,), (name, name), shift, "bias", None)
    return made


def _change(
    shape: tuple[int, ...], names: tuple[str, str], factors: Factors, kind: str, magnitudes: LazyTensor | None
) -> Change:
    alone = added(zeros(TensorSpec(shape, torch.float32)), factors, None, by_column=False)
    return Change(
        alone.spec, alone.read, alone.read_elements, names=names, kind=kind, magnitudes=magnitudes, factors=factors
    )


def _refuse_shapes(source: Checkpoint, names: tuple[str, str], left: TensorSpec, right: TensorSpec, rank: int) -> None:
    for name, spec in zip(names, (left, right), strict=True):
        if spec.dtype not in FLOATING or len(spec.shape) < 2 or 0 in spec.shape:
            raise BadCheckpoint(
                f"{source.label}: tensor {quoted(name)}: expected a factor of two dimensions or more, in floating "
                f"point, got {dtype_name(spec.dtype)} {list(spec.shape)}"
            )
    if right.shape[0] != rank:
        raise BadCheckpoint(
            f"{source.label}: tensor {quoted(names[1])} has rank {right.shape[0]}, expected {rank} by its {CONFIG}"
        )
    if left.shape[1] != rank or left.numel != left.shape[0] * rank or len(left.shape) != len(right.shape):
        raise BadCheckpoint(
            f"{source.label}: tensors {quoted(names[0])} and {quoted(names[1])} are no factors of rank {rank}: "
            f"{list(left.shape)} and {list(right.shape)}"
        )


def _finite(source: Checkpoint, name: str, shape: tuple[int, int]) -> Callable[[], Tensor]:
    """Reads a factor as a matrix. What is wrong in it would be in a whole weight, far from its cause."""

    def read() -> Tensor:
        factor = source.read(name).reshape(shape)
        wrong = int((~torch.isfinite(factor)).sum())
        if wrong:
            raise NotFinite(
                f"{source.label}: tensor {quoted(name)} holds NaN or Inf in {wrong} of {factor.numel()} elements"
            )
        return factor

    return read


def _made(adapter: View) -> dict[str, Change]:
    return {name: one for name, one in adapter.tensors.items() if isinstance(one, Change)}


def _placed(base: View, adapter: View) -> tuple[View, dict[str, str], _Way]:
    """An adapter under its own names or those of files, whichever the base has, and :func:`_places` of it."""
    try:
        return adapter, *_places(base, adapter, _made(adapter))
    except DoesNotFit:
        for family in FAMILIES:
            view = View(adapter.source, {in_files(name, family): one for name, one in adapter.tensors.items()}, {})
            if view.tensors.keys() != adapter.tensors.keys() and len(view.tensors) == len(adapter.tensors):
                with suppress(DoesNotFit):
                    return view, *_places(base, view, _made(view))
        raise


def _places(base: View, adapter: View, made: Iterable[str]) -> tuple[dict[str, str], _Way]:
    """Which of the base's tensors each change belongs to, and how the names of those not found were moved."""
    places = {name: _place(base, name, _Way()) for name in made}
    lost = [name for name, place in places.items() if not place]
    if not lost:
        return places, _Way()
    ways = [way for way in _ways(base, lost[0]) if all(_place(base, name, way) for name in lost)]
    if len(ways) == 1:
        return {name: place or _place(base, name, ways[0]) for name, place in places.items()}, ways[0]
    config = adapter.source.adapter
    whose = f"; it was made for {quoted(config.base)}, by its {CONFIG}" if config and config.base else ""
    if ways:
        several = " or ".join(quoted(way.named(lost[0])) for way in ways[:2])
        raise DoesNotFit(f"{adapter.label}: changes {quoted(lost[0])}, which may be {several}: say which with rename")
    more = f" ({len(lost)} of its {len(places)} targets are not there)" if len(lost) > 1 else ""
    problem = DoesNotFit(f"{adapter.label}: changes {quoted(lost[0])}, which the base has not{more}{whose}")
    problem.mismatches = len(lost)
    raise problem


class _Way(NamedTuple):
    """How names are moved: what they begin with, and what instead."""

    old: str = ""
    new: str = ""

    def named(self, name: str) -> str:
        """A name so moved."""
        return self.new + name[len(self.old) :]


def _ways(base: View, name: str) -> list[_Way]:
    """All that lead from a name to one of the base's, by a beginning more or less."""
    called = _called(name)
    longer = [_Way("", one[: -len(end)]) for end in called for one in base.specs if one.endswith("." + end)]
    dots = [index + 1 for index, letter in enumerate(name) if letter == "."]
    return longer + [_Way(name[:dot]) for dot in dots if any(one in base.specs for one in _called(name[dot:]))]


def _place(base: View, name: str, way: _Way) -> str:
    """Where in the base a change belongs, its name being moved; empty where there is nothing."""
    if not name.startswith(way.old):
        return ""
    return next((one for one in _called(way.named(name)) if one in base.specs), "")


def _called(name: str) -> tuple[str, str]:
    """What a module's tensor may be called: that of PyTorch's attention has a name of its own."""
    module, _, end = name.rpartition(".")
    return name, f"{module}.in_proj_{end}"


def _refuse_squares(base: View, adapter: View, made: Mapping[str, Change], places: Mapping[str, str]) -> None:
    """A weight is (out, in) or, in transformers' Conv1D, (in, out). PEFT saves the last layer's way."""
    assert adapter.source.adapter is not None
    transposed = adapter.source.adapter.transposed
    shapes = {name: (change.start or base.tensors[places[name]]).spec.shape for name, change in made.items()}
    linear = [name for name, change in made.items() if change.kind == "linear"]
    square = next((name for name in linear if shapes[name] == shapes[name][::-1]), None)
    others = (name for name in linear if shapes[name] != shapes[name][::-1])
    other = next((name for name in others if (shapes[name] == made[name].spec.shape) == transposed), None)
    if square and other:
        raise DoesNotFit(
            f"{adapter.label}: whether the square {quoted(square)} is (out, in) or (in, out) cannot be told: "
            f"{quoted(other)} is not as its {CONFIG} says (fan_in_fan_out: {str(transposed).lower()}); {UNLOADED}"
        )


def _folded(base: View, adapter: View, change: Change, place: str) -> LazyTensor:
    """The base's tensor, or the one that the adapter has instead, with a change."""
    factors, start = change.factors, change.start or base.tensors[place]
    assert adapter.source.adapter is not None
    shape, flipped = start.spec.shape, change.spec.shape[::-1]
    if start.spec.dtype not in FLOATING:
        raise DoesNotFit(
            f"{adapter.label}: changes {quoted(place)}, which holds {dtype_name(start.spec.dtype)} in the base, "
            "expected floating-point numbers (a quantised base: dequantise it first)"
        )
    linear = change.kind == "linear"
    turned = linear and shape == flipped and (shape != change.spec.shape or adapter.source.adapter.transposed)
    if not turned and shape != change.spec.shape:
        grouped = change.kind == "convolution" and len(shape) == len(flipped) and shape[1] != change.spec.shape[1]
        why = " (a grouped convolution: PEFT cannot merge it either)" if grouped else ""
        raise DoesNotFit(
            f"{adapter.label}: {quoted(change.names[0])} by {quoted(change.names[1])} is {list(change.spec.shape)}, "
            f"expected {list(shape)} as the base's {quoted(place)}{why}"
        )
    factors = factors.transposed if turned else factors
    by_column = turned or change.kind == "embedding"
    if change.magnitudes is not None and change.magnitudes.spec.numel != factors.shape[by_column]:
        raise DoesNotFit(
            f"{adapter.label}: has {change.magnitudes.spec.numel} magnitudes for {quoted(place)}, expected "
            f"{factors.shape[by_column]}"
        )
    return added(start, factors, change.magnitudes.read if change.magnitudes else None, by_column)
