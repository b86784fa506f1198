"""Beyond the table, on development seeds: features, more specialists, one that is bad, and what reports say of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from r2m.demo.evaluation import group_auc
from r2m.demo.resampling import Picture
from torch import Tensor

from bench.quality import settings
from bench.quality.groups import UNSEEN, all_families, groups_of
from bench.quality.judging import Pictures, mean_of
from bench.quality.methods import all_methods, merged
from bench.quality.models import Models, Run, StateDict
from bench.quality.networks import load_state
from bench.quality.store import GroupScores
from bench.quality.tables import DEFAULT
from r2m_kernels import MergeConfig, analyze, merge

# Rows that are followed, beside the ensemble: none of them has a choice.
FOLLOWED = ("weight average", "weight average × 1.2", "TSV-M × 1", DEFAULT)
ORDERS = (0, 1)  # of six specialists, added one at a time
UNEQUAL = 3.0  # times the norm of one specialist's task vector

Numbers = dict[str, Any]


def study(run: Run, known: Numbers) -> Numbers:
    """All of one run that is not known; what needs further specialists on some seeds alone."""
    looks: dict[str, Callable[[Run], Any]] = {"features": features, "diagnosis": diagnosis}
    if run.seed in settings.MANY:
        looks |= {"many": many, "robustness": robustness}
    return {name: known[name] if name in known else look(run) for name, look in looks.items()}


def many(run: Run) -> list[Numbers]:
    """One to six specialists, in several orders: mean AUC over all six families, and over the unseen ones."""
    models = Models(run)
    base = models.base()
    experts = {kind: models.specialist(kind) for kind in settings.MAIN + settings.FURTHER}
    unseen = UNSEEN[run.regime]
    pictures = Pictures({"six families": all_families(run), **groups_of(run, [unseen])})
    alone = {kind: _scored(run, [expert], pictures) for kind, expert in experts.items()}
    rows: list[Numbers] = []
    for order in ORDERS:
        kinds = [str(kind) for kind in np.random.default_rng([run.seed, order]).permutation(list(experts))]
        for count in range(1, len(kinds) + 1):
            some = kinds[:count]
            auc = _merged(run, base, [experts[kind] for kind in some], [alone[kind] for kind in some], pictures)
            rows.append({"order": order, "experts": some, "auc": auc})
    return rows


def robustness(run: Run) -> Numbers:
    """What one bad specialist does, and 16-bit storage: in-distribution and unseen AUC of each method."""
    models, pictures = Models(run), Pictures(groups_of(run, ["in-distribution", UNSEEN[run.regime]]))
    base, (fs, fr, efs) = models.trained()
    cases: dict[str, tuple[StateDict, list[StateDict]]] = {
        "as trained": (base, [fs, fr, efs]),
        "FR with shuffled labels": (base, [fs, models.shuffled("FR"), efs]),
        f"FR's task vector × {UNEQUAL:g}": (base, [fs, _lengthened(base, fr), efs]),
        "bfloat16 storage": (_cast(base, torch.bfloat16), [_cast(expert, torch.bfloat16) for expert in (fs, fr, efs)]),
    }
    return {
        case: _merged(run, start, states, [_scored(run, [state], pictures) for state in states], pictures)
        for case, (start, states) in cases.items()
    }


def _merged(
    run: Run, base: StateDict, experts: list[StateDict], alone: Sequence[GroupScores], pictures: Pictures
) -> Numbers:
    """AUC in every group of the ensemble, whose members' scores are ``alone``, and of what is followed."""
    methods = {method.name: method for method in all_methods()}
    scored = {"ensemble": mean_of(alone)}
    for row in FOLLOWED:
        (candidate,) = methods[row].candidates.values()
        scored[row] = _scored(run, merged(candidate, base, experts), pictures)
    return {row: {name: group_auc(group) for name, group in scores.items()} for row, scores in scored.items()}


def _scored(run: Run, states: Sequence[StateDict], pictures: Pictures) -> GroupScores:
    return pictures.split(pictures.scores(run, [_cast(state, torch.float32) for state in states]))


def diagnosis(run: Run) -> list[Numbers]:
    """What the report says of good and bad merges by the default, without data, beside how bad they are.

    Pairs and all three; one whose update is too long; and one that was fine-tuned from another base, which is the
    mistake that names and shapes cannot show: that of the next development seed. A pretrained backbone is the same
    for all seeds, so there only the head is another.
    """
    base, experts = Models(run).trained()
    pictures = Pictures(groups_of(run, ["in-distribution"]))
    seeds = settings.DEVELOPMENT
    elsewhere = Run(run.architecture, seeds[(seeds.index(run.seed) + 1) % len(seeds)], run.quick)
    stranger = Models(elsewhere).specialist("FR")
    known = dict(zip(settings.MAIN, experts, strict=True))
    known |= {"longer": _lengthened(base, known["FR"]), "stranger": stranger}
    alone = {name: _scored(run, [state], pictures) for name, state in known.items()}
    cases = {"+".join(kinds): kinds for kinds in itertools.combinations(settings.MAIN, 2)}
    cases["+".join(settings.MAIN)] = settings.MAIN
    cases[f"FR's update × {UNEQUAL:g}"] = ("FS", "longer", "EFS")
    cases["FR of another base"] = ("FS", "stranger", "EFS")
    rows = []
    for case, names in cases.items():
        members = [known[name] for name in names]
        ensemble = mean_of([alone[name] for name in names])["in-distribution"]
        ours = _scored(run, [merge(base, members)], pictures)["in-distribution"]
        shortfall = group_auc(ensemble) - group_auc(ours)
        rows.append({"case": case, "shortfall": shortfall, "report": _report(base, members)})
    return rows


def features(run: Run) -> Numbers:
    """The paper's analysis: how alike features are between models, and how far apart Real and Fake lie.

    Cosines are of a picture's features in two models, each minus that model's mean over all pictures. ``separation``:
    distance of the means of Fake and Real along their common direction, over the standard deviation along it;
    ``off axis``: standard deviation of what lies across that direction, a dimension, over the same distance;
    ``common``: length of the mean of the specialists' unit axes from Real to Fake, 1 where all have the same.
    """
    base, experts = Models(run).trained()
    configs = {"weight average": MergeConfig.weight_average(), DEFAULT: MergeConfig.r2m()}
    merges = {name: merge(base, experts, config) for name, config in configs.items()}
    states = {"base": base, **dict(zip(settings.MAIN, experts, strict=True)), **merges}
    group = groups_of(run, ["in-distribution"])["in-distribution"]
    real = {name: _features(run, state, group.real) for name, state in states.items()}
    forged = np.concatenate(list(group.forged.values()))
    fake = {name: _features(run, state, forged) for name, state in states.items()}
    names = list(states)
    middle = {name: torch.cat([real[name], fake[name]]).mean(0) for name in names}

    def alike(of: dict[str, Tensor]) -> list[list[float]]:
        units = {name: torch.nn.functional.normalize(of[name] - middle[name], dim=1) for name in names}
        return [[float((units[a] * units[b]).sum(1).mean()) for b in names] for a in names]

    spread, axes = {}, {}
    for name in names:
        apart = fake[name].mean(0) - real[name].mean(0)
        axes[name] = axis = apart / apart.norm()
        within = torch.cat([real[name] - real[name].mean(0), fake[name] - fake[name].mean(0)])
        along = within @ axis
        across = within - along.unsqueeze(1) * axis
        spread[name] = {
            "separation": float(apart.norm() / along.std()),
            "off_axis": float((across.square().sum(1).mean() / (len(axis) - 1)).sqrt() / apart.norm()),
            "size": float(within.norm(dim=1).mean()),
        }
    common = float(torch.stack([axes[kind] for kind in settings.MAIN]).mean(0).norm())
    return {"models": names, "real": alike(real), "fake": alike(fake), "spread": spread, "common": common}


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
