"""The output of a merge as one model and an adapter of each expert on it (``--format adapters``).

In an ``ensemble`` the model is the experts' mean, and an adapter what is left of its expert, truncated; what no product
carries is saved whole, or is the mean. In a ``merge`` the model is the core, and adapters are residuals as they enter
the merge; what no product carries is in the model. Of adapters alone the merge can be ``one`` adapter on their base;
the model is the merge then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2m import plain_yaml
from r2m.arrangement import Arranged, literal
from r2m.checkpoints import hub
from r2m.checkpoints.adapter_config import README
from r2m.checkpoints.adapter_layout import (
    BIAS,
    Layout,
    carrying_biases,
    changed_layers,
    layers,
    layout,
    of_norms,
    together,
)
from r2m.checkpoints.adapter_writer import AdapterWriter
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.formats import ADAPTERS
from r2m.checkpoints.saved_names import Family
from r2m.checkpoints.view import View
from r2m.places import sync
from r2m.recipe import ENSEMBLE, ONE
from r2m.templating import render
from r2m_kernels import Adapters, Analysis
from r2m_kernels.adapters import Change, MergedChanges, ranks_within, truncated
from r2m_kernels.errors import BadOption, printable, quoted
from r2m_kernels.streaming import TensorSpec, plan_tensors

MERGED = "merged"  # what one is called


class Base(NamedTuple):
    """What adapters are on.

    Attributes:
        name: what they call it.
        family: whose names its model has, where its files have others.
    """

    name: str
    family: Family | None = None


class Limits(NamedTuple):
    """What adapters are held to.

    Attributes:
        rank: columns of each layer at most; ``None``: as many as there are.
        size: numbers of an adapter at most, as a share of the model's; ``None``: as many as the ranks make. Where that
            is too few an ensemble's norms are the mean: for each number they do less than a layer's columns.
    """

    rank: int | None = None
    size: float | None = None


def arrange(arranged: Arranged, kind: str) -> Arranged:
    """The same where matrices that no adapter carries keep their whole residuals: those are in the model then.

    Raises:
        BadOption: an adapter would hold nothing, or its expert's name is none of a directory; or the merge is to be
            one, and not all experts are.
    """
    if kind == ONE:
        whole = next((name for name, view in arranged.experts.items() if view.source.adapter is None), None)
        if whole is not None:
            raise BadOption(f"adapters: {ONE} is of adapters alone; expert {quoted(whole)} is a whole checkpoint")
        return arranged
    for name in arranged.experts:
        if name != os.path.basename(name) or name.startswith(".") or len(os.fsencode(name)) > 255:
            raise BadOption(f"adapters: expert {quoted(name)}: expected a name that a directory can have: NAME=PATH")
    config = arranged.config
    plan = plan_tensors(arranged.base, arranged.experts, config)
    specs, matrices = {tensor.name: tensor.spec for tensor in plan.tensors}, [one.name for one in plan.of("matrix")]
    # Of a tied weight an adapter would change one of two.
    targets = layers(specs, [name for name in matrices if name not in plan.tied])
    targets = carrying_biases(specs, targets) if kind == ENSEMBLE else targets
    carried = {*targets.values()}
    truncated = [one.name for one in plan.tensors if one.truncated and one.name in carried]
    if not truncated or config.eta == 0 or config.spectrum != "truncate" or config.scale == "column":
        raise BadOption(
            "adapters: with this method and these options no residual of a layer is truncated, and they would hold "
            "nothing; expected a rank below full, an eta above 0, and no scale by column"
        )
    _both_projections(layers(specs, truncated), truncated)
    kept = tuple((literal(name), 1.0) for name in matrices if name not in carried)
    return replace(arranged, config=config.replace(ranks=(*kept, *config.ranks)))


def _both_projections(targets: Mapping[str, str], truncated: Iterable[str]) -> None:
    lost = [name for name in truncated if name not in targets.values()]
    if lost:
        raise BadOption(
            f"adapters: the residual of {quoted(lost[0])} is truncated, and that of the other projection of its "
            "attention is not; expected one rank for both"
        )


def write(
    directory: Path, arranged: Arranged, kind: str, limits: Limits, analysis: Analysis, model: Checkpoint, base: Base
) -> dict[str, Any]:
    """Adapters into directories of their own, each on the disk when this returns.

    Args:
        directory: the output, in which :data:`ADAPTERS.beside` is made.
        arranged, analysis: of the merge.
        kind: ``ensemble`` or ``merge``.
        limits: beside the ranks of the truncation.
        model: what is written in the output already.
        base: what it will be.

    Returns:
        What the report says of them.
    """
    parts, place = analysis.adapters(arranged.config), directory / ADAPTERS.beside
    laid = _layout(kind, arranged, analysis, model, parts)
    ranks = {name: parts.ranks[name] for name in laid.targets.values()}
    if limits.size is not None and not _fits(limits.size, laid, model.specs, ranks):
        laid = _layout(kind, arranged, analysis, model, parts, of_norms(model.specs))
        ranks = _within(limits.size, parts, laid, model.specs, ranks)
    wide = {name: torch.promote_types(model.specs[name].dtype, torch.float32) for name in laid.targets.values()}
    place.mkdir(exist_ok=True)
    writers = {}
    for name in arranged.experts:
        (place / name).mkdir(exist_ok=True)
        writers[name] = AdapterWriter(place / name, laid, model.specs, ranks, wide, base.family)
    # A heavier expert's part of the residual term is larger; alone it is what it is.
    weights = analysis.real_subspace.weights * len(writers) if kind == ENSEMBLE else torch.ones(len(writers))
    for module, name in laid.targets.items():
        changes, spec = parts.changes(name), model.specs[name]
        share = parts.ranks[name] / min(spec.shape[0], spec.numel // spec.shape[0])
        squares = _beyond_mean(analysis, name) if limits.size else [0.0] * len(changes)
        for (expert, writer), weight, square in zip(writers.items(), weights.tolist(), squares, strict=True):
            whole = Change(changes[expert].left / weight, changes[expert].right)
            change = truncated(whole, ranks[name])
            if limits.size:
                # The leading part of all columns holds as large a part of the energy; differences of inner products
                # tell less where experts are nearly the same.
                change = _lengthened(change, min(max(square, whole.square), whole.square / share))
            bias = _beyond(arranged.experts[expert], model, f"{module}{BIAS}") if laid.biased else None
            writer.write_change(module, *change, bias)
    for name in (name for names in laid.saved.values() for name in names):
        for expert, writer in writers.items():
            writer.write_whole(name, _own(arranged.experts[expert], model, name))
    return _finished(place, writers, base.name, kind, laid, model.specs, ranks)


def write_one(
    directory: Path, arranged: Arranged, limits: Limits, analysis: Analysis, model: Checkpoint, base: Base
) -> dict[str, Any]:
    """The merge as one adapter on the base. Arguments are :func:`write`'s.

    Raises:
        BadOption: the merge changes what no adapter carries.
    """
    parts, place = analysis.changes(arranged.config), directory / ADAPTERS.beside
    changed = {name for name, gram in analysis.grams.items() if bool(gram.any())}
    changed |= {one.name for one in analysis.plan.of("statistic", "extra") if _moved(arranged.base, model, one.name)}
    known = layers(model.specs, [name for name in parts.ranks if name not in analysis.plan.tied])
    targets = changed_layers(model.specs, known, changed)
    laid = layout(model.specs, targets, [name for name in model.specs if name in changed - {*targets.values()}])
    if not targets or laid.averaged:
        lost = (
            f"no adapter carries the change of {quoted(laid.averaged[0])}" if laid.averaged else "no layer has changed"
        )
        raise BadOption(f"adapters: {lost}, and the merge cannot be {ONE}")
    ranks = {name: min(parts.ranks[name], limits.rank or parts.ranks[name]) for name in targets.values()}
    if limits.size is not None and not _fits(limits.size, laid, model.specs, ranks):
        ranks = _within(limits.size, parts, laid, model.specs, ranks)
    wide = {name: torch.promote_types(model.specs[name].dtype, torch.float32) for name in ranks}
    (place / MERGED).mkdir(parents=True, exist_ok=True)
    writer = AdapterWriter(place / MERGED, laid, model.specs, ranks, wide, base.family)
    for module, name in targets.items():
        bias = _beyond(model, arranged.base, f"{module}{BIAS}") if laid.biased else None
        writer.write_change(module, *parts.change(name, ranks[name]), bias)
    for name in (name for names in laid.saved.values() for name in names):
        writer.write_whole(name, model.read(name))
    return _finished(place, {MERGED: writer}, base.name, ONE, laid, model.specs, ranks)


def _fits(size: float, laid: Layout, specs: Mapping[str, TensorSpec], ranks: Mapping[str, int]) -> bool:
    return _numbers(laid, specs, ranks) <= _most(size, specs)


def _most(size: float, specs: Mapping[str, TensorSpec]) -> int:
    return int(size * sum(spec.numel for spec in specs.values()))


def _within(
    size: float,
    parts: Adapters | MergedChanges,
    laid: Layout,
    specs: Mapping[str, TensorSpec],
    ranks: dict[str, int],
) -> dict[str, int]:
    """Matrix → rank, none above those given: so that an adapter has its size."""
    columns = [[parts.columns(name, ranks[name]) for name in names] for names in together(laid.targets)]
    return ranks_within(_most(size, specs) - _numbers(laid, specs, {}), columns)


def _beyond_mean(analysis: Analysis, name: str) -> list[float]:
    """‖τ_j − mean‖² of each expert's task vector of a matrix."""
    gram, weights = analysis.grams[name].double().cpu(), analysis.real_subspace.weights.double().cpu()
    shared = gram @ weights
    return (gram.diagonal() - 2 * shared + weights @ shared).tolist()


def _lengthened(change: Change, square: float) -> Change:
    """A truncated residual with half of the length that it lost, in powers: times √(length before / length after).

    Without it experts with such adapters are nearer to their mean than they were, and their ensemble to the average.

    Args:
        square: of the residual's length before.
    """
    kept = change.square
    return change._replace(left=change.left * (square / kept) ** (1 / 4)) if square > kept > 0 else change


def _numbers(laid: Layout, specs: Mapping[str, TensorSpec], ranks: Mapping[str, int]) -> int:
    """In one adapter; without ranks: beside its factors."""
    whole = [*(name for names in laid.saved.values() for name in names)]
    count = sum(specs[name].numel for name in whole)
    count += sum(specs[name].shape[0] for name in laid.targets.values()) if laid.biased else 0
    columns = ((max(ranks.get(name, 0) for name in names), names) for names in together(laid.targets))
    return count + sum(rank * _column(specs[name]) for rank, names in columns for name in names)


def _column(spec: TensorSpec) -> int:
    """Numbers in a column of both factors of a weight."""
    return spec.shape[0] + spec.numel // spec.shape[0]


def _finished(
    place: Path,
    writers: Mapping[str, AdapterWriter],
    base: str,
    kind: str,
    laid: Layout,
    specs: Mapping[str, TensorSpec],
    ranks: Mapping[str, int],
) -> dict[str, Any]:
    about = {
        "kind": kind,
        "ranks": dict(ranks),
        "numbers": _numbers(laid, specs, ranks),
        "saved": list(laid.saved),
        "averaged": list(laid.averaged),
    }
    for expert, writer in writers.items():
        writer.finish(base, _card(expert, base, about).encode(errors="backslashreplace"), README)
    sync(place)
    return about


def _moved(base: View, model: Checkpoint, name: str) -> bool:
    return name not in base.specs or not torch.equal(base.read(name).to(model.specs[name].dtype), model.read(name))


def _beyond(one: View | Checkpoint, other: View | Checkpoint, name: str) -> Tensor:
    return one.read(name).double() - other.read(name).double()


def base_name(path: str, arranged: Arranged) -> str:
    """What the base is called in an adapter on it: its repository, what all experts call it, or its file's name."""
    named = {view.source.adapter.base for view in arranged.experts.values() if view.source.adapter}
    if hub.is_reference(path):
        return "/".join(path.removeprefix(hub.SCHEME).partition("@")[0].split("/")[:2])
    return next(iter(named)) or Path(path).name if len(named) == 1 else Path(path).name


def _own(expert: View, model: Checkpoint, name: str) -> Tensor:
    """An expert's tensor; counters, which it may lack, are the model's."""
    spec = model.specs[name]
    return expert.read(name).to(spec.dtype) if spec.dtype.is_floating_point else model.read(name)


def _card(expert: str, base: str, about: Mapping[str, Any]) -> str:
    header = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "r2m", "deepfake-detection"],
    }
    words = {"called": expert, "place": f"{ADAPTERS.beside}/{expert}"}
    quoted_words = {key: json.dumps(printable(word), ensure_ascii=False) for key, word in words.items()}
    return render("adapter.md", header=plain_yaml.dump(header).rstrip(), expert=expert, about=about, **quoted_words)


def nbytes(arranged: Arranged, kind: str, size: float | None = None) -> int:
    """Bytes of all adapters' tensors, as headers tell them: at most, as of layers and statistics that all changed."""
    plan = plan_tensors(arranged.base, arranged.experts, arranged.config)
    specs = {tensor.name: tensor.spec for tensor in plan.tensors}
    if kind == ONE:
        experts = arranged.experts.values()
        ranks = {one.name: sum(view.change_rank(one.name) or 0 for view in experts) for one in plan.of("matrix")}
    else:
        ranks = {tensor.name: tensor.rank for tensor in plan.tensors if tensor.truncated}
    laid = Layout(layers(specs, [name for name, rank in ranks.items() if rank]))
    if kind == ENSEMBLE:
        moved = [tensor.name for tensor in plan.tensors if tensor.role != "copied" and tensor.name not in ranks]
        laid = layout(specs, laid.targets, moved)
        if size is not None and not _fits(size, laid, specs, ranks):
            laid = layout(specs, laid.targets, moved, of_norms(specs))
    numbers, beside = _numbers(laid, specs, ranks), _numbers(laid, specs, {})
    if size is not None:
        least = beside + sum(_column(specs[name]) for name in laid.targets.values())
        numbers = min(numbers, max(least, _most(size, specs)))
    whole = [specs[name] for names in laid.saved.values() for name in names]
    rounded = sum(spec.nbytes - spec.numel * torch.float32.itemsize for spec in whole)
    return (1 if kind == ONE else len(arranged.experts)) * (numbers * torch.float32.itemsize + rounded)


def _layout(
    kind: str,
    arranged: Arranged,
    analysis: Analysis,
    model: Checkpoint,
    parts: Adapters,
    shared: Collection[str] = (),
) -> Layout:
    targets = layers(model.specs, parts.ranks)
    _both_projections(targets, parts.ranks)
    changed = {name for name, gram in analysis.grams.items() if bool(gram.any())}
    targets = changed_layers(model.specs, targets, changed)
    if kind != ENSEMBLE:
        return Layout(targets)
    apart = {
        one.name
        for one in analysis.plan.of("statistic", "extra")
        if one.spec.dtype.is_floating_point  # counters are the model's
        and any(_moved(expert, model, one.name) for expert in arranged.experts.values())
    }
    moved = (apart | changed) - {*targets.values()}
    return layout(model.specs, targets, [name for name in model.specs if name in moved], shared)
