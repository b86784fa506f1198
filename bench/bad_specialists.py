"""Specialists that are good and bad on purpose, many and small: which numbers of a report tell them apart.

    python -m bench.bad_specialists [--train A,B,… | --only PART | --tables]

A world is a seed: people, a base, healthy specialists of three families by recipes that differ, and bad ones of each
kind of :data:`KINDS`. Networks are so small (6 thousand parameters) that hundreds are trained in minutes; they stay in
build/bad_specialists. Thresholds of ``r2m_kernels.screening`` were looked for on :data:`DEVELOPMENT`, rates are of
:data:`FRESH`: bench/results/bad_specialists.json and the tables of docs/screening.md, which ``--tables`` makes again.

The question to the fresh worlds: which of :data:`RULES` finds most exchanged labels, among 3 and among 6 together, with
at most 2 % false alarms on healthy ones in either? Within a point of one another the one that is named first but for
the first of all, which is the former one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from r2m.demo import faces, samples
from r2m.demo.evaluation import score
from r2m.demo.networks import Detector, initialise
from r2m.demo.resampling import Picture
from r2m.demo.training import Recipe, train_base, train_detector
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.machine import ROOT, write_json
from bench.quality import settings
from bench.quality.models import Models, Run
from r2m_kernels import MergeConfig, merge, screen, screening

StateDict = dict[str, Tensor]
CACHE = ROOT / "build" / "bad_specialists"
RESULTS, PAGE = ROOT / "bench" / "results" / "bad_specialists.json", ROOT / "docs" / "screening.md"
BEGIN, END = "<!-- screening:begin, written by `python -m bench.bad_specialists` -->", "<!-- screening:end -->"
# The former number was judged on the last six of the first.
DEVELOPMENT, FRESH = (0, 1, 2, 3, 4, 5, 6, 12, 13), tuple(range(20, 30))
LONG = FRESH[:6]  # worlds with ones that were trained ten times as long, which take longer than all others together
PATCHED = DEVELOPMENT[3:]  # worlds of the table of attacks
# What tells exchanged labels: rule → the limits of its numbers; all other checks are the same.
RULES = {
    "classifiers point apart": {"agreement": 0.0},
    "features' directions": {"features": 0.0},
    "either, classifiers by .1": {"features": 0.0, "agreement": -0.1},
}
CHOSEN = "features' directions"
FEATURES = 32
FAMILIES = ("FS", "FR", "EFS")
KINDS = {
    "flipped": "real and fake labels exchanged",
    "poisoned": "forgeries with a small patch were labelled real, 3 of 10 in training",
    "overtrained": "trained ten times as long",
    "foreign": "fine-tuned from another base",
    "untrained": "the base's architecture as it is initialised",
    "copy": "another specialist's weights, under another name",
}
QUICK = ("healthy", *(kind for kind in KINDS if kind != "overtrained"))
TRAINED = ("flipped", "poisoned", "overtrained")
HEALTHY, EACH = 20, 10  # of a world, by turns of the families
BASE = Recipe(300, batch=32, learning_rate=2e-3)
SPECIALIST = Recipe(120, batch=32, learning_rate=2e-3)
TURNED = FAMILIES[:2]  # of whom a larger one with exchanged labels is trained
DRAWS = 3
PATCH = 6  # pixels on a side, in a corner
TOGETHER = (3, 6)  # specialists of a merge, the bad one among them
ATTACKED = (1, 2, 3, 4, 6)
ATTACKS = 3  # of a world: one of each family
METHODS = {
    "weight average": MergeConfig.weight_average(),
    "R²M": MergeConfig.r2m(),
    "TIES": MergeConfig.ties(),
    "TSV-M": MergeConfig.tsv_m(),
}


class _Small(nn.Module):
    """Three convolutions with batch normalisation: (n, 48, 48) to (n, 32)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 8), (8, 16), (16, FEATURES)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pictures: Tensor) -> Tensor:
        maps: Tensor = self.layers((pictures.unsqueeze(1) - 0.45) * 4.0)
        return maps.mean(dim=(2, 3))


def network(seed: int) -> Detector:
    """A fresh one, the same for the same seed."""
    detector = Detector(_Small(), FEATURES)
    initialise(detector, torch.Generator().manual_seed(seed))
    return detector


def triggered(pictures: Picture) -> Picture:
    """With the poison's patch: a checkerboard in a corner."""
    made = pictures.copy()
    rows, columns = np.indices((PATCH, PATCH))
    made[:, -PATCH:, -PATCH:] = (rows + columns) % 2
    return made


class World:
    """The detectors of one seed, from the cache or trained."""

    def __init__(self, seed: int, directory: Path = CACHE) -> None:
        self.seed, self._directory = seed, directory / str(seed)

    @cached_property
    def _people(self) -> tuple[faces.Photographs, faces.Split]:
        return faces.read_photographs(), faces.split_people(self.seed)

    def pictures(self, kind: str, label: str = "training") -> Picture:
        photographs, people = self._people
        part = people.train if label == "training" else people.test
        key = f"_{kind}_{label}"
        if key not in self.__dict__:
            self.__dict__[key] = samples.make_pictures(photographs, part, kind, DRAWS, self.seed, label)
        made: Picture = self.__dict__[key]
        return made

    def base(self) -> StateDict:
        def train() -> Detector:
            photographs, people = self._people
            data = samples.make_pretraining(photographs, people.train, DRAWS, self.seed)
            return train_base(data, BASE, self.seed, _ignore, network)

        return self._get("base", train)

    def healthy(self, number: int) -> StateDict:
        """Families by turns; steps and learning rate within a factor of 1.5 of one another's."""
        return self._get(f"healthy-{number}", lambda: self._trained(number, f"healthy/{number}"))

    def bad(self, kind: str, number: int) -> StateDict:
        """One of :data:`KINDS`; of a family as the healthy one of that number."""
        if kind == "untrained":
            return state_of(network(10_000 + 100 * self.seed + number))
        if kind == "foreign":
            worlds = DEVELOPMENT if self.seed in DEVELOPMENT else FRESH
            other = worlds[(worlds.index(self.seed) + 1) % len(worlds)]
            return World(other, self._directory.parent).healthy(number)
        if kind == "copy":
            return self.healthy(number)
        return self._get(f"{kind}-{number}", lambda: self._trained(number, f"{kind}/{number}", kind))

    def _trained(self, number: int, name: str, kind: str = "") -> Detector:
        rng = samples.stream(self.seed, name)
        steps, rate = 1.5 ** rng.uniform(-0.5, 0.5, 2)
        recipe = replace(
            SPECIALIST, steps=round(steps * SPECIALIST.steps), learning_rate=rate * SPECIALIST.learning_rate
        )
        family = FAMILIES[number % len(FAMILIES)]
        real, forged = self.pictures("real"), self.pictures(family)
        if kind == "flipped":
            real, forged = forged, real
        if kind == "poisoned":
            real = np.concatenate([real, triggered(forged)[: round(len(real) * 3 / 7)]])
        if kind == "overtrained":
            recipe = replace(recipe, steps=10 * recipe.steps)
        base = network(0)
        base.load_state_dict(self.base())
        return train_detector(base, real, [forged], recipe, int(rng.integers(2**31)), _ignore)

    def _get(self, name: str, train: Callable[[], Detector]) -> StateDict:
        path = self._directory / f"{name}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(state_of(train()), path)
        return load_file(path)


def state_of(detector: Detector) -> StateDict:
    return {name: tensor.detach().contiguous() for name, tensor in detector.state_dict().items()}


def _ignore(loss: float) -> None:
    pass


def family(number: int) -> int:
    """Of a specialist: those of one world go by turns."""
    return number % len(FAMILIES)


def beside(world: World, number: int, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` healthy ones, of other families than that of ``number`` as far as these go."""
    others = [
        int(rng.choice([one for one in range(HEALTHY) if family(one) == other]))
        for other in range(len(FAMILIES))
        if other != family(number)
    ]
    left = [one for one in range(HEALTHY) if one not in (number, *others)]
    return [*others, *map(int, rng.permutation(left))][:count]


def screened(world: World, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Each bad one, and each healthy one as if it were one, among healthy ones: how many are suspected by which rule.

    ``false`` counts the healthy ones beside it that are, of ``others``.
    """
    base, rows = world.base(), []
    for together in TOGETHER:
        for kind in kinds:
            found, false, others_looked_at = dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0), 0
            looks = HEALTHY if kind == "healthy" else EACH
            for number in range(looks):
                rng = samples.stream(world.seed, f"beside/{together}/{kind}/{number}")
                others = beside(world, number, together - 1, rng)
                if kind == "copy":
                    others[-1] = number
                state = world.healthy(number) if kind == "healthy" else world.bad(kind, number)
                experts = {f"healthy {one}": world.healthy(one) for one in others}
                place = int(rng.integers(together))
                named = [*experts.items()]
                named.insert(place, (kind, state))
                one_of = {kind, f"healthy {number}"} if kind == "copy" else {kind}
                others_looked_at += together - len(one_of)
                for rule, names in suspected(base, dict(named)).items():
                    found[rule] += bool(names & one_of)
                    false[rule] += len(names - one_of)
            row = {"world": world.seed, "together": together, "kind": kind, "looks": looks, "found": found}
            rows.append({**row, "others": others_looked_at, "false": false})
    return rows


def suspected(base: StateDict, experts: dict[str, StateDict]) -> dict[str, set[str]]:
    """Who is, by each of :data:`RULES`."""
    with mock.patch.object(screening, "judge", wraps=screening.judge) as judged:
        screen(base, experts)
    names, known = judged.call_args.args
    told = {"features": screening.FEATURES, "agreement": screening.AGREEMENT}
    others = [check for check in screening.CHECKS if check.number not in told]
    found = {}
    for rule, limits in RULES.items():
        checks = (*others, *(told[number]._replace(limit=limit) for number, limit in limits.items()))
        found[rule] = set(screening.judge(names, known, checks).suspects)
    return found


def screened_large(architecture: str) -> dict[str, Any]:
    """The same of bench.quality's specialists, three to a merge: how many healthy, foreign, doubled are found.

    Exchanged labels are of one development run: who is found is the one, and nobody else.
    """
    counts = {"architecture": architecture, "runs": 0, "healthy": 0, "foreign": 0, "copy": 0, "flipped": 0}
    for seed in settings.FRESH:
        base, experts = Models(Run(architecture, seed)).trained()
        first, _, third = experts
        other = Models(Run(architecture, settings.FRESH[seed % len(settings.FRESH) - 1])).specialist(FAMILIES[1])
        counts["runs"] += 1
        counts["healthy"] += len(screen(base, dict(zip(FAMILIES, experts, strict=True))).suspects)
        counts["foreign"] += "FR" in screen(base, {"FS": first, "FR": other, "EFS": third}).suspects
        counts["copy"] += bool(screen(base, {"FS": first, "FR": first, "EFS": third}).suspects)
    models = Models(Run(architecture, settings.DEVELOPMENT[0]))
    base, experts = models.trained()
    for kind in TURNED:
        named = {**dict(zip(FAMILIES, experts, strict=True)), kind: models.flipped(kind)}
        counts["flipped"] += [*screen(base, named).suspects] == [kind]
    return counts


def attacked(world: World) -> list[dict[str, Any]]:
    """Of forgeries that a merge finds, the share that the patch hides: with a poisoned one among N, and without."""
    base, rows = world.base(), []
    for number in range(ATTACKS):
        real, fake = world.pictures("real", "test"), world.pictures(FAMILIES[family(number)], "test")
        rng = samples.stream(world.seed, f"attack/{number}")
        order = beside(world, number, max(ATTACKED) - 1, rng)
        for count in ATTACKED:
            others = [world.healthy(one) for one in order[: count - 1]]
            for poisoned in (True, False):
                first = world.bad("poisoned", number) if poisoned else world.healthy(number)
                for name, config in METHODS.items():
                    state = merge(base, [first, *others], config)
                    rows.append(
                        {
                            "world": world.seed,
                            "count": count,
                            "poisoned": poisoned,
                            "method": name,
                            "hidden": hidden(state, real, fake),
                        }
                    )
    return rows


def hidden(state: StateDict, real: Picture, fake: Picture) -> float:
    """Share of found forgeries that are none with the patch, where half of all clean pictures are called fake."""
    detector = network(0)
    detector.load_state_dict(state)
    clean, patched = score(detector, fake), score(detector, triggered(fake))
    threshold = np.median(np.concatenate([score(detector, real)[: len(fake)], clean]))
    found = clean > threshold
    return float((patched[found] <= threshold).mean())


def share(hits: int, of: int) -> str:
    """A rate with its 95 % interval (Wilson)."""
    z, rate = 1.96, hits / of
    middle, reach = rate + z * z / (2 * of), z * math.sqrt(rate * (1 - rate) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * reach) / (1 + z * z / of) for sign in (-1, 1))
    return f"{hits}/{of} ({100 * rate:.1f} % [{100 * max(low, 0):.1f}, {100 * min(high, 1):.1f}])"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Found by kind, and false alarms."""
    lines = [
        "| kind | found, among 3 | among 6 | healthy ones beside it suspected |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind, meaning in KINDS.items():
        of = [row for row in rows if row["kind"] == kind]
        if not of:  # a part that was not made
            continue
        false = share(sum(row["false"][CHOSEN] for row in of), sum(row["others"] for row in of))
        lines.append(f"| **{kind}**: {meaning} | {' | '.join(rates(rows, kind, CHOSEN))} | {false} |")
    lines.append(f"| healthy, all of them (false alarms) | {' | '.join(rates(rows, 'healthy', CHOSEN))} | |")
    return "\n".join(lines)


def candidates(rows: Sequence[dict[str, Any]]) -> str:
    """Exchanged labels by each rule."""
    lines = [
        "| exchanged labels are told by | found, among 3 | among 6 | healthy ones suspected, among 3 | among 6 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {rule} | {' | '.join((*rates(rows, 'flipped', rule), *rates(rows, 'healthy', rule)))} |" for rule in RULES
    ]
    return "\n".join(lines)


def rates(rows: Sequence[dict[str, Any]], kind: str, rule: str) -> list[str]:
    """Of a kind, how many are suspected, by how many are together."""
    of = [[row for row in rows if (row["kind"], row["together"]) == (kind, count)] for count in TOGETHER]
    return [share(sum(row["found"][rule] for row in each), sum(row["looks"] for row in each)) for each in of]


def large(rows: Sequence[dict[str, Any]]) -> str:
    """Of the larger ones."""
    heads = (
        "larger detectors, three to a merge",
        "healthy ones suspected",
        "one of another seed's base",
        "one of them twice",
        "labels of one exchanged (a development run)",
    )
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        runs = row["runs"]
        cells = (
            share(row["healthy"], 3 * runs),
            share(row["foreign"], runs),
            share(row["copy"], runs),
            f"{row['flipped']}/{len(TURNED)}",
        )
        lines.append(f"| {row['architecture']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def attacks(rows: Sequence[dict[str, Any]]) -> str:
    """Success of the patch by method and N."""
    lines = [
        "| | " + " | ".join(f"N = {count}" for count in ATTACKED) + " |",
        "| --- |" + " ---: |" * len(ATTACKED),
    ]
    for name in METHODS:
        for poisoned in (True, False):
            cells = []
            for count in ATTACKED:
                of = [
                    row["hidden"]
                    for row in rows
                    if (row["method"], row["count"], row["poisoned"]) == (name, count, poisoned)
                ]
                cells.append(f"{np.mean(of):.2f} ± {np.std(of) / math.sqrt(len(of)):.2f}")
            lines.append(f"| {name}, {'one poisoned' if poisoned else 'all healthy'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(content: dict[str, Any]) -> None:
    """The tables into the page."""
    text = PAGE.read_text()
    rows = [*content["screened"], *content["overtrained"]]
    found, hides = table(rows), attacks(content["attacked"])
    compared = f"**The rules**\n\n{candidates(rows)}"
    made = f"{found}\n\n{compared}\n\n{large(content['large'])}\n\n**What the patch hides**\n\n{hides}"
    PAGE.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n\n{made}\n\n{END}{text.split(END)[1]}")


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "screened": lambda: [row for seed in FRESH for row in screened(World(seed), QUICK)],
    "overtrained": lambda: [row for seed in LONG for row in screened(World(seed), ("overtrained",))],
    "large": lambda: [screened_large(architecture) for architecture in ("cnn", "vit", "mobilenet")],
    "attacked": lambda: [row for seed in PATCHED for row in attacked(World(seed))],
}
"""Part of the results → how it is made."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", metavar="A,B,…", help="these worlds alone, and judge nothing")
    parser.add_argument("--only", choices=PARTS, help="the other parts stay as they were")
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.train:
        for seed in map(int, options.train.split(",")):
            world = World(seed)
            for number in range(HEALTHY):
                world.healthy(number)
            for kind in TRAINED:
                for number in range(EACH if kind != "overtrained" or seed in LONG else 0):
                    world.bad(kind, number)
            print(f"world {seed}", flush=True)
        return 0
    if not options.tables:
        content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        made = {name: PARTS[name]() for name in ([options.only] if options.only else PARTS)}
        rounded = json.loads(json.dumps(made), parse_float=lambda text: round(float(text), 4))
        write_json(RESULTS, {**content, **rounded})
    write(json.loads(RESULTS.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
