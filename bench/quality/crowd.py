"""Many specialists on the pretrained base: up to 24, of families that overlap, grow finer, or were trained otherwise.

    python -m bench.quality.crowd [RUN …] [--check]

On development runs, such as mobilenet-0; without one only the tables of docs/many-specialists.md are made again, from
bench/results/quality/crowd.json. Each question is one entry of :data:`QUESTIONS`: detectors that a :class:`Crowd`
trains, merges of them, and the forgeries that judge.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from r2m.demo import samples
from r2m.demo.evaluation import Scores, auc, score
from r2m.demo.faces import read_photographs, split_people
from r2m.demo.networks import Detector
from r2m.demo.resampling import Picture

from bench.machine import ROOT, write_json
from bench.markdown import put, table, update
from bench.quality import settings
from bench.quality.crowd_models import FAMILIES, FINER, Crowd, finer_pictures
from bench.quality.forgeries import FURTHER_FORGERIES
from bench.quality.judging import digest_of_states
from bench.quality.models import Run, StateDict, run_among, runs_of
from bench.quality.networks import load_state
from bench.quality.tables import short
from r2m_kernels import MergeConfig, merge

RESULTS, PAGE = ROOT / "bench" / "results" / "quality" / "crowd.json", ROOT / "docs" / "many-specialists.md"
COMMAND = "python -m bench.quality.crowd"
RUNS = [run for run in runs_of(settings.development_of) if run.regime == "pretrained" and run.seed in settings.MANY]
COUNTS = (3, 6, 12, 24)
JUDGED = settings.Draws(2, 1)  # crops of each photograph of the test people
OURS = MergeConfig.r2m()
METHODS = {
    "weight average": MergeConfig.weight_average(),
    "R2M, the default": OURS,
    "TSV-M × 1": MergeConfig.tsv_m(),
}


class Judge:
    """AUC of each family's forgeries on the test people, FS′'s among them, against the same reals."""

    def __init__(self, run: Run) -> None:
        self._run, self._photographs, self._people = run, read_photographs(), split_people(run.seed).test
        self._known: dict[str, dict[str, Scores]] = {}

    @cached_property
    def _pictures(self) -> dict[str, Picture]:
        def make(kind: str, draws: int) -> Picture:
            further, size = FURTHER_FORGERIES.get(kind), self._run.setting.size
            where = (self._photographs, self._people, kind, draws, self._run.seed, "test crowd")
            return samples.make_pictures(*where, forgery=further, size=size)

        finer = finer_pictures(self._photographs, self._people, JUDGED.forged, self._run, "test crowd")
        forged = {kind: make(kind, JUDGED.forged) for kind in FAMILIES}
        return {"real": make("real", JUDGED.real), **forged, FINER: finer}

    def logits(self, state: StateDict) -> dict[str, Scores]:
        """Fake minus real on every picture; each detector is asked once."""
        digest = digest_of_states([state])
        if digest not in self._known:
            detector = load_state(self._run.architecture, state, folded=True)
            self._known[digest] = {kind: score(detector, one, batch=16) for kind, one in self._pictures.items()}
        return self._known[digest]

    def of(self, *states: StateDict) -> dict[str, float]:
        """Family → AUC of one detector, or of the mean logit of several."""
        every = [self.logits(state) for state in states]
        return _aucs({kind: np.mean([one[kind] for one in every], axis=0) for kind in every[0]})

    def by_family(self, detector: Detector) -> dict[str, float]:
        """Of a detector with a class a family: the logit of all of them together, minus Real's."""

        def scores(pictures: Picture) -> Scores:
            with torch.inference_mode():
                logits = torch.cat([detector(some) for some in torch.from_numpy(pictures).split(16)])
            return (logits[:, 1:].logsumexp(1) - logits[:, 0]).double().numpy()

        return _aucs({kind: scores(one) for kind, one in self._pictures.items()})


def _aucs(logits: Mapping[str, Scores]) -> dict[str, float]:
    return {kind: auc(logits["real"], one) for kind, one in logits.items() if kind != "real"}


class Bench(NamedTuple):
    """What a question is put to."""

    crowd: Crowd
    judge: Judge

    def ours(self, experts: Sequence[StateDict], config: MergeConfig = OURS) -> StateDict:
        """Merged."""
        return merge(self.crowd.base(), list(experts), config)

    def main(self) -> list[StateDict]:
        """The three."""
        return [self.crowd.specialist(kind) for kind in settings.MAIN]


Aucs = dict[str, dict[str, float]]


def numbers(bench: Bench) -> Aucs:
    """How many."""
    members = [bench.crowd.member(number) for number in range(max(COUNTS))]
    found: Aucs = {}
    for count in COUNTS:
        some = members[:count]
        found[f"ensemble, {count}"] = bench.judge.of(*some)
        found |= {f"{name}, {count}": bench.judge.of(bench.ours(some, how)) for name, how in METHODS.items()}
    return found


def overlapping(bench: Bench) -> Aucs:
    """Families that several specialists know."""
    fs, fr, efs = bench.main()
    pairs = [bench.crowd.of_both(*kinds) for kinds in (("FS", "FR"), ("FR", "EFS"), ("EFS", "FS"))]
    again = [bench.crowd.member(6 * copy) for copy in range(1, 4)]
    by_family = OURS.replace(weights=(0.25, 0.25, 0.25, 0.25, 1, 1))
    return {
        "one of each family": bench.judge.of(bench.ours([fs, fr, efs])),
        "each of two families": bench.judge.of(bench.ours(pairs)),
        "each of two, and one of each": bench.judge.of(bench.ours([*pairs, fs, fr, efs])),
        "four of FS, one of each other": bench.judge.of(bench.ours([fs, *again, fr, efs])),
        "the same, weights by family": bench.judge.of(bench.ours([fs, *again, fr, efs], by_family)),
    }


def generators(bench: Bench) -> Aucs:
    """A new generator inside an old family."""
    fs, fr, efs = bench.main()
    finer, retrained = bench.crowd.finer(), bench.crowd.retrained()
    return {
        "before it": bench.judge.of(bench.ours([fs, fr, efs])),
        "a specialist of it beside the old ones": bench.judge.of(bench.ours([fs, finer, fr, efs])),
        "the same, half a weight for both of the family": bench.judge.of(
            bench.ours([fs, finer, fr, efs], OURS.replace(weights=(0.5, 0.5, 1, 1)))
        ),
        "it in the old one's place": bench.judge.of(bench.ours([finer, fr, efs])),
        "the old one trained anew with both": bench.judge.of(bench.ours([retrained, fr, efs])),
    }


def recipes(bench: Bench) -> Aucs:
    """Specialists by other recipes, and of other Reals."""
    kinds = settings.MAIN
    others = [bench.crowd.otherwise(kind) for kind in kinds]
    thirds = [bench.crowd.of_third(kind, part) for part, kind in enumerate(kinds)]
    fs, fr, efs = bench.main()
    mixed = [fs, bench.crowd.of_camera("FR"), efs]
    sets = {"one recipe, same Reals": [fs, fr, efs], "three recipes": others}
    sets |= {"Reals of other people each": thirds, "FR's Reals by another camera": mixed}
    found: Aucs = {}
    for name, some in sets.items():
        found[f"{name}: ensemble"] = bench.judge.of(*some)
        found |= {f"{name}: {how}": bench.judge.of(bench.ours(some, config)) for how, config in METHODS.items()}
    return found


def joint(bench: Bench) -> Aucs:
    """Joint training, on two classes and on one a family."""
    return {
        "joint, Real against Fake": bench.judge.of(bench.crowd.joint()),
        "joint, a class a family": bench.judge.by_family(bench.crowd.multiclass()),
        "merged": bench.judge.of(bench.ours(bench.main())),
    }


def of_merges(bench: Bench) -> Aucs:
    """Merges of merges, and one by one."""
    six = [bench.crowd.member(number) for number in range(6)]
    halves = [bench.ours(six[start : start + 3]) for start in (0, 3)]
    grown = six[0]
    for count, one in enumerate(six[1:], start=1):
        grown = bench.ours([grown, one], OURS.replace(weights=(count, 1)))
    return {
        "six at once": bench.judge.of(bench.ours(six)),
        "three and three": bench.judge.of(bench.ours(halves)),
        "one by one into the merge so far, counted": bench.judge.of(grown),
    }


def heads(bench: Bench) -> Aucs:
    """Whose classifier."""
    experts, base = bench.main(), bench.crowd.base()
    merged = bench.ours(experts)
    of = {"mean": merged, "base": base, **dict(zip(settings.MAIN, experts, strict=True))}
    headed = {
        name: {key: (one if key.startswith("head.") else merged)[key] for key in merged} for name, one in of.items()
    }
    return {f"head: {name}": bench.judge.of(state) for name, state in headed.items()}


class Question(NamedTuple):
    """What is asked, the forgeries that judge it, and the row that each row is compared with."""

    ask: Callable[[Bench], Aucs]
    judged: Mapping[str, Sequence[str]]  # column → families
    against: str  # {count} or {set}: of the same number of specialists, of the same specialists

    def other(self, row: str) -> str:
        """The row that one is compared with."""
        return self.against.format(count=row.rpartition(", ")[2], set=row.partition(": ")[0])


THREE, SIX = {"the three families": settings.MAIN}, {"six families": FAMILIES}
OLD = {"FS": ("FS",), FINER: (FINER,), "FR and EFS": ("FR", "EFS")}
QUESTIONS = {
    "Uneven and overlapping families": Question(overlapping, THREE, "one of each family"),
    "A new generator of an old family": Question(generators, OLD, "before it"),
    "Other recipes, other Reals": Question(recipes, THREE, "{set}: weight average"),
    "A class a family": Question(joint, THREE, "merged"),
    "Merges of merges": Question(of_merges, SIX, "six at once"),
    "Heads": Question(heads, THREE, "head: mean"),
    "How many": Question(numbers, SIX, "weight average, {count}"),
}
"""In the order in which they are asked: what takes longest last."""


def of_run(run: Run, known: Mapping[str, Aucs], keep: Callable[[dict[str, Aucs]], None]) -> None:
    """All that is missing, question by question."""
    found, bench = dict(known), Bench(Crowd(run), Judge(run))
    for name, question in QUESTIONS.items():
        if name not in found:
            asked = question.ask(bench)
            found[name] = {row: {kind: round(value, 4) for kind, value in of.items()} for row, of in asked.items()}
            keep(found)


def section(content: Mapping[str, Mapping[str, Aucs]]) -> str:
    """Tables of all questions that were asked."""
    made = []
    for name, question in QUESTIONS.items():
        runs = [of[name] for of in content.values() if name in of]
        if runs:
            what = f"{name} ({len(runs)} runs)"
            header = [what, *(one for column in question.judged for one in (column, "difference"))]
            made.append(table(header, [[row, *_cells(runs, row, question)] for row in runs[0]]))
    return "\n\n".join(made)


def _cells(runs: Sequence[Aucs], row: str, question: Question) -> list[str]:
    """Of every column the mean AUC, and the mean difference to the row that this one is compared with, with wins."""
    cells, other = [], question.other(row)
    for families in question.judged.values():
        values = [_mean(run[row], families) for run in runs]
        apart = [value - _mean(run[other], families) for run, value in zip(runs, values, strict=True)]
        wins = f"{short(math.fsum(apart) / len(apart), True)} ({sum(one > 0 for one in apart)}/{len(apart)})"
        cells += [short(math.fsum(values) / len(values)), "" if row == other else wins]
    return cells


def _mean(of: Mapping[str, float], families: Sequence[str]) -> float:
    return math.fsum(of[kind] for kind in families) / len(families)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=run_among(RUNS), help="such as mobilenet-0; none: the tables alone")
    parser.add_argument("--check", action="store_true", help="only whether the page is what the JSON gives")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    content: dict[str, dict[str, Aucs]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(run: str, found: dict[str, Aucs]) -> None:
        content[run] = found
        write_json(RESULTS, dict(sorted(content.items())))

    for run in options.runs:
        of_run(run, content.get(run.name, {}), partial(keep, run.name))
    return update(PAGE, put(PAGE.read_text(), "crowd", section(content), COMMAND), check=options.check, command=COMMAND)


if __name__ == "__main__":
    raise SystemExit(main())
