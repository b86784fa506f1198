"""Beyond the table: sweeps, more specialists, something wrong with one of them, features, heads, identities."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from r2m.demo.evaluation import Scores
from r2m.demo.resampling import Picture
from r2m.demo.samples import Group
from torch import Tensor

from bench.quality import methods, settings
from bench.quality.groups import all_families, groups_of, validation_group
from bench.quality.judging import aucs, mean_of, score
from bench.quality.models import Models, Run, StateDict
from bench.quality.networks import load_state
from r2m_kernels import MergeConfig, analyze, merge

RANKS = (0.05, 0.1, 0.2, 0.4, 1.0)
STRENGTHS = (0.0, 0.15, 0.3, 0.6, 1.0, 1.5)
SCALES = (0.6, 0.8, 1.0, 1.2, 1.4, 1.7)
ORDERS = 2  # in which six specialists are added one at a time
UNEQUAL = 3.0  # times the norm of one specialist's task vector
LOOKED_AT = ("in-distribution", "unseen")

Numbers = dict[str, Any]


def sweeps(run: Run) -> Numbers:
    """AUC over rank, η and scale, in-distribution and unseen: curves to look at, not to choose from."""
    (base, experts), groups = Models(run).trained(), groups_of(run, LOOKED_AT)
    curves: dict[str, list[tuple[float, MergeConfig]]] = {
        "rank": [(value, MergeConfig.r2m(rank=value)) for value in RANKS],
        "eta": [(value, MergeConfig.r2m(eta=value)) for value in STRENGTHS],
        "scale": [(value, MergeConfig.r2m(core_scale=value)) for value in SCALES],
        "scale of the average": [(value, MergeConfig.weight_average().replace(core_scale=value)) for value in SCALES],
    }
    return {
        name: [[value, aucs(score(run, merge(base, experts, config), groups))] for value, config in curve]
        for name, curve in curves.items()
    }


def many(run: Run, configs: Mapping[str, methods.Candidate]) -> Numbers:
    """One to six specialists, in several orders: mean AUC over all six families, and over the unseen ones.

    Args:
        run: whose specialists.
        configs: row → how it merges.
    """
    models = Models(run)
    base = models.base()
    experts = {kind: models.specialist(kind) for kind in settings.MAIN + settings.FURTHER}
    groups = {"six families": all_families(run), **groups_of(run, ["unseen"])}
    rows: list[Numbers] = []
    for order in range(ORDERS):
        kinds = [str(kind) for kind in np.random.default_rng([run.seed, order]).permutation(list(experts))]
        for count in range(1, len(kinds) + 1):
            numbers = _merged(run, configs, base, [experts[kind] for kind in kinds[:count]], groups)
            rows.append({"order": order, "experts": kinds[:count], **numbers})
    return {"merges": rows}


def robustness(run: Run, configs: Mapping[str, methods.Candidate]) -> Numbers:
    """What one bad specialist does, and 16-bit storage: in-distribution and unseen AUC of each method."""
    models, groups = Models(run), groups_of(run, LOOKED_AT)
    base, (fs, fr, efs) = models.trained()
    cases: dict[str, tuple[StateDict, list[StateDict]]] = {
        "as trained": (base, [fs, fr, efs]),
        "FR with shuffled labels": (base, [fs, models.shuffled("FR"), efs]),
        f"FR's task vector × {UNEQUAL:g}": (base, [fs, _lengthened(base, fr), efs]),
        "bfloat16 storage": (_cast(base, torch.bfloat16), [_cast(expert, torch.bfloat16) for expert in (fs, fr, efs)]),
    }
    if run.seed == settings.MANY[0]:
        cases["FR trained ten times as long"] = (base, [fs, models.overtrained("FR"), efs])
    return {case: _merged(run, configs, *states, groups) for case, states in cases.items()}


def _merged(
    run: Run,
    configs: Mapping[str, methods.Candidate],
    base: StateDict,
    experts: list[StateDict],
    groups: Mapping[str, Group],
) -> Numbers:
    """AUC of the ensemble and of every merge in every group, and the numbers of the report."""
    scored = {"ensemble": mean_of([score(run, _cast(expert, torch.float32), groups) for expert in experts])}
    for row, config in configs.items():
        states = methods.merged(config, base, experts)
        scored[row] = mean_of([score(run, _cast(state, torch.float32), groups) for state in states])
    return {"auc": {row: aucs(scores) for row, scores in scored.items()}, "report": _report(base, experts)}


def diagnosis(run: Run, elsewhere: Run) -> list[Numbers]:
    """What the report says of good and bad merges by the default, without data, beside how bad they are.

    Pairs and all three; one whose update is too long; and one that was fine-tuned from another base, which is the
    mistake that names and shapes cannot show.

    Args:
        run: whose specialists.
        elsewhere: a run of the same architecture, whose specialist is the stranger.
    """
    (base, experts), groups = Models(run).trained(), groups_of(run, ["in-distribution"])
    known = dict(zip(settings.MAIN, experts, strict=True))
    stranger = Models(elsewhere).specialist("FR")
    cases = {"+".join(kinds): [known[kind] for kind in kinds] for kinds in itertools.combinations(settings.MAIN, 2)}
    cases["+".join(settings.MAIN)] = experts
    cases[f"FR's update × {UNEQUAL:g}"] = [experts[0], _lengthened(base, experts[1]), experts[2]]
    cases["FR of another base"] = [experts[0], stranger, experts[2]]
    rows = []
    for case, members in cases.items():
        numbers = _merged(run, {"R2M": MergeConfig.r2m()}, base, members, groups)
        ensemble, merged = (numbers["auc"][row]["in-distribution"] for row in ("ensemble", "R2M"))
        rows.append({"case": case, "shortfall": ensemble - merged, "report": numbers["report"]})
    return rows


def analysis(run: Run) -> Numbers:
    """Features, heads and identities of the average and of R²M by default."""
    base, experts = Models(run).trained()
    configs = {"weight average": MergeConfig.weight_average(), "R2M": MergeConfig.r2m()}
    merged = {name: merge(base, experts, config) for name, config in configs.items()}
    return {"features": features(run, merged), "heads": heads(run, merged), "identities": identities(run, configs)}


def features(run: Run, merged: Mapping[str, StateDict]) -> Numbers:
    """The paper's analysis: how alike features are between models, and how far apart Real and Fake lie.

    Cosines are of a picture's features in two models, each minus that model's mean over all pictures. ``separation``:
    distance of the means of Fake and Real along their common direction, over the standard deviation along it;
    ``off axis``: standard deviation of what lies across that direction, a dimension, over the same distance.
    """
    base, experts = Models(run).trained()
    states = {"base": base, **dict(zip(settings.MAIN, experts, strict=True)), **merged}
    group = groups_of(run, ["in-distribution"])["in-distribution"]
    real = {name: _features(run, state, group.real) for name, state in states.items()}
    forged = np.concatenate(list(group.forged.values()))
    fake = {name: _features(run, state, forged) for name, state in states.items()}
    names = list(states)
    middle = {name: torch.cat([real[name], fake[name]]).mean(0) for name in names}

    def alike(of: Mapping[str, Tensor]) -> list[list[float]]:
        units = {name: torch.nn.functional.normalize(of[name] - middle[name], dim=1) for name in names}
        return [[float((units[a] * units[b]).sum(1).mean()) for b in names] for a in names]

    spread = {}
    for name in names:
        apart = fake[name].mean(0) - real[name].mean(0)
        axis = apart / apart.norm()
        within = torch.cat([real[name] - real[name].mean(0), fake[name] - fake[name].mean(0)])
        along = within @ axis
        across = within - along.unsqueeze(1) * axis
        spread[name] = {
            "separation": float(apart.norm() / along.std()),
            "off_axis": float((across.square().sum(1).mean() / (len(axis) - 1)).sqrt() / apart.norm()),
            "size": float(within.norm(dim=1).mean()),
        }
    return {"models": names, "real": alike(real), "fake": alike(fake), "spread": spread}


def heads(run: Run, trunks: Mapping[str, StateDict]) -> Numbers:
    """AUC of one merged trunk with several heads: mean, each expert's, refit on the validation people, or combined."""
    (_, experts), groups, known = Models(run).trained(), groups_of(run, LOOKED_AT), validation_group(run)
    by_trunk: Numbers = {}
    single = {f"{kind}'s": _head(expert) for kind, expert in zip(settings.MAIN, experts, strict=True)}
    for trunk, state in trunks.items():
        features_of = functools.partial(_features, run, state)
        forged = torch.cat([features_of(pictures) for pictures in known.forged.values()])
        linear = {"mean": _head(state), **single, "refit": _fit(features_of(known.real), forged)}
        by_trunk[trunk] = {}
        for name, group in groups.items():
            parts = {kind: features_of(pictures) for kind, pictures in {"real": group.real, **group.forged}.items()}
            logits = {label: {kind: _logit(x, head) for kind, x in parts.items()} for label, head in linear.items()}
            several = {kind: np.stack([logits[label][kind] for label in single]) for kind in parts}
            logits["largest of three"] = {kind: value.max(0) for kind, value in several.items()}
            logits["log-sum-exp of three"] = {kind: np.logaddexp.reduce(value, 0) for kind, value in several.items()}
            for label, auc in aucs(logits).items():
                by_trunk[trunk].setdefault(label, {})[name] = auc
    return by_trunk


def identities(run: Run, configs: Mapping[str, MergeConfig]) -> Numbers:
    """What must hold whatever is merged: distances of weights relative to the update, and a difference of AUC."""
    base, experts = Models(run).trained()
    average = merge(base, experts, MergeConfig.weight_average())
    whole = MergeConfig.r2m(rank=1.0, core_mode="mean", norm_match=False)
    distance = _distance(base, merge(base, experts, whole), average)
    groups = groups_of(run)
    numbers: Numbers = {"full rank, η = 1, no matching: distance to the average": distance}
    for name, config in configs.items():
        three = merge(base, experts, config)
        two = merge(base, experts[:2], config)
        again = merge(base, [two, experts[2]], config.replace(weights=(2, 1)))
        alike, apart = (aucs(score(run, state, groups)) for state in (three, again))
        apart_by = max(abs(alike[group] - apart[group]) for group in groups)
        numbers[f"{name}: two and one with counts against three"] = apart_by
    return numbers


def _report(base: StateDict, experts: Sequence[StateDict]) -> Numbers:
    """The numbers of the report that could tell a bad merge, without data."""
    report = analyze(base, list(experts)).report()
    coefficients = [abs(value) for value in report["core"]["coefficients"].values()]
    norms = list(report["task_vectors"]["norms"].values())
    cosines = torch.tensor(report["task_vectors"]["cosines"])
    count = len(experts)
    off = cosines[~torch.eye(count, dtype=torch.bool)]
    return {
        "‖core‖/‖mean‖": report["core"]["norm_ratio_to_mean"],
        "leading expert's share of the core": max(coefficients) / sum(coefficients),
        "largest scale": max(report["residual"]["scales"].values()),
        "mean/mean norm": report["core"]["mean_norm"] / float(np.mean(norms)),
        "largest/smallest task vector": max(norms) / min(norms),
        "longest/median task vector": max(norms) / float(np.median(norms)),
        "smallest cosine": float(off.min()) if count > 1 else None,
        "mean cosine": float(off.mean()) if count > 1 else None,
        "gap": report["core"]["gap"],
        "warnings": report["warnings"],
    }


def _lengthened(base: StateDict, expert: StateDict) -> StateDict:
    """An expert whose task vector is ``UNEQUAL`` times as long, without the running statistics'."""
    return {
        name: base[name] + UNEQUAL * (tensor - base[name])
        if tensor.is_floating_point() and not name.endswith(("running_mean", "running_var"))
        else tensor
        for name, tensor in expert.items()
    }


def _cast(state: StateDict, dtype: torch.dtype) -> StateDict:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _features(run: Run, state: StateDict, pictures: Picture, batch: int = 64) -> Tensor:
    backbone = load_state(run.architecture, state).backbone
    with torch.inference_mode():
        parts = [backbone(torch.from_numpy(pictures[at : at + batch])) for at in range(0, len(pictures), batch)]
    return torch.cat(parts).double()


def _head(state: StateDict) -> tuple[Tensor, float]:
    """A two-logit head as one direction and an offset."""
    weight, bias = state["head.weight"].double(), state["head.bias"].double()
    return weight[1] - weight[0], float(bias[1] - bias[0])


def _logit(features_: Tensor, head: tuple[Tensor, float]) -> Scores:
    direction, offset = head
    return np.asarray((features_ @ direction + offset).numpy())


def _fit(real: Tensor, fake: Tensor, ridge: float = 0.1) -> tuple[Tensor, float]:
    """Linear discriminant in closed form, the covariance shrunk by a tenth of its mean variance."""
    within = torch.cat([real - real.mean(0), fake - fake.mean(0)])
    covariance = within.T @ within / len(within)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.linalg.solve(covariance, fake.mean(0) - real.mean(0)), 0.0


def _distance(base: StateDict, first: StateDict, second: StateDict) -> float:
    apart = sum(float((first[name].double() - second[name].double()).square().sum()) for name in base)
    moved = sum(float((base[name].double() - second[name].double()).square().sum()) for name in base)
    return float(np.sqrt(apart / moved))
