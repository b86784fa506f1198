"""What `r2m calibrate` makes of the default merge on the pretrained base: F1 at one half, calibration error.

    python -m bench.quality.calibrating [--fresh | --tables]

Development seeds, or with ``--fresh`` those that were kept for this question; ``--tables`` from the logits that are
there. Logits go to bench/results/calibration, numbers to its summary.json and the table of docs/calibration.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from r2m.demo.evaluation import Scores, auc
from r2m.evaluation.calibrating import Labelled, with_labels, without_labels
from r2m.log_odds import Calibration

from bench.machine import ROOT, write_json
from bench.quality import settings, store
from bench.quality.groups import GROUPS, groups_of
from bench.quality.judging import Pictures, calibration, calibration_error, digest_of_states, made_of, paired
from bench.quality.models import Models, Run
from bench.quality.store import GroupScores
from r2m_kernels import merge

ARCHITECTURE, ROW = "mobilenet", "R2M"
STORE = ROOT / "bench" / "results" / "calibration"
PAGE = ROOT / "docs" / "calibration.md"
BEGIN, END = "<!-- calibration:begin, written by `python -m bench.quality.calibrating` -->", "<!-- calibration:end -->"
UNLABELLED, LABELLED, DRAWS = 32, 16, 20
SEEDS = {"development": settings.DEVELOPMENT, "fresh": settings.CALIBRATION}
# How far the slope and the middle of an affine map are looked through for the best there is: in standard deviations.
SLOPES, SHIFTS = np.geomspace(0.3, 4.0, 24), np.arange(-1.0, 1.55, 0.1)
ECE, GAP = 0.05, 0.01  # what is asked for
# Two normal distributions instead of a detector: of these AUCs, on as many pictures as judge in-distribution.
IDEAL_AUC = (0.75, 0.78, 0.8, 0.85, 0.9)
IDEAL_PICTURES, IDEAL_DRAWS = (284, 584), 400

Numbers = dict[str, float]
Drawn = tuple[Scores, Scores]
"""Log-odds of real pictures and of forged ones."""


def judge(seed: int) -> None:
    """Logits of the default merge on all test pictures of a run."""
    path, run = store.logits_of(f"{ARCHITECTURE}-{seed}", STORE), Run(ARCHITECTURE, seed)
    base, experts = Models(run).trained()
    pictures = Pictures(groups_of(run))
    judged = store.Judged(pictures.places)
    made_from = made_of(digest_of_states([base, *experts]), pictures.digest)
    judged.add(ROW, pictures.scores(run, [merge(base, experts)]), made_from)
    store.save(judged, path)


def numbers(real: Scores, fake: Scores) -> Numbers:
    """Of log-odds that are calibrated: both classes weigh the same."""
    found = calibration({"real": real, "fake": fake})
    # The other class's F1, by turning all signs.
    turned = calibration({"real": -fake, "fake": -real})
    macro = (found["f1"] + turned["f1"]) / 2
    return {**found, "gap": found["best_f1"] - found["f1"], "macro": macro, "auc": auc(real, fake)}


def _unlabelled(fakes: float) -> Callable[[Drawn], Calibration]:
    return lambda drawn: without_labels(np.concatenate(drawn), fakes)


def _with_labels(drawn: Drawn) -> Calibration:
    real, fake = drawn
    labels = np.repeat([0, 1], [len(real), len(fake)])
    return with_labels(Labelled(np.concatenate(drawn), labels), 0.5)


RULES: dict[str, tuple[int, Callable[[Drawn], Calibration]]] = {
    "as merged": (0, lambda _: Calibration()),
    "32 pictures, no labels": (UNLABELLED, _unlabelled(0.5)),
    "32 pictures, no labels, `--fakes 0.6`": (UNLABELLED, _unlabelled(0.6)),
    "16 pictures with labels": (LABELLED, _with_labels),
}
"""Row → how many pictures, half of them forged, and what is made of their log-odds."""


def draws(group: Mapping[str, Scores], count: int, seed: int) -> list[tuple[Drawn, Drawn]]:
    """``count`` pictures, half of them forged, and all others, which judge; once where none are drawn."""
    real, fake = group["real"], np.concatenate([scores for kind, scores in group.items() if kind != "real"])
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(DRAWS if count else 1):
        parts = []
        for scores in (real, fake):
            order = rng.permutation(len(scores))
            parts.append((scores[order[: count // 2]], scores[order[count // 2 :]]))
        made.append(((parts[0][0], parts[1][0]), (parts[0][1], parts[1][1])))
    return made


def of_rule(group: Mapping[str, Scores], row: str, seed: int) -> Numbers:
    """Mean over draws."""
    count, rule = RULES[row]
    every = []
    for drawn, (real, fake) in draws(group, count, seed):
        found = rule(drawn)
        every.append(numbers(found.done(real), found.done(fake)))
    return {name: float(np.mean([one[name] for one in every])) for name in every[0]}


def best(group: Mapping[str, Scores]) -> Numbers:
    """What a temperature and a bias can do at all, chosen on the very pictures that judge, with all their labels.

    ``gap``: least distance of F1 at one half to the best, of those with a calibration error of at most :data:`ECE`, or
    of those with the least where none has; ``ece``: least error of those within :data:`GAP` of the best F1.
    """
    real, fake = group["real"], np.concatenate([scores for kind, scores in group.items() if kind != "real"])
    middle, spread = (real.mean() + fake.mean()) / 2, np.sqrt((real.var() + fake.var()) / 2)
    labels, logits = np.repeat([0.0, 1.0], [len(real), len(fake)]), np.concatenate([real, fake]) - middle
    weights = np.where(labels == 1, 0.5 / len(fake), 0.5 / len(real))
    top = calibration({"real": real, "fake": fake})["best_f1"]
    found = []
    for slope, shift in itertools.product(SLOPES / spread, SHIFTS):
        moved = slope * logits + shift
        hits, false = weights[(moved > 0) & (labels == 1)].sum(), weights[(moved > 0) & (labels == 0)].sum()
        found.append((calibration_error(labels, moved, weights), top - 2 * hits / (hits + false + 0.5)))
    least = min(error for error, _ in found)
    return {
        "gap": min(gap for error, gap in found if error <= max(ECE, least)),
        "ece": min((error for error, gap in found if gap <= GAP), default=float("nan")),
        "least": least,
    }


def ideal(area: float) -> Numbers:
    """What exact probabilities have, of log-odds that are normally distributed, one width, with that AUC.

    ``best_f1`` and ``gap`` of all pictures there are; ``exact``: calibration error on :data:`IDEAL_PICTURES`;
    ``drawn``: the same with temperature and bias from 32 pictures without labels.
    """
    usual = NormalDist()
    apart = math.sqrt(2) * usual.inv_cdf(area)

    def f1(threshold: float) -> float:
        hits, false = (usual.cdf(place - threshold) for place in (apart / 2, -apart / 2))
        return 2 * hits / (hits + false + 1)

    top = max(map(f1, np.linspace(-4, 1, 2001)))
    dice = np.random.default_rng(0)

    def sample(*counts: int) -> Scores:
        # Log-odds of x are apart · x.
        sides = [dice.normal(side * apart / 2, 1, count) for side, count in zip((-1, 1), counts, strict=True)]
        return np.asarray(apart * np.concatenate(sides))

    labels = np.repeat([0.0, 1.0], IDEAL_PICTURES)
    weights = np.where(labels == 1, 0.5 / IDEAL_PICTURES[1], 0.5 / IDEAL_PICTURES[0])
    errors: list[tuple[float, float]] = []
    for _ in range(IDEAL_DRAWS):
        logits, found = sample(*IDEAL_PICTURES), without_labels(sample(UNLABELLED // 2, UNLABELLED // 2), 0.5)
        errors.append(
            (calibration_error(labels, logits, weights), calibration_error(labels, found.done(logits), weights))
        )
    exact, drawn = np.mean(errors, axis=0)
    return {"best_f1": top, "gap": top - f1(0.0), "exact": float(exact), "drawn": float(drawn)}


def summarize(directory: Path) -> dict[str, object]:
    """All numbers, of the seeds that were judged."""
    content: dict[str, object] = {}
    for name, seeds in SEEDS.items():
        paths = {seed: store.logits_of(f"{ARCHITECTURE}-{seed}", directory) for seed in seeds}
        scored: dict[int, GroupScores] = {
            seed: store.load(path).scores(ROW) for seed, path in paths.items() if path.exists()
        }
        if scored:
            content[name] = {group: _of_group(scored, group) for group in GROUPS["pretrained"]}
    content["ideal"] = {str(area): ideal(area) for area in IDEAL_AUC}
    return content


def _of_group(scored: Mapping[int, GroupScores], group: str) -> dict[str, object]:
    rows: dict[str, object] = {}
    for row in RULES:
        each = {seed: of_rule(scores[group], row, seed) for seed, scores in scored.items()}
        rows[row] = {
            name: paired({seed: [one[name]] for seed, one in each.items()}) for name in next(iter(each.values()))
        }
    bests = [best(scores[group]) for scores in scored.values()]
    rows["best"] = {name: float(np.nanmean([one[name] for one in bests])) for name in bests[0]}
    return rows


def table(content: Mapping[str, object]) -> str:
    """For docs/calibration.md."""
    lines = []
    for name, groups in content.items():
        if name not in SEEDS:
            continue
        lines += [
            f"**{name.capitalize()} seeds** ({len(SEEDS[name])} runs).",
            "",
            "| | group | F1 at ½ | at the best threshold | gap | macro F1 at ½ | calibration error |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        assert isinstance(groups, Mapping)
        for row in RULES:
            for group, rows in groups.items():
                one = {key: _shown(value) for key, value in rows[row].items()}
                lines.append(
                    f"| {row} | {group} | {one['f1']} | {one['best_f1']} | {_shown(rows[row]['gap'], interval=True)} | "
                    f"{one['macro']} | {_shown(rows[row]['ece'], interval=True)} |"
                )
        said = [
            f"{group}: {_number(rows['best']['gap'])}; {_number(rows['best']['ece'])}" for group, rows in groups.items()
        ]
        lines += [
            "",
            f"What any temperature and bias can do, chosen with all labels of the pictures that judge: least gap at an "
            f"error of at most {_number(ECE)}, and least error at a gap of at most {_number(GAP)}: {', '.join(said)}.",
            "",
        ]
    lines += [
        f"**Exact probabilities** of two normal distributions; error on {' and '.join(map(str, IDEAL_PICTURES))} "
        "pictures, mean.",
        "",
        f"| AUC | best F1 | gap | calibration error | with T and b from {UNLABELLED} pictures |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    ideals = content["ideal"]
    assert isinstance(ideals, Mapping)
    for area, one in ideals.items():
        cells = (_number(one[key]) for key in ("best_f1", "gap", "exact", "drawn"))
        lines.append(f"| {_number(float(area))} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def _shown(value: Mapping[str, float], *, interval: bool = False) -> str:
    text = _number(value["mean"])
    return f"{text} [{_number(value['low'])}, {_number(value['high'])}]" if interval else text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in () if options.tables else SEEDS["fresh" if options.fresh else "development"]:
        if not store.logits_of(f"{ARCHITECTURE}-{seed}", STORE).exists():
            judge(seed)
            print(f"judged {ARCHITECTURE}-{seed}", flush=True)
    content = summarize(STORE)
    write_json(STORE / "summary.json", json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 4)))
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(content)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
