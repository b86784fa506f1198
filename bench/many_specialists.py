"""Many specialists, uneven families, merges of merges, heads: AUC on small detectors, by seed.

    python -m bench.many_specialists [--tables]

Healthy specialists of bench.bad_specialists, of three families by turns: bench/results/many_specialists.json and the
tables of docs/many-specialists.md. All differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from r2m import refit
from r2m.demo.evaluation import Scores, auc, score

from bench.bad_specialists import DEVELOPMENT, FAMILIES, METHODS, StateDict, World, family, network
from bench.machine import ROOT, write_json
from r2m_kernels import MergeConfig, merge

RESULTS, PAGE = ROOT / "bench" / "results" / "many_specialists.json", ROOT / "docs" / "many-specialists.md"
BEGIN, END = "<!-- many:begin, written by `python -m bench.many_specialists` -->", "<!-- many:end -->"
COUNTS = (3, 6, 12, 18)
OURS = MergeConfig.r2m()
LABELLED = 64  # pictures that a head is fitted to again, half of them forged
HEADS = ("head.weight", "head.bias")


class Judge:
    """Mean AUC of logits over the families' test pictures of a world, against the same reals."""

    def __init__(self, world: World) -> None:
        self.real = world.pictures("real", "test")
        self.forged = [world.pictures(kind, "test") for kind in FAMILIES]

    def logits(self, state: StateDict) -> list[Scores]:
        """Of the reals, and of each family."""
        detector = network(0)
        detector.load_state_dict(state)
        return [score(detector, pictures) for pictures in (self.real, *self.forged)]

    def __call__(self, *states: StateDict) -> float:
        """Of one detector, or of the mean logit of several."""
        every = [self.logits(state) for state in states]
        real, *forged = (np.mean([one[place] for one in every], axis=0) for place in range(1 + len(self.forged)))
        return float(np.mean([auc(real, one) for one in forged]))


def of_world(seed: int) -> dict[str, float]:
    """Row → AUC."""
    world = World(seed)
    base, judge = world.base(), Judge(world)
    states = [world.healthy(number) for number in range(max(COUNTS))]
    rows: dict[str, float] = {}
    for count in COUNTS:
        some = states[:count]
        rows[f"ensemble, {count}"] = judge(*some)
        for name, config in METHODS.items():
            rows[f"{name}, {count}"] = judge(merge(base, some, config))
    rows |= uneven(base, states, judge)
    rows |= of_merges(base, states, judge)
    rows |= of_heads(world, base, states[:3], judge)
    return rows


def uneven(base: StateDict, states: Sequence[StateDict], judge: Judge) -> dict[str, float]:
    """Four specialists of one family and one of each other, beside two of each."""
    first = [number for number in range(len(states)) if family(number) == 0][:4]
    some = [states[number] for number in (*first, 1, 2)]
    by_family = OURS.replace(weights=(0.25, 0.25, 0.25, 0.25, 1, 1))
    one = merge(base, [states[number] for number in first], OURS)
    return {
        "2 + 2 + 2": judge(merge(base, states[:6], OURS)),
        "4 + 1 + 1": judge(merge(base, some, OURS)),
        "4 + 1 + 1, weights by family": judge(merge(base, some, by_family)),
        "4 + 1 + 1, the four merged first": judge(merge(base, [one, *some[4:]], OURS)),
        "1 + 1 + 1": judge(merge(base, states[:3], OURS)),
    }


def of_merges(base: StateDict, states: Sequence[StateDict], judge: Judge) -> dict[str, float]:
    """Merges of merges beside one merge of all."""
    five, six = merge(base, states[:5], OURS), states[5]
    halves = [merge(base, states[start : start + 3], OURS) for start in (0, 3)]
    return {
        "six at once": judge(merge(base, states[:6], OURS)),
        "three and three": judge(merge(base, halves, OURS)),
        "five and one, counted as five and one": judge(merge(base, [five, six], OURS.replace(weights=(5, 1)))),
        "five and one, counted alike": judge(merge(base, [five, six], OURS)),
    }


def of_heads(world: World, base: StateDict, experts: Sequence[StateDict], judge: Judge) -> dict[str, float]:
    """The same merge with other classifiers."""
    merged = merge(base, experts, OURS)

    def headed(head: Mapping[str, torch.Tensor]) -> float:
        return judge({**merged, **{name: head[name] for name in HEADS}})

    detector = network(0)
    detector.load_state_dict(merged)
    detector.eval()
    half = LABELLED // 2
    forged = np.concatenate([world.pictures(kind)[: half // 3 + 1] for kind in FAMILIES])[:half]
    with torch.inference_mode():
        values = detector.backbone(torch.from_numpy(np.concatenate([world.pictures("real")[:half], forged])))
    features = refit.Features(values.double().numpy(), np.repeat([0, 1], half), "")
    shapes = {name: tuple(base[name].shape) for name in HEADS}
    return {
        "head: mean": headed(merged),
        "head: base": headed(base),
        **{f"head: {FAMILIES[number]}'s": headed(experts[number]) for number in range(3)},
        **{
            f"head: refit ({rule}), {LABELLED} pictures": headed(refit.head(shapes, features, rule))
            for rule in refit.RULES
        },
    }


def table(rows: Sequence[Mapping[str, float]], names: Sequence[str], against: str) -> list[str]:
    """Mean AUC, and the difference from one row with its standard error and wins."""
    lines = [f"| | AUC | minus *{against}* |", "| --- | ---: | ---: |"]
    for name in names:
        differences = np.array([one[name] - one[against] for one in rows])
        error, wins = differences.std(ddof=1) / math.sqrt(len(rows)), int((differences > 0).sum())
        difference = "" if name == against else f"{differences.mean():+.3f} ± {error:.3f} ({wins}/{len(rows)})"
        lines.append(f"| {name} | {np.mean([one[name] for one in rows]):.3f} | {difference} |")
    return lines


def tables(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Heading → table."""

    def some(chosen: Callable[[str], bool], against: str) -> str:
        return "\n".join(table(rows, [name for name in rows[0] if chosen(name)], against))

    made = {
        f"{count} specialists": some(lambda name, end=f", {count}": name.endswith(end), f"weight average, {count}")  # type: ignore[misc]
        for count in COUNTS
    }
    made["Uneven families"] = some(lambda name: name[0].isdigit(), "2 + 2 + 2")
    made["Merges of merges"] = some(lambda name: name.split()[0] in ("six", "three", "five"), "six at once")
    made["Heads, three specialists"] = some(lambda name: name.startswith("head"), "head: mean")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.tables:
        content: dict[str, Any] = {str(seed): of_world(seed) for seed in DEVELOPMENT}
        write_json(RESULTS, json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 4)))
    found = tables([*json.loads(RESULTS.read_text()).values()])
    text = PAGE.read_text()
    made = "\n\n".join(f"**{heading}**\n\n{one}" for heading, one in found.items())
    PAGE.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n\n{made}\n\n{END}{text.split(END)[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
