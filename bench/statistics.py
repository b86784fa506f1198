"""What `r2m calibrate --statistics` does: AUC of a merge with the experts' mean statistics, and with new ones.

    python -m bench.statistics [--pretrained]

Small detectors of bench.bad_specialists' development seeds, trained with batch normalisation's statistics moving or
frozen; with ``--pretrained`` those of bench.quality's, which were frozen at ImageNet's. New ones are from 32 pictures,
half of them forged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from r2m.demo import samples
from r2m.demo.evaluation import auc, score
from r2m.demo.networks import Detector
from r2m.demo.resampling import Picture
from r2m.demo.training import train_detector
from r2m.evaluation.statistics import estimated

from bench import bad_specialists as small
from bench.bad_specialists import StateDict, World
from bench.quality import settings
from bench.quality.groups import groups_of
from bench.quality.models import Models, Run
from bench.quality.networks import load_state
from r2m_kernels import merge

DRAWS, HALF = 4, 16
Load = Callable[[StateDict], Detector]


class _Moving(Detector):
    """Batch normalisation takes each batch's statistics in training, and moves its own."""

    def eval(self) -> _Moving:  # which is how it is frozen
        return self.train()


def moved(world: World, number: int) -> StateDict:
    """A small specialist whose statistics moved."""
    base = small.network(0)
    base.load_state_dict(world.base())
    base.__class__ = _Moving
    pictures = world.pictures("real"), [world.pictures(small.FAMILIES[number])]
    seed = int(samples.stream(world.seed, f"moving/{number}").integers(2**31))
    return small.state_of(train_detector(base, *pictures, small.SPECIALIST, seed, lambda _: None))


def loaded(state: StateDict) -> Detector:
    """A small detector in evaluation mode."""
    detector = small.network(0)
    detector.load_state_dict(state)
    return detector.eval()


def compared(state: StateDict, load: Load, real: Picture, forged: Mapping[str, Picture], seed: int) -> list[float]:
    """AUC as merged, and with statistics of pictures of these, mean over draws."""

    def judged(detector: Detector) -> float:
        known = score(detector, real, batch=16)
        return float(np.mean([auc(known, score(detector, one, batch=16)) for one in forged.values()]))

    fakes, new = np.concatenate(list(forged.values())), []
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, draw])
        drawn = [one[rng.choice(len(one), HALF, replace=False)] for one in (real, fakes)]
        detector = load({name: one.clone() for name, one in state.items()})
        estimated(detector, [torch.from_numpy(np.concatenate(drawn))], "merge")
        new.append(judged(detector))
    return [judged(load(state)), float(np.mean(new))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[str, list[list[float]]] = {}

    def add(row: str, *about: Any) -> None:
        rows.setdefault(row, []).append(compared(*about))

    if options.pretrained:
        for seed in settings.DEVELOPMENT[:3]:
            run = Run("mobilenet", seed)
            base, experts = Models(run).trained()
            for name, group in groups_of(run, ["in-distribution", "code"]).items():
                load = lambda state: load_state("mobilenet", state)  # noqa: E731
                add(f"pretrained, frozen, {name}", merge(base, experts), load, group.real, group.forged, seed)
    for seed in () if options.pretrained else small.DEVELOPMENT[:3]:
        world = World(seed)
        forged = {kind: world.pictures(kind, "test") for kind in small.FAMILIES}
        of = range(len(small.FAMILIES))
        for row, experts in {
            "small, moving": [moved(world, number) for number in of],
            "small, frozen": [world.healthy(number) for number in of],
        }.items():
            add(row, merge(world.base(), experts), loaded, world.pictures("real", "test"), forged, seed)
    for row, found in rows.items():
        before, after = np.mean(found, axis=0)
        print(f"{row}: AUC {before:.3f} with the experts' mean, {after:.3f} with statistics of {2 * HALF} pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
