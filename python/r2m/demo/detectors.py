"""Training all detectors of the demo: the base first, then three specialists and the joint model."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from functools import partial

from rich.console import Console

from r2m.demo.faces import Photographs, Split
from r2m.demo.forgeries import TRAINED
from r2m.demo.networks import Detector
from r2m.demo.parallel import run_together
from r2m.demo.progress import Work, training_progress
from r2m.demo.resampling import Picture
from r2m.demo.samples import make_forged, make_pretraining, make_real
from r2m.demo.settings import Setting
from r2m.demo.training import Recipe, train_base, train_detector

_NAMES = {"joint": "joint training"} | {kind: f"{kind} specialist" for kind in TRAINED}


def train_detectors(
    photographs: Photographs, split: Split, setting: Setting, seed: int, threads: int, console: Console
) -> dict[str, Detector]:
    """Train the base, the specialists and the joint model on the training people.

    Args:
        photographs: (40, 10, 112, 92) float32, from ``read_photographs``.
        split: whose photographs may be seen.
        setting: recipes and numbers of pictures.
        seed: of parameters, pictures and their order. All models draw the real pictures in one order.
        threads: how many models train at once; changes nothing else.
        console: shows the progress.

    Returns:
        ``base``, ``FS``, ``FR``, ``EFS`` and ``joint`` → detector in evaluation mode.
    """
    work = {"base": Work(setting.base.steps, weight=min(threads, 2))}  # trains alone, the others two by two
    work |= {
        name: Work((setting.joint if key == "joint" else setting.specialist).steps) for key, name in _NAMES.items()
    }
    stop, draws = threading.Event(), setting.training_draws
    with training_progress(work, console) as report:

        def after_step(name: str, loss: float) -> None:
            if stop.is_set():
                raise CancelledError
            report(name, loss)

        detectors: dict[str, Detector] = {}
        pools: dict[str, Picture] = {}

        def make_base() -> None:
            data = make_pretraining(photographs, split.train, draws, seed)
            detectors["base"] = train_base(data, setting.base, seed, partial(after_step, "base"))

        def make_pools() -> None:
            pools["real"] = make_real(photographs, split.train, draws, seed, "training")
            for kind in TRAINED:
                pools[kind] = make_forged(photographs, split.train, kind, draws, seed, "training")

        run_together({"base": make_base, "pools": make_pools}, threads, stop)

        def fine_tune(name: str, kinds: tuple[str, ...], recipe: Recipe) -> Detector:
            forged = [pools[kind] for kind in kinds]
            return train_detector(detectors["base"], pools["real"], forged, recipe, seed, partial(after_step, name))

        # The longest first: on two threads it takes as long as the three specialists beside it.
        jobs = {"joint": partial(fine_tune, _NAMES["joint"], TRAINED, setting.joint)}
        for kind in TRAINED:
            jobs[kind] = partial(fine_tune, _NAMES[kind], (kind,), setting.specialist)
        return detectors | run_together(jobs, threads, stop)
