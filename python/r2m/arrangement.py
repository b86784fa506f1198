"""How checkpoints are brought into one layout before they are merged: names, Effort's factors, buffers, the head."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from r2m import refit
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.view import LazyTensor, View, constant, folded, zeros
from r2m.presets import FACTORS, FROZEN, MAIN, PLAIN, PRESETS, Preset, Rules
from r2m_kernels import MergeConfig, checks
from r2m_kernels.errors import InvalidInput, quoted
from r2m_kernels.streaming import TensorSpec, plan_tensors

# How classifiers' names begin or go on.
HEADS = ("head", "fc", "classifier", "last_linear", "_fc", "logits", "projection_head")


@dataclass(frozen=True)
class Arrangement:
    """What is asked for.

    Attributes:
        preset: a key of :data:`r2m.presets.PRESETS`.
        rename: beginnings of names in every checkpoint, before the preset's.
        expert_renames: the same by expert, before those.
        head: ``"mean"`` of the experts', ``"base"``, ``"expert:NAME"``, or ``"refit"`` (``"refit:logistic"``); None:
            merged like everything else.
        head_features: a file of the merged model's features, which ``"refit"`` is fitted on.
        head_tensors: globs of the head's names; empty: names that look like a classifier's.
    """

    preset: str | None = None
    rename: Rules = field(default_factory=dict)
    expert_renames: Mapping[str, Rules] = field(default_factory=dict)
    head: str | None = None
    head_tensors: Sequence[str] = ()
    head_features: str | None = None


@dataclass(frozen=True)
class Arranged:
    """What is merged.

    Attributes:
        base, experts: in one layout, unless they do not fit at all.
        config: with what the arrangement asks of the merge.
        head: names of the tensors that ``head`` was about.
        folded: names of the weights that are sums of factors.
        features: SHA-256 of the features that the head was fitted on.
    """

    base: View
    experts: dict[str, View]
    config: MergeConfig
    head: list[str]
    folded: list[str]
    features: str | None = None


def arrange(base: Checkpoint, experts: Mapping[str, Checkpoint], config: MergeConfig, wanted: Arrangement) -> Arranged:
    """Bring checkpoints into one layout.

    Raises:
        InvalidInput: an unknown preset, names that collide, no such head; or they do not fit, and a preset would help.
    """
    if wanted.preset is not None:
        checks.choice("preset", wanted.preset, tuple(PRESETS))
    found = _arranged(base, experts, config, wanted)
    if wanted.preset is None:
        _suggest_preset(base, experts, config, wanted, found)
    return found


def head_names(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names that look like a classifier's, its matrices first."""
    found = [name for name in specs if set(name.split(".")[:-1]) & set(HEADS)]
    return sorted(found, key=lambda name: -len(specs[name].shape))


def literal(name: str) -> str:
    """A glob that fits this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _arranged(
    base: Checkpoint, experts: Mapping[str, Checkpoint], config: MergeConfig, wanted: Arrangement
) -> Arranged:
    preset = PRESETS[wanted.preset] if wanted.preset is not None else Preset("as they are")
    ground = renamed(base, wanted)
    views = {name: renamed(source, wanted, wanted.expert_renames.get(name, {})) for name, source in experts.items()}
    weights: list[str] = []
    if preset.factored:
        ground, views, config, weights = _unfactored(ground, views, config)
    if preset.experts_layout and config.extra == "error":
        config = config.replace(extra="average")
    if preset.experts_layout and views:
        ground = _with_buffers_of(ground, list(views.values()))
    head: list[str] = []
    features = None
    if wanted.head_features is not None and (wanted.head or "").partition(":")[0] != "refit":
        raise InvalidInput("head_features: are for head: refit alone")
    if wanted.head is not None:
        ground, config, head, features = _with_head(ground, views, config, wanted)
    return Arranged(ground, views, config, head, weights, features)


def renamed(source: Checkpoint, wanted: Arrangement, own: Rules | None = None) -> View:
    """A checkpoint under the names that are asked for; ``own`` rules come before those for all."""
    view = View.of(source).renamed({**(own or {}), **wanted.rename})
    for step in PRESETS[wanted.preset].steps if wanted.preset is not None else ():
        view = view.renamed(step)
    return view


def plain(source: Checkpoint, wanted: Arrangement) -> View:
    """A checkpoint under the names that are asked for, its factors folded into ordinary weights."""
    view = renamed(source, wanted)
    if wanted.preset is None or not PRESETS[wanted.preset].factored:
        return view
    beginnings = _beginnings([view])
    return _folded(view, beginnings).renamed({start + MAIN: start + PLAIN for start in beginnings})


def _with_buffers_of(base: View, experts: Sequence[View]) -> View:
    """Integer buffers as the experts have them: there if all do, as the first has them; gone if none does."""
    first, *others = experts
    gone = [
        name
        for name, spec in base.specs.items()
        if not spec.dtype.is_floating_point and not any(name in expert.specs for expert in experts)
    ]
    new = {
        name: part
        for name, part in first.tensors.items()
        if name not in base.specs
        and not part.spec.dtype.is_floating_point
        and all(expert.specs.get(name) == part.spec for expert in others)
    }
    return base.without(gone).having(new)


def _unfactored(
    base: View, experts: Mapping[str, View], config: MergeConfig
) -> tuple[View, dict[str, View], MergeConfig, list[str]]:
    """Effort's W + U diag(S) V as one weight in everyone, and the output's factors such that they add nothing.

    The output has the first expert's U and V and S = 0, so that it loads into the detector it came from and computes
    with the merged weight alone.
    """
    beginnings = _beginnings(experts.values())
    if not beginnings:
        raise InvalidInput(f"preset effort: no expert has a tensor that ends in .{MAIN}")
    views = {name: _folded(view, beginnings) for name, view in experts.items()}
    ground = _folded(base, beginnings).renamed({start + PLAIN: start + MAIN for start in beginnings})
    first = next(iter(experts.values()))
    rest: dict[str, LazyTensor] = {}
    for start in beginnings:
        for ending in (*FACTORS, *FROZEN):
            part = first.tensors.get(start + ending)
            if part is not None:
                rest[start + ending] = zeros(part.spec) if ending == "S_residual" else part
    kept = tuple(dict.fromkeys((*config.keep, *(f"*.{ending}" for ending in (*FACTORS, *FROZEN)))))
    return ground.having(rest), views, config.replace(keep=kept), [start + MAIN for start in beginnings]


def _beginnings(views: Iterable[View]) -> list[str]:
    """What stands before ``weight_main`` in the names of layers whose weight is a sum."""
    return sorted({name[: -len(MAIN)] for view in views for name in view.tensors if name.rpartition(".")[2] == MAIN})


def _folded(view: View, beginnings: Iterable[str]) -> View:
    whole: dict[str, LazyTensor] = {}
    gone: list[str] = []
    for start in beginnings:
        names = [start + MAIN, *(start + ending for ending in FACTORS)]
        there = [name for name in names if name in view.tensors]
        if len(there) == len(names):
            main, left, singular, right = (view.tensors[name] for name in names)
            shapes = [view.specs[name].shape for name in names]
            (m, n), r = (shapes[0], shapes[2][0]) if list(map(len, shapes)) == [2, 2, 1, 2] else ((0, 0), 0)
            if shapes[1:] != [(m, r), (r,), (r, n)]:
                raise InvalidInput(
                    f"{view.label}: {quoted(names[0])}: expected factors of shapes (m, r), (r,) and (r, n) beside its "
                    f"(m, n), got {', '.join(map(str, shapes[1:]))} beside {shapes[0]}"
                )
            whole[start + MAIN] = folded(main, left, singular, right)
        elif there and there != [names[0]]:
            missing = next(name for name in names if name not in there)
            raise InvalidInput(f"{view.label}: has {quoted(there[0])} and lacks {quoted(missing)}")
        gone += [start + ending for ending in (*FACTORS, *FROZEN)]
    return view.having(whole).without(gone)


def _with_head(
    base: View, experts: Mapping[str, View], config: MergeConfig, wanted: Arrangement
) -> tuple[View, MergeConfig, list[str], str | None]:
    rule, globs = wanted.head or "", wanted.head_tensors
    kind, _, chosen = rule.partition(":")
    known = {"mean": not chosen, "base": not chosen, "expert": bool(chosen), "refit": chosen in ("", *refit.RULES)}
    if not known.get(kind, False):
        raise InvalidInput(f"head: expected mean, base, expert:NAME, refit or refit:logistic, got {quoted(rule)}")
    if kind == "expert" and chosen not in experts:
        near = checks.did_you_mean(chosen, experts)
        raise InvalidInput(f"head: no expert is called {quoted(chosen)}{near}")
    whose = base if kind == "base" else experts[chosen] if kind == "expert" else next(iter(experts.values()))
    names = [name for name in whose.specs if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
    names = names if globs else head_names(whose.specs)
    names = [name for name in names if whose.specs[name].dtype.is_floating_point]
    if not names:
        meant = f"fits {', '.join(map(quoted, globs))}" if globs else "looks like a classifier; name it (head_tensors)"
        raise InvalidInput(f"head: no tensor of {whose.label} {meant}")
    exact = tuple(literal(name) for name in names)
    if kind == "mean":
        lacking = [name for name in names if name not in base.specs]
        if lacking and config.extra == "error":
            config = config.replace(extra="average")
        return base, config.replace(average=tuple(dict.fromkeys((*config.average, *exact)))), names, None
    kept = config.replace(keep=tuple(dict.fromkeys((*config.keep, *exact))))
    if kind == "refit":
        if wanted.head_features is None:
            raise InvalidInput("head: refit needs features of the merged model (head_features)")
        found = refit.read_features(wanted.head_features)
        fitted = refit.head({name: whose.specs[name].shape for name in names}, found, chosen or refit.RULES[0])
        parts = {name: constant(tensor.to(whose.specs[name].dtype)) for name, tensor in fitted.items()}
        return base.having(parts), kept, names, found.digest
    ground = base if kind == "base" else base.having({name: whose.tensors[name] for name in names})
    return ground, kept, names, None


def _suggest_preset(
    base: Checkpoint, experts: Mapping[str, Checkpoint], config: MergeConfig, wanted: Arrangement, found: Arranged
) -> None:
    """Add to the message of checkpoints that do not fit which preset would make them; silent where they fit."""
    try:
        plan_tensors(found.base, found.experts, found.config)
    except InvalidInput as error:
        sources = (base, *experts.values())
        for name, preset in PRESETS.items():
            beginnings = tuple(old for step in preset.steps for old in step)
            if not any(known.startswith(beginnings) for source in sources for known in source.specs):
                continue
            other = replace(wanted, preset=name)
            try:
                fitting = _arranged(base, experts, config, other)
                plan_tensors(fitting.base, fitting.experts, fitting.config)
            except InvalidInput:
                continue
            raise InvalidInput(f"{error}\nWith --preset {name} they fit ({preset.title}).") from None
        raise
