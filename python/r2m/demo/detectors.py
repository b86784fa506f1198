"""Training all detectors of the demo: the base first, then three specialists and the joint model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from rich.console import Console

from r2m.demo.faces import Photographs, Split
from r2m.demo.forgeries import TRAINED
from r2m.demo.networks import Detector
from r2m.demo.parallel import Work, run_together, training_progress
from r2m.demo.resampling import Picture
from r2m.demo.samples import make_pictures, make_pretraining
from r2m.demo.training import Recipe, Setting, train_base, train_detector

SPECIALISTS = {kind: f"{kind} specialist" for kind in TRAINED}  # kind → row of the table


def train_detectors(
    photographs: Photographs, split: Split, setting: Setting, seed: int, threads: int, console: Console
) -> dict[str, Detector]:
    """Train the base, the specialists and the joint model on the training people: row → detector in evaluation mode.

    All models draw the real pictures in one order. ``threads``, how many train at once, changes nothing else.
    """
    # The longest first: on two threads it takes as long as the three specialists beside it.
    fine_tuned: dict[str, tuple[Recipe, tuple[str, ...]]] = {"joint training": (setting.joint, TRAINED)}
    fine_tuned |= {row: (setting.specialist, (kind,)) for kind, row in SPECIALISTS.items()}
    work = {"base": Work(setting.base.steps, weight=min(threads, 2))}  # trains alone, the others two by two
    work |= {row: Work(recipe.steps) for row, (recipe, _) in fine_tuned.items()}
    stop, draws = threading.Event(), setting.training_draws
    with training_progress(work, console) as report:

        def after_step(name: str, loss: float) -> None:
            if stop.is_set():
                raise CancelledError
            report(name, loss)

        def make_base() -> Detector:
            data = make_pretraining(photographs, split.train, draws, seed)
            return train_base(data, setting.base, seed, partial(after_step, "base"))

        def make_pools() -> dict[str, Picture]:
            kinds = ("real", *TRAINED)
            return {kind: make_pictures(photographs, split.train, kind, draws, seed, "training") for kind in kinds}

        first: dict[str, Callable[[], Any]] = {"base": make_base, "pools": make_pools}
        base, pools = run_together(first, threads, stop).values()

        def fine_tune(row: str) -> Detector:
            recipe, kinds = fine_tuned[row]
            forged = [pools[kind] for kind in kinds]
            return train_detector(base, pools["real"], forged, recipe, seed, partial(after_step, row))

        return {"base": base} | run_together({row: partial(fine_tune, row) for row in fine_tuned}, threads, stop)
