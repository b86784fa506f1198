"""How checkpoints are brought into one layout before they are merged: names, Effort's factors, buffers, the head."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from r2m import refit
from r2m.checkpoints.adapters import changes, onto
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.view import LazyTensor, View, constant, folded, reshaped, zeros
from r2m.labels import Agreed, Classes, agree
from r2m.presets import FACTORS, FROZEN, MAIN, PLAIN, PRESETS, Rules
from r2m.recipe import Arrangement
from r2m_kernels import MergeConfig, checks
from r2m_kernels.errors import BadCheckpoint, BadOption, DoesNotFit, InvalidInput, quoted
from r2m_kernels.heads import classifier
from r2m_kernels.streaming import plan_tensors

_MOST = 2**20  # elements of a variance that is looked at


@dataclass(frozen=True)
class Arranged:
    """What is merged.

    Attributes:
        base, experts: in one layout, unless they do not fit at all.
        config: with what the arrangement asks of the merge.
        head: names of the tensors that ``head`` was about.
        folded: names of the weights that are sums of factors.
        features: SHA-256 of the features that the head was fitted on.
        agreed: what the head's outputs stand for, and whose rows were put in that order.
    """

    base: View
    experts: dict[str, View]
    config: MergeConfig
    head: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    features: str | None = None
    agreed: Agreed = field(default_factory=lambda: Agreed({}, Classes(), {}))


def arrange(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    config: MergeConfig,
    arrangement: Arrangement,
    renames: Mapping[str, Rules] | None = None,
    fakes: Mapping[str, int] | None = None,
) -> Arranged:
    """Bring checkpoints into one layout.

    Args:
        base, experts, config: what is merged, and how.
        arrangement: what is asked for.
        renames: of an expert's names alone, before those for all.
        fakes: where an expert's head has the fake's output, whatever its configuration says.

    Raises:
        InvalidInput: names that collide, no such head; or they do not fit, and a preset would help.
    """
    try:
        arranged = _arranged(base, experts, config, arrangement, renames or {}, fakes or {})
        if arrangement.preset is not None:
            return arranged
        plan_tensors(arranged.base, arranged.experts, arranged.config)
    except InvalidInput as error:
        if arrangement.preset is not None:
            raise
        names = [name for source in (base, *experts.values()) for name in source.specs]
        beginnings = {key: tuple(old for step in one.steps for old in step) for key, one in PRESETS.items()}
        near = [key for key, starts in beginnings.items() if any(name.startswith(starts) for name in names)]
        left = {key: _left(base, experts, config, replace(arrangement, preset=key), renames) for key in near}
        raise _with_preset(error, left) from None
    return arranged


def _left(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    config: MergeConfig,
    arrangement: Arrangement,
    renames: Mapping[str, Rules] | None,
) -> InvalidInput | None:
    """What does not fit in an arrangement."""
    try:
        arranged = _arranged(base, experts, config, arrangement, renames or {}, {})
        plan_tensors(arranged.base, arranged.experts, arranged.config)
    except InvalidInput as error:
        return error
    return None


def _with_preset(error: InvalidInput, left: Mapping[str, InvalidInput | None]) -> InvalidInput:
    """What does not fit, and first of all the preset with which it does, or with which much less does not."""
    needed = next((key for key, rest in left.items() if rest is None), None)
    if needed is not None and not isinstance(error, DoesNotFit):
        return type(error)(f"{error}; with --preset {needed} they fit ({PRESETS[needed].title})")
    first, *lines = str(error).split("\n")
    if needed is not None:
        told = type(error)("\n".join([first, f"With --preset {needed} they fit ({PRESETS[needed].title}).", *lines]))
    else:
        fewer = {key: rest for key, rest in left.items() if isinstance(rest, DoesNotFit) and rest.mismatches}
        nearest = min(fewer, key=lambda key: fewer[key].mismatches, default=None)
        before = error.mismatches if isinstance(error, DoesNotFit) else 0
        if nearest is None or 2 * fewer[nearest].mismatches > before:
            return error
        rest = fewer[nearest]
        told = type(error)(
            f"{first}\nWith --preset {nearest} ({PRESETS[nearest].title}) {rest.mismatches} of {before} mismatches are "
            f"left:\n{rest}"
        )
    if isinstance(error, DoesNotFit) and isinstance(told, DoesNotFit):
        told.mismatches, told.every = error.mismatches, error.every
    return told


class Fitting(NamedTuple):
    """A preset with which checkpoints fit, and how they do."""

    preset: str
    arranged: Arranged


def fitting(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    config: MergeConfig,
    arrangement: Arrangement,
    renames: Mapping[str, Rules] | None = None,
    presets: Iterable[str] = tuple(PRESETS),
) -> Fitting | None:
    """The first of some presets with which checkpoints fit; other arguments are :func:`arrange`'s."""
    for preset in presets:
        try:
            arranged = _arranged(base, experts, config, replace(arrangement, preset=preset), renames or {}, {})
            plan_tensors(arranged.base, arranged.experts, arranged.config)
        except InvalidInput:
            continue
        return Fitting(preset, arranged)
    return None


def literal(name: str) -> str:
    """A glob that fits this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _arranged(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    config: MergeConfig,
    arrangement: Arrangement,
    renames: Mapping[str, Rules],
    fakes: Mapping[str, int],
) -> Arranged:
    origin = renamed(base, arrangement)
    views = {name: renamed(source, arrangement, renames.get(name, {})) for name, source in experts.items()}
    views = {name: onto(origin, view) if view.source.adapter else view for name, view in views.items()}
    arranged = Arranged(_as_convolutions(origin, views), views, config)
    if arrangement.layout.factored:
        arranged = _unfactored(arranged)
    if arrangement.layout.experts_layout:
        arranged = _in_layout_of_experts(arranged)
    arranged = _in_one_order(arranged, arrangement, fakes)
    if arrangement.head_features is not None and (arrangement.head or "").partition(":")[0] != "refit":
        raise BadOption("head_features: are for head: refit alone")
    rule = arrangement.head
    if rule is None and arrangement.head_tensors and config.head == "mean":  # of which it says where they are
        rule = "mean"
    if rule is not None:
        arranged = _with_head(arranged, rule, arrangement)
    # Who was made of the base knows so where the base is what it was.
    return replace(arranged, experts={name: view.over(arranged.base) for name, view in arranged.experts.items()})


def _as_convolutions(base: View, experts: Mapping[str, View]) -> View:
    """The base with matrices as convolutions of one pixel where all experts have those: an old Xception's."""
    alike = {}
    for name, spec in base.specs.items():
        shapes = {view.specs[name].shape for view in experts.values() if name in view.specs}
        if len(spec.shape) == 2 and shapes == {(*spec.shape, 1, 1)}:
            alike[name] = reshaped(base.tensors[name], (*spec.shape, 1, 1))
    return base.having(alike) if alike else base


def renamed(source: Checkpoint, arrangement: Arrangement, first: Rules | None = None) -> View:
    """A checkpoint under the names that are asked for; the rules of ``first`` come before those for all.

    Of an adapter it is what it changes.
    """
    view = changes(source) if source.adapter else View.of(source)
    view = view.renamed({**(first or {}), **arrangement.rename})
    for step in arrangement.layout.steps:
        view = view.renamed(step)
    return view


def plain(source: Checkpoint, arrangement: Arrangement) -> View:
    """A checkpoint under the names that are asked for, its factors folded into ordinary weights."""
    view = renamed(source, arrangement)
    if not arrangement.layout.factored:
        return view
    beginnings = _beginnings([view])
    return _folded(view, beginnings).renamed({start + MAIN: start + PLAIN for start in beginnings})


def _in_one_order(arranged: Arranged, arrangement: Arrangement, fakes: Mapping[str, int]) -> Arranged:
    """The outputs of the experts' heads in one order, where it is known what they stand for."""
    globs = arrangement.head_tensors
    heads = {name: _classifier(view, globs) for name, view in arranged.experts.items()}
    agreed = agree(arranged.base, arranged.experts, heads, Classes(fake=arrangement.fake), fakes)
    agreed = replace(agreed, notes=(*agreed.notes, *_impossible(arranged.experts)))
    return replace(arranged, experts=dict(agreed.experts), agreed=agreed)


def _impossible(experts: Mapping[str, View]) -> list[str]:
    """Notes on experts with variances below zero: their mean may be one, too, and what a network makes of that NaN."""
    notes = []
    for view in experts.values():
        names = [name for name, spec in view.specs.items() if name.endswith("running_var") and spec.numel <= _MOST]
        below = [name for name in names if bool((view.read(name).double() < 0).any())]
        if below:
            others = f" and {len(below) - 1} more" if below[1:] else ""
            notes.append(f"{view.label}: {quoted(below[0])}{others} has variances below zero: is it whole?")
    return notes


def _in_layout_of_experts(arranged: Arranged) -> Arranged:
    """Extras are averaged; integer buffers are there if all experts have them, and gone if none does."""
    if arranged.config.extra == "error":
        arranged = replace(arranged, config=arranged.config.replace(extra="average"))
    if not arranged.experts:
        return arranged
    base, (first, *others) = arranged.base, arranged.experts.values()
    in_none = [
        name
        for name, spec in base.specs.items()
        if not spec.dtype.is_floating_point and not any(name in expert.specs for expert in (first, *others))
    ]
    in_all = {
        name: part
        for name, part in first.tensors.items()
        if name not in base.specs
        and not part.spec.dtype.is_floating_point
        and all(expert.specs.get(name) == part.spec for expert in others)
    }
    return replace(arranged, base=base.without(in_none).having(in_all))


def _unfactored(arranged: Arranged) -> Arranged:
    """Effort's W + U diag(S) V as one weight in everyone, and the output's factors such that they add nothing.

    The output has the first expert's U and V and S = 0, so that it loads into the detector it came from and computes
    with the merged weight alone.
    """
    beginnings = _beginnings(arranged.experts.values())
    if not beginnings:
        raise BadOption(f"preset effort: no expert has a tensor that ends in .{MAIN}")
    base = _folded(arranged.base, beginnings).renamed({start + PLAIN: start + MAIN for start in beginnings})
    first = next(iter(arranged.experts.values()))
    endings = (*FACTORS, *FROZEN)
    there = {start + ending: ending for start in beginnings for ending in endings if start + ending in first.tensors}
    rest = {
        name: zeros(first.specs[name]) if ending == "S_residual" else first.tensors[name]
        for name, ending in there.items()
    }
    return Arranged(
        base.having(rest),
        {name: _folded(view, beginnings) for name, view in arranged.experts.items()},
        _with_globs(arranged.config, "keep", (f"*.{ending}" for ending in endings)),
        folded=[start + MAIN for start in beginnings],
    )


def _beginnings(views: Iterable[View]) -> list[str]:
    """What stands before ``weight_main`` in the names of layers whose weight is a sum."""
    return sorted({name[: -len(MAIN)] for view in views for name in view.tensors if name.rpartition(".")[2] == MAIN})


def _folded(view: View, beginnings: Iterable[str]) -> View:
    whole: dict[str, LazyTensor] = {}
    for start in beginnings:
        names = [start + ending for ending in (MAIN, *FACTORS)]
        there = [name for name in names if name in view.tensors]
        if len(there) == len(names):
            shapes = [view.specs[name].shape for name in names]
            (m, n), r = (shapes[0], shapes[2][0]) if list(map(len, shapes)) == [2, 2, 1, 2] else ((0, 0), 0)
            if shapes[1:] != [(m, r), (r,), (r, n)]:
                raise BadCheckpoint(
                    f"{view.label}: {quoted(names[0])}: expected factors of shapes (m, r), (r,) and (r, n) beside its "
                    f"(m, n), got {', '.join(map(str, shapes[1:]))} beside {shapes[0]}"
                )
            whole[names[0]] = folded(*(view.tensors[name] for name in names))
        elif there and there != [names[0]]:
            missing = next(name for name in names if name not in there)
            raise BadCheckpoint(f"{view.label}: has {quoted(there[0])} and lacks {quoted(missing)}")
    return view.having(whole).without([start + ending for start in beginnings for ending in (*FACTORS, *FROZEN)])


def _with_head(arranged: Arranged, rule: str, arrangement: Arrangement) -> Arranged:
    """What ``rule`` says of the classifier: averaged, merged like the rest, or one that is kept."""
    base, config = arranged.base, arranged.config.replace(head="merge")
    kind, chosen = _head_rule(rule, arranged.experts)
    if kind == "merge":
        return replace(arranged, config=config)
    owner = base if kind == "base" else arranged.experts[chosen if kind == "expert" else next(iter(arranged.experts))]
    names = _named_classifier(owner, arrangement.head_tensors)
    exact = [literal(name) for name in names]
    if kind == "mean":
        if not arrangement.head_tensors:
            return replace(arranged, config=config.replace(head="mean"), head=names)
        other = [name for name in names if name in base.specs and base.specs[name].shape != owner.specs[name].shape]
        arranged, base = replace(arranged, base=base.without(other)), base.without(other)
        if config.extra == "error" and any(name not in base.specs for name in names):
            config = config.replace(extra="average")
        return replace(arranged, config=_with_globs(config, "average", exact), head=names)
    features = None
    if kind == "expert":
        base = base.having({name: owner.tensors[name] for name in names})
    if kind == "refit":
        if arrangement.head_features is None:
            raise BadOption("head: refit needs features of the merged model (head_features)")
        measured = refit.read_features(arrangement.head_features)
        fitted = refit.head({name: owner.specs[name].shape for name in names}, measured, chosen or refit.RULES[0])
        base = base.having({name: constant(one.to(owner.specs[name].dtype)) for name, one in fitted.items()})
        features = measured.digest
    return replace(arranged, base=base, config=_with_globs(config, "keep", exact), head=names, features=features)


def _head_rule(rule: str, experts: Iterable[str]) -> tuple[str, str]:
    """``"expert:NAME"`` as its two halves."""
    kind, _, chosen = rule.partition(":")
    known = {
        "mean": not chosen,
        "merge": not chosen,
        "base": not chosen,
        "expert": bool(chosen),
        "refit": chosen in ("", *refit.RULES),
    }
    if not known.get(kind, False):
        raise BadOption(f"head: expected mean, merge, base, expert:NAME, refit or refit:logistic, got {quoted(rule)}")
    if kind == "expert" and chosen not in experts:
        raise BadOption(f"head: no expert is called {quoted(chosen)}{checks.did_you_mean(chosen, experts)}")
    return kind, chosen


def _classifier(view: View, globs: tuple[str, ...]) -> list[str]:
    """Names of a classifier's tensors: those that fit a glob, or that look like one's."""
    chosen = [name for name in view.specs if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
    return [name for name in (chosen if globs else classifier(view.specs)) if view.specs[name].dtype.is_floating_point]


def _named_classifier(view: View, globs: tuple[str, ...]) -> list[str]:
    """The same, for who has asked for it."""
    names = _classifier(view, globs)
    if not names:
        meant = f"fits {', '.join(map(quoted, globs))}" if globs else "looks like a classifier; name it (head_tensors)"
        raise BadOption(f"head: no tensor of {view.label} {meant}")
    return names


def _with_globs(config: MergeConfig, option: str, globs: Iterable[str]) -> MergeConfig:
    """The configuration with more names in one of its options."""
    more: dict[str, Any] = {option: tuple(dict.fromkeys((*getattr(config, option), *globs)))}
    return config.replace(**more)
