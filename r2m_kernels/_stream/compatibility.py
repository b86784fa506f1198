"""Whether checkpoints fit together at all, and the tensor plan of those that do (README §1)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from .. import checks
from ..config import MergeConfig
from ..errors import BadOption, DoesNotFit, printable, quoted
from ..heads import classifier
from ..meanings import refusal
from .plan import Plan, PlannedTensor, fits, goes_by_factors, residual_rank
from .tensors import FLOATING, LowRankSource, TensorSource, TensorSpec, dtype_name

# Mismatches of one checkpoint that are all shown; of more there are counts, by how names begin, and examples.
LISTED, EXAMPLES, BEGINNINGS = 6, 3, 4
DESCRIBED, NAMED = 2, 5  # checkpoints whose mismatches are shown, and that are named at all
# A matrix is merged by its task vectors' factors if its short side is this many times all their columns.
FACTORED_SHARE = 4
STATISTICS = ("running_mean", "running_var")


def plan(base: TensorSource, experts: Mapping[str, TensorSource], config: MergeConfig) -> Plan:
    """Classify every tensor.

    Raises:
        InvalidInput: no experts, nothing to merge, or checkpoints that do not fit; *all* mismatches are counted.
    """
    if not experts:
        raise BadOption("experts: expected at least one, got none")
    if config.weights is not None:
        checks.same_length("weights", config.weights, len(experts))
    extras = _extras(base, experts)
    own = _own_heads(base, experts, config)
    problem = _mismatches(base, experts, extras, own, config)
    if problem is not None:
        raise problem
    aliases = {
        name: first
        for name, first in base.aliases.items()
        if all(source.aliases.get(name) == first for source in experts.values())
    }
    tied: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        tied.setdefault(first, []).append(alias)
    heads = [*own.specs] or _heads(base, extras, aliases, config)
    tensors = [
        PlannedTensor(name, spec, "statistic")
        if name in heads
        else _planned(name, spec, config, [name, *tied.get(name, ())], len(experts))
        for name, spec in base.specs.items()
        if name not in aliases and name not in own.replaced
    ]
    if goes_by_factors(config):
        # Once for all tensors: what asks for methods is slow.
        low = [source for source in experts.values() if isinstance(source, LowRankSource)]
        if len(low) == len(experts):
            tensors = [_with_changes(one, low) if one.role in ("matrix", "vector") else one for one in tensors]
    if not any(tensor.role != "copied" for tensor in tensors):
        raise DoesNotFit(
            f"{base.label}: nothing to merge, none of its {len(tensors)} tensors holds floating-point numbers"
        )
    added = {**(extras if config.extra == "average" else {}), **own.specs}
    tensors += [PlannedTensor(name, spec, "extra") for name, spec in added.items()]
    dropped = [name for name in extras if name not in added] if config.extra == "drop" else []
    dropped += [name for name in own.replaced if name not in own.specs]
    return Plan(tuple(tensors), aliases, tied, tuple(dropped), tuple(heads))


class _OwnHeads(NamedTuple):
    """A classifier that all experts have and the base does not, as for another number of classes.

    Attributes:
        specs: of its tensors.
        replaced: the base's tensors that it stands for.
    """

    specs: dict[str, TensorSpec]
    replaced: tuple[str, ...]


def _own_heads(base: TensorSource, experts: Mapping[str, TensorSource], config: MergeConfig) -> _OwnHeads:
    """Where heads are averaged, and nothing says what becomes of this one."""
    if config.head != "mean" or config.extra == "drop":
        return _OwnHeads({}, ())
    names = classifier(next(iter(experts.values())).specs)
    specs = {name: spec for name in names if (spec := _common(name, experts)) is not None}
    new = [name for name, spec in specs.items() if name not in base.specs or base.specs[name].shape != spec.shape]
    tied = {*base.aliases, *base.aliases.values()} & {*names}
    if len(specs) < len(names) or not new or tied or fits(names, config.keep):
        return _OwnHeads({}, ())
    nowhere = [name for name in classifier(base.specs) if not any(name in one.specs for one in experts.values())]
    return _OwnHeads(specs, tuple(name for name in (*specs, *nowhere) if name in base.specs))


def _heads(
    base: TensorSource, extras: Mapping[str, TensorSpec], aliases: Mapping[str, str], config: MergeConfig
) -> list[str]:
    """The classifier's tensors where they are averaged; one that is tied to another layer's is that layer."""
    if config.head != "mean":
        return []
    specs = {**base.specs, **extras}
    names = classifier(specs)
    merged = base.specs if config.extra == "drop" else specs
    shared = {name.rpartition(".")[0] for name in (*aliases, *aliases.values())}
    return [
        name
        for name in names
        if name in merged and name.rpartition(".")[0] not in shared and not fits([name], config.keep)
    ]


def _planned(name: str, spec: TensorSpec, config: MergeConfig, names: list[str], count: int) -> PlannedTensor:
    """The role of a tensor that goes by ``names``; ``name`` is the first of them."""
    if not spec.dtype.is_floating_point or spec.numel == 0 or fits(names, config.keep):
        return PlannedTensor(name, spec, "copied")
    if name.rpartition(".")[2] in STATISTICS or fits(names, config.average):
        return PlannedTensor(name, spec, "statistic")
    if len(spec.shape) < 2 or fits(names, config.exclude):
        return PlannedTensor(name, spec, "vector")
    rank = residual_rank(config, name, spec.shape, count)
    return PlannedTensor(name, spec, "matrix", rank, config.eta != 0 and config.spectrum != "truncate")


def _with_changes(tensor: PlannedTensor, experts: Sequence[LowRankSource]) -> PlannedTensor:
    """With the ranks of its task vectors, where all are known and far below its own."""
    ranks = [rank for source in experts if (rank := source.change_rank(tensor.name)) is not None]
    most = min(tensor.matrix_shape) // FACTORED_SHARE if tensor.role == "matrix" else 0
    few = len(ranks) == len(experts) and sum(ranks) <= most
    return replace(tensor, change_ranks=tuple(ranks)) if few else tensor


def _extras(base: TensorSource, experts: Mapping[str, TensorSource]) -> dict[str, TensorSpec]:
    """Floating-point tensors that every expert has, in one shape, and the base lacks; in the first expert's order."""
    names = (name for name in next(iter(experts.values())).specs if name not in base.specs)
    return {name: spec for name in names if (spec := _common(name, experts)) is not None}


def _common(name: str, experts: Mapping[str, TensorSource]) -> TensorSpec | None:
    """Of a floating-point tensor that every expert has in one shape."""
    specs = [source.specs[name] for source in experts.values() if name in source.specs]
    if len(specs) < len(experts) or any(one.dtype not in FLOATING or one.shape != specs[0].shape for one in specs):
        return None
    # The widest dtype: the order of experts must not matter.
    return TensorSpec(specs[0].shape, functools.reduce(torch.promote_types, (one.dtype for one in specs)))


def _mismatches(
    base: TensorSource,
    experts: Mapping[str, TensorSource],
    extras: Mapping[str, TensorSpec],
    own: _OwnHeads,
    config: MergeConfig,
) -> DoesNotFit | None:
    """Everything that does not fit; nothing when all does."""
    otherwise = [text for source in (base, *experts.values()) if (text := _meant_otherwise(source, config))]
    if otherwise:  # what else does not fit comes of it
        return DoesNotFit("\n".join(otherwise))
    reports: list[_Report] = []
    merged = {
        name: spec for name, spec in base.specs.items() if name not in own.replaced and not fits([name], config.keep)
    }
    unsupported = [name for name, spec in merged.items() if not _supported(spec)]
    if unsupported:
        described = {name: f"{quoted(name)} ({_describe(base.specs[name])})" for name in unsupported}
        reports.append(_Report(f"{base.label} cannot be merged", {"unsupported dtype": described}, ""))
    for source in experts.values():
        missing = {
            name: f"{quoted(name)} ({_describe(spec)})"
            for name, spec in merged.items()
            # Integer buffers such as position_ids come and go between library versions, and are the base's anyway.
            # One that is there and differs in shape or dtype still means another architecture.
            if name not in source.specs and spec.dtype.is_floating_point
        }
        unknown = {
            name: f"{quoted(name)} ({_describe(spec)}) is not in the base"
            for name, spec in source.specs.items()
            if name not in base.specs
            and name not in own.specs
            and (config.extra == "error" or name not in extras)
            and spec.dtype.is_floating_point
        }
        shapes, dtypes = {}, {}
        for name, spec in source.specs.items():
            expected = merged.get(name)
            if expected is None:
                continue
            if spec.shape != expected.shape:
                shapes[name] = f"{quoted(name)} expected {list(expected.shape)}, got {list(spec.shape)}"
            if not _compatible_dtypes(expected, spec):
                dtypes[name] = f"{quoted(name)} expected {dtype_name(expected.dtype)}, got {dtype_name(spec.dtype)}"
        kinds = {"missing": missing, "extra": unknown, "shape": shapes, "dtype": dtypes}
        if any(kinds.values()):
            sentence = f"{source.label} does not fit {base.label}"
            guess = _guess(base, source, {name: extras.get(name) for name in unknown}, config)
            reports.append(_Report(sentence, {kind: found for kind, found in kinds.items() if found}, guess))
    return _told(reports) if reports else None


def _meant_otherwise(source: TensorSource, config: MergeConfig) -> str:
    return refusal(source.label, source.specs, lambda names: all(fits([name], config.keep) for name in names))


class _Report(NamedTuple):
    """What is wrong with a checkpoint.

    Attributes:
        sentence: which.
        kinds: of mismatches: names of tensors, and what of each.
        guess: a likely cause, as a clause.
    """

    sentence: str
    kinds: Mapping[str, Mapping[str, str]]
    guess: str

    @property
    def total(self) -> int:
        """How many mismatches."""
        return sum(map(len, self.kinds.values()))

    @property
    def every(self) -> str:
        """All of them, a line for each."""
        lines = [f"{kind}: {one}" for kind, found in self.kinds.items() for one in found.values()]
        if len(lines) == 1:
            return f"{self.sentence}: {lines[0]}{self.guess}"
        return "\n  ".join([f"{self.sentence}, {self.total} mismatches{self.guess}:", *lines])

    @property
    def short(self) -> str:
        """All of a few, a line for each kind of many."""
        if self.total <= LISTED:
            return self.every
        lines = [_counted(kind, found) for kind, found in self.kinds.items()]
        return "\n  ".join([f"{self.sentence}, {self.total} mismatches{self.guess}:", *lines])


def _counted(kind: str, found: Mapping[str, str]) -> str:
    """``"missing: 212, head.* 200, neck.* 12, such as …"``."""
    if len(found) <= EXAMPLES:
        return f"{kind}: {'; '.join(found.values())}"
    beginnings = Counter(name.partition(".")[0] + ".*" * ("." in name) for name in found)
    common = ", ".join(f"{printable(start)} {count}" for start, count in beginnings.most_common(BEGINNINGS))
    others = f" and {len(beginnings) - BEGINNINGS} more" if len(beginnings) > BEGINNINGS else ""
    return f"{kind}: {len(found)} ({common}{others}), such as {'; '.join([*found.values()][:EXAMPLES])}"


def _told(reports: Sequence[_Report]) -> DoesNotFit:
    """Who has the same mismatches as another is only named, and of many the first ones are told."""
    lines, told = [], list[_Report]()
    for report in reports:
        if any(report.kinds == other.kinds for other in told) and report.total > 1:
            lines.append(f"{report.sentence}, by the same {report.total} mismatches")
        elif len(told) < DESCRIBED:
            lines.append(report.short)
            told.append(report)
    lines = lines[:NAMED]
    if len(lines) < len(reports):
        lines.append(f"{len(reports) - len(lines)} more do not fit")
    error = DoesNotFit("\n".join(lines))
    error.mismatches, every = sum(report.total for report in reports), "\n".join(one.every for one in reports)
    error.every = every if every != str(error) else ""
    return error


def _guess(
    base: TensorSource, source: TensorSource, extras: Mapping[str, TensorSpec | None], config: MergeConfig
) -> str:
    """A likely cause, as a clause that follows the sentence; empty when none is known.

    Args:
        base, source, config: what does not fit.
        extras: names that are too many, and what all experts have of them.
    """
    missing = [name for name in base.specs if name not in source.specs]
    unknown = [name for name in source.specs if name not in base.specs]
    if missing and unknown:
        for prefix in _prefixes(unknown):
            if all(name.removeprefix(prefix) in base.specs for name in unknown if name.startswith(prefix)):
                return f"; its names carry the prefix {quoted(prefix)} that the base's lack"
        for prefix in _prefixes(missing):
            if all(name.removeprefix(prefix) in source.specs for name in missing if name.startswith(prefix)):
                return f"; its names lack the prefix {quoted(prefix)} of the base's"
    shapes = [name for name, spec in base.specs.items() if source.specs.get(name, spec).shape != spec.shape]
    averaged = config.head == "mean" and config.extra != "drop"  # and so that is no way
    own = {*classifier(source.specs)}
    if averaged and not (missing or base.aliases) and {*shapes, *extras} <= own and (shapes or None in extras.values()):
        return "; the experts' classifiers differ, and those of one shape are averaged: --head expert:NAME keeps one's"
    if shapes and not missing and not averaged and set(shapes) <= own:
        return "; its classifier has other outputs than the base's: head='mean' (--head mean) averages the experts'"
    if extras and not missing and config.extra == "error" and None not in extras.values():
        way = (
            "head='mean' (--head mean)"
            if extras.keys() <= own and not averaged
            else "extra='average' (--extra average)"
        )
        return f"; every expert has it: a head the base lacks? {way} takes their mean"
    widths = {
        (expected.shape[-1], spec.shape[-1])
        for name, spec in source.specs.items()
        if (expected := base.specs.get(name)) is not None and spec.shape != expected.shape and spec.shape
        if expected.shape
    }
    known = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 384: "ViT-S", 192: "ViT-Ti"}
    for ours, theirs in sorted(widths):
        if ours != theirs and ours in known and theirs in known:
            return f"; looks like a {known[theirs]} ({theirs} wide) against a {known[ours]} ({ours} wide)"
    return ""


def _prefixes(names: Iterable[str]) -> list[str]:
    """First components of the names, such as ``module.``, most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        head, dot, _ = name.partition(".")
        if dot:
            counts[head + dot] = counts.get(head + dot, 0) + 1
    return sorted(counts, key=lambda prefix: (-counts[prefix], prefix))


def _supported(spec: TensorSpec) -> bool:
    return spec.dtype in FLOATING or not (spec.dtype.is_floating_point or spec.dtype.is_complex)


def _compatible_dtypes(expected: TensorSpec, got: TensorSpec) -> bool:
    if expected.dtype in FLOATING:
        return got.dtype in FLOATING
    return expected.dtype == got.dtype


def _describe(spec: TensorSpec) -> str:
    return f"{dtype_name(spec.dtype)} {list(spec.shape)}"
