"""What the ideas did on development runs: ``python -m bench.quality.trials [RUN …]``.

Every run gets a file of its own beside its detectors, written idea by idea, so that it goes on where it stopped.
``bench/results/quality_ideas.json`` and docs/quality-ideas.md are of whatever is there. Validation people and test
people both: development seeds are for looking, and no fresh seed is touched.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any

import numpy as np
import torch
from r2m.demo.evaluation import Scores, ensemble, group_auc, score
from r2m.demo.samples import Group

from bench.machine import ROOT
from bench.markdown import table, update
from bench.quality import element_ideas, ideas, residual_ideas, settings
from bench.quality.decorrelated import compressed_ensemble, core_at_full_length, decorrelated, mean_of
from bench.quality.groups import UNSEEN, groups_of, validation_group
from bench.quality.methods import CHOSEN, A, Candidate, averaged, key, lengthened, merged, words_of
from bench.quality.models import CACHE, Models, Run, StateDict, run_among, runs_of
from bench.quality.networks import load_state
from bench.quality.tables import short
from r2m_kernels import MergeConfig

TIES = MergeConfig.ties(0.2, 1.2)  # what validation picks on mobilenet
KNOWN: dict[str, Candidate] = {
    "R2M": A,
    "weight average": averaged(1.0),
    "weight average × 1.2": averaged(1.2),
    "R2M by rows on whole residuals": A.replace(rank=1.0, row_power=3.0, head="merge"),
    "R2M by rows, rank .4": A.replace(rank=0.4, row_power=3.0),
    "R2M by rows, rank .2": A.replace(rank=0.2, row_power=3.0),
    "R2M × 1.2": lengthened(1.2),
    "R2M, rank .3": A.replace(rank=0.3),
    "R2M decorrelated": partial(decorrelated),
    "TSV-M × 1": MergeConfig.tsv_m(1.0),
    "R2M, core not restored": A.replace(core_mode="mean"),
    "R2M, core not restored, η 1.5": A.replace(core_mode="mean", eta=1.5),
    "R2M, core not restored, rank .3": A.replace(core_mode="mean", rank=0.3),
    "R2M, η .5": A.replace(eta=0.5),
    "R2M, core at full length": partial(core_at_full_length, config=A),
    "TSV-M × 1.2": MergeConfig.tsv_m(1.2),
    "mean of R2M and TSV-M": partial(mean_of, configs=(A, MergeConfig.tsv_m())),
    "R2M decorrelated, by tensor": partial(decorrelated, by_tensor=True),
    "R2M decorrelated, K1": partial(decorrelated, residual="matched"),
    "TIES, density .2, × 1.2": TIES,
    "compressed ensemble, rank 0.05": partial(compressed_ensemble),
}
IDEAS: dict[str, Candidate] = {
    "small matrices whole": A.replace(whole_up_to=16),
    "by rows, rank .4, small matrices whole": CHOSEN,
    "rank .3, small matrices whole": A.replace(rank=0.3, whole_up_to=16),
    "by rows, rank .4, core not restored": A.replace(rank=0.4, row_power=3.0, core_mode="mean"),
    "by rows, rank .4, the mean as core": A.replace(rank=0.4, row_power=3.0, real_rank=None),
    "by rows, rank .4, k = 2": A.replace(rank=0.4, row_power=3.0, real_rank=2),
    "one power step from the mean": partial(ideas.core_towards, steps=1),
    "one power step from the mean, by rows, rank .4": partial(ideas.core_towards, steps=1, rank=0.4, row_power=3.0),
    "Real direction of unit task vectors": partial(ideas.core_towards, steps=None, unit=True),
    "one power step of unit task vectors, not restored": partial(ideas.core_towards, steps=1, unit=True, restored=0.0),
    "R2M, the mean as core": A.replace(real_rank=None),
    "R2M, the mean as core, not restored": A.replace(real_rank=None, core_mode="mean"),
    "by rows, power 2, rank .4": A.replace(rank=0.4, row_power=2.0),
    "by rows, power 1, rank .4": A.replace(rank=0.4, row_power=1.0),
    "by rows, rank .4, η 1.2": A.replace(rank=0.4, row_power=3.0, eta=1.2),
    "vectors plain": partial(ideas.vectors_plain),
    "R2M + .5 O": partial(ideas.with_outside, strength=0.5),
    "R2M + O": partial(ideas.with_outside, strength=1.0),
    "R2M × 1.2 + O": partial(ideas.with_outside, strength=1.0, scale=1.2),
    "R2M × 1.2 + 1.5 O": partial(ideas.with_outside, strength=1.5, scale=1.2),
    "R2M × 1.2 + 1.5 O by clarity": partial(ideas.with_outside, strength=1.5, scale=1.2, clarity=1.0),
    "R2M × 1.2 + 1.5 O by clarity squared": partial(ideas.with_outside, strength=1.5, scale=1.2, clarity=2.0),
    "R2M × 1.2 + 1.5 O below a move of 5 %": partial(ideas.with_outside, strength=1.5, scale=1.2, border=0.05),
    "depthwise residuals whole": partial(residual_ideas.ranks_by_kind, depthwise=1.0),
    "spatial and depthwise residuals at rank .3": partial(residual_ideas.ranks_by_kind, depthwise=0.3, spatial=0.3),
    "no depthwise residuals": partial(residual_ideas.strength_by_kind, depthwise=0.0),
    "pointwise residuals × 1.5": partial(residual_ideas.strength_by_kind, pointwise=1.5),
    "vectors' residuals × 1.5": partial(residual_ideas.strength_by_kind, vector=1.5),
    "rank rising with depth, .02 to .2": partial(residual_ideas.by_depth, rank=(0.02, 0.2)),
    "rank falling with depth, .2 to .02": partial(residual_ideas.by_depth, rank=(0.2, 0.02)),
    "residuals stronger with depth, .5 to 1.5": partial(residual_ideas.by_depth, eta=(0.5, 1.5)),
    "residuals weaker with depth, 1.5 to .5": partial(residual_ideas.by_depth, eta=(1.5, 0.5)),
    "kernels' places as rows": partial(residual_ideas.taps),
    "core by block": partial(ideas.core_by, unit="block"),
    "core by kind of layer": partial(ideas.core_by, unit="kind"),
    "core with layers relative to the base": partial(ideas.core_by, unit="base"),
    "norms matched by layer": partial(residual_ideas.matched_by, unit="layer"),
    "norms matched by block": partial(residual_ideas.matched_by, unit="block"),
    "matched to the geometric mean": partial(residual_ideas.matched_to, mean="geometric"),
    "matched to the longest": partial(residual_ideas.matched_to, mean="largest"),
    "matched to lengths before truncation": partial(residual_ideas.matched_to, mean="whole"),
    "residuals restored, power .5": partial(residual_ideas.residual_restored, power=0.5),
    "residuals restored, power 1": partial(residual_ideas.residual_restored, power=1.0),
    "last layer's residuals by the head": partial(residual_ideas.weighed_by_head, power=0.5),
    "directions on which all residuals agree": partial(residual_ideas.agreeing_directions, every=True),
    "directions on which most residuals agree": partial(residual_ideas.agreeing_directions, every=False),
    "core at rank .1, as long": partial(ideas.low_rank_core, rank=0.1),
    "core at rank .3, as long": partial(ideas.low_rank_core, rank=0.3),
    "core at rank .1, shorter": partial(ideas.low_rank_core, rank=0.1, lengthened=False),
    "core without the expert itself": partial(ideas.leave_one_out),
    "residuals by the optimal threshold": partial(residual_ideas.shrunk),
    "residuals by the optimal threshold, soft": partial(residual_ideas.shrunk, soft=True),
    "ranks shared between layers": partial(residual_ideas.ranks_together),
    "ranks shared between layers, relative to the base": partial(residual_ideas.ranks_together, relative=True),
    "residuals off the base's leading directions": partial(residual_ideas.off_base, share=0.1),
    "residuals in the base's leading directions": partial(residual_ideas.off_base, share=0.25, keep=True),
    "residuals without filters' sums": partial(residual_ideas.without_sums),
    "elements against the core halved": partial(residual_ideas.with_the_core, against=0.5),
    "residuals of the clear half of layers": partial(residual_ideas.clear_layers, share=0.5),
    "normalisation folded in": partial(ideas.folded),
    "merged in pairs": partial(ideas.in_pairs),
    "Löwdin by tensor": partial(ideas.loewdin),
    "Löwdin by tensor × .7": partial(ideas.loewdin, scale=0.7),
    "Löwdin over all": partial(ideas.loewdin, by_tensor=False),
    "elements by their size": partial(element_ideas.element_power, power=1.0),
    "elements by their size, power 3": partial(element_ideas.element_power, power=3.0),
    "residuals trimmed to .2 and elected": partial(element_ideas.elected, density=0.2),
    "specialists trimmed to .2, the default": partial(element_ideas.trimmed, density=0.2, then=CHOSEN),
    "specialists trimmed to .2, TSV-M × 1.2": partial(element_ideas.trimmed, density=0.2, then=MergeConfig.tsv_m(1.2)),
    "classifier restored, the default": partial(element_ideas.head_restored, then=CHOSEN),
    "classifier's change × 5, the default": partial(element_ideas.head_restored, then=CHOSEN, scale=5.0),
    "classifier's change × 5, TIES": partial(element_ideas.head_restored, then=TIES, scale=5.0),
}
IN_ORDER: dict[str, Candidate] = {
    "in the normalisation's metric, the default": partial(element_ideas.in_metric, then=CHOSEN),
    "in the normalisation's metric, TSV-M × 1.2": partial(element_ideas.in_metric, then=MergeConfig.tsv_m(1.2)),
    "in the normalisation's metric, TIES": partial(element_ideas.in_metric, then=TIES),
    "coefficients by tensor, distilled on dead leaves": partial(element_ideas.distilled),
    "coefficients by tensor, distilled twice as long": partial(element_ideas.distilled, steps=80),
}
"""For MobileNetV2 alone, whose layers follow each other as their names do."""
ENSEMBLE, AVERAGE = "ensemble", "weight average"
FOUND, PAGE = ROOT / "bench" / "results" / "quality_ideas.json", ROOT / "docs" / "quality-ideas.md"
COMMAND = "python -m bench.quality.trials"
EVERY = 2  # of the pictures one in so many is scored
# What is looked at: the choice's group, and what was not trained on.
INTRODUCTION = """# Ideas around R²M

What was tried on development seeds, and what came of it. Terms and setting stand in [quality.md](quality.md), each idea
in `bench/quality/ideas.py`, `residual_ideas.py` or `element_ideas.py`, the list in `trials.py`. Numbers are AUC minus
the weight average's, mean ± standard error over runs (runs above 0), on every second picture; *R2M* is residuals at
rank .1 with all rows alike, O what decorrelated task vectors have outside the span of the task vectors
(`decorrelated.py`).

Many ideas and few runs, often one to three: the best of so many is better than it is. These runs are for looking; what
is judged on fresh seeds stands in [quality.md](quality.md)."""
LOOKED_AT = {
    "scratch": ("cross", "unseen", "natural"),
    "pretrained": ("code", "neural"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = run_among(runs_of(settings.development_of))
    parser.add_argument(
        "runs", nargs="*", type=runs, help="such as mobilenet-0; none: the page, from what is committed"
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the ideas only such: '*trimmed*'")
    parser.add_argument("--check", action="store_true", help="only whether the page is what the JSON gives")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for run in options.runs:
        try_ideas(run, options.only)
    if options.runs:
        FOUND.write_text(json.dumps(tried(), indent=1, ensure_ascii=False) + "\n")
    return update(PAGE, page(json.loads(FOUND.read_text())), check=options.check, command=COMMAND)


def candidates_of(architecture: str) -> dict[str, Candidate]:
    """What is tried on it."""
    return KNOWN | IDEAS | (IN_ORDER if architecture == "mobilenet" else {})


def try_ideas(run: Run, only: str = "*") -> None:
    """All that is missing of a run, of ideas whose names are like ``only``."""
    path = CACHE / run.name / "ideas.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    (base, experts), groups = Models(run).trained(), _groups(run)
    if ENSEMBLE not in found:
        found[ENSEMBLE] = _aucs([_scores(run, expert, groups) for expert in experts])
    for name, candidate in candidates_of(run.architecture).items():
        if words_of(candidate) & found.keys() or not fnmatch(name, only):
            continue
        found[key(candidate)] = _aucs([_scores(run, state, groups) for state in merged(candidate, base, experts)])
        path.write_text(json.dumps(found, indent=1))
        print(run.name, name, {group: round(value, 3) for group, value in found[key(candidate)].items()}, flush=True)


def _groups(run: Run) -> dict[str, Group]:
    """What is looked at, from a file where it was made before: making the pictures takes as long as ten candidates."""
    path = CACHE / run.name / "ideas.npz"
    if not path.exists():
        made = {"validation": validation_group(run), **groups_of(run, LOOKED_AT[run.regime])}
        kinds = {name: {"real": group.real, **group.forged} for name, group in made.items()}
        np.savez(path, **{f"{name}/{kind}": p for name, of in kinds.items() for kind, p in of.items()})
    arrays: dict[str, dict[str, Any]] = {}
    for label, pictures in np.load(path).items():
        name, kind = label.split("/")
        arrays.setdefault(name, {})[kind] = pictures[::EVERY]
    return {name: Group(of.pop("real"), of) for name, of in arrays.items()}


def _scores(run: Run, state: StateDict, groups: Mapping[str, Group]) -> dict[str, dict[str, Scores]]:
    detector = load_state(run.architecture, state, folded=True)
    of_array: dict[bytes, Scores] = {}  # groups may share their real pictures
    made: dict[str, dict[str, Scores]] = {}
    for name, group in groups.items():
        made[name] = {}
        for kind, pictures in {"real": group.real, **group.forged}.items():
            content = pictures[:: max(1, len(pictures) // 8)].tobytes()
            if content not in of_array:
                of_array[content] = score(detector, pictures)
            made[name][kind] = of_array[content]
    return made


def _aucs(members: Sequence[Mapping[str, dict[str, Scores]]]) -> dict[str, float]:
    return {name: group_auc(ensemble([member[name] for member in members])) for name in members[0]}


def tried() -> dict[str, Any]:
    """Architecture → row → run → group → AUC, of whatever lies beside the detectors."""
    content: dict[str, Any] = {}
    for architecture in settings.REGIMES:
        files = [CACHE / Run(architecture, seed).name / "ideas.json" for seed in settings.development_of(architecture)]
        known = {path.parent.name: json.loads(path.read_text()) for path in files if path.exists()}
        rows = {ENSEMBLE: {ENSEMBLE}, **{name: words_of(one) for name, one in candidates_of(architecture).items()}}
        found = {
            name: {run: _rounded(of_run[row]) for run, of_run in known.items() for row in words & of_run.keys()}
            for name, words in rows.items()
        }
        content[architecture] = {name: row for name, row in found.items() if row}
    return {architecture: rows for architecture, rows in content.items() if rows}


def _rounded(aucs: Mapping[str, float]) -> dict[str, float]:
    return {group: float(f"{value:.5g}") for group, value in aucs.items()}


def apart(rows: Mapping[str, Any], row: str, other: str, group: str) -> str:
    """Row − other over the runs that have both: mean ± standard error, and in how many of them it is above 0."""
    runs = [run for run in rows[row] if run in rows[other]]
    values = [rows[row][run][group] - rows[other][run][group] for run in runs]
    error = f" ± {short(float(np.std(values, ddof=1) / len(values) ** 0.5))}" if len(values) > 1 else ""
    return f"{short(float(np.mean(values)), True)}{error} ({sum(value > 0 for value in values)}/{len(values)})"


def answer(content: Mapping[str, Any]) -> str:
    """Which ideas were ahead of the default, by the mean over runs, in all that is looked at first."""
    default = next(name for name, candidate in IDEAS.items() if candidate is CHOSEN)
    ahead: dict[str, bool] = {}
    for architecture, rows in content.items():
        groups = ("validation", UNSEEN[settings.REGIMES[architecture]])
        for name in (one for one in (*IDEAS, *IN_ORDER) if one in rows and one != default):
            gains = [mean_apart(rows, name, default, group) for group in groups]
            ahead[name] = ahead.get(name, True) and min(gains) > 0
    found = [name for name, better in ahead.items() if better]
    return (
        f"**Answer.** The default is one of these ideas, *{default}*. "
        f"Of the {len(ahead)} others ahead of it by the mean "
        "both on validation people and on unseen forgeries, on each architecture that they were tried on: "
        f"{'; '.join(found) or 'none'}."
    )


def mean_apart(rows: Mapping[str, Any], row: str, other: str, group: str) -> float:
    """Row − other, mean over the runs that have both."""
    return float(np.mean([of[group] - rows[other][run][group] for run, of in rows[row].items() if run in rows[other]]))


def page(content: Mapping[str, Any]) -> str:
    """The text of docs/quality-ideas.md."""
    title, introduction = INTRODUCTION.split("\n\n", 1)
    parts = [title, textwrap.fill(answer(content), 120), introduction]
    for architecture, rows in content.items():
        groups = list(next(iter(rows[AVERAGE].values())))
        header = ["", *groups, f"{groups[0]}, to R2M", f"{UNSEEN[settings.REGIMES[architecture]]}, to R2M"]
        for title, some in (("What is known", [ENSEMBLE, *KNOWN]), ("Ideas", [*IDEAS, *IN_ORDER])):
            lines = [
                [
                    row,
                    *(apart(rows, row, AVERAGE, group) for group in groups),
                    *(apart(rows, row, "R2M", group) for group in (groups[0], UNSEEN[settings.REGIMES[architecture]])),
                ]
                for row in some
                if row in rows and row != AVERAGE
            ]
            parts += [f"## {title}, {architecture}", table(header, lines)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
