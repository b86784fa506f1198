"""Trains the base, specialists and joint model of one run, and keeps them by a hash of all that shaped them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from r2m.demo import camera, faces, forgeries, networks, resampling, samples, training
from r2m.demo.networks import Detector
from r2m.demo.resampling import Picture
from r2m.demo.training import Recipe, train_base, train_detector
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.quality import forgeries as further
from bench.quality import networks as transformers
from bench.quality import settings
from bench.quality.networks import load_state, new_network

StateDict = dict[str, Tensor]
CACHE = Path(__file__).resolve().parents[2] / "build" / "quality"
# What a trained detector depends on beside its recipe; a change in any of these files trains it anew.
_SOURCES = "".join(map(inspect.getsource, (camera, faces, forgeries, networks, resampling, samples, training)))
_TRANSFORMERS, _FURTHER = inspect.getsource(transformers), inspect.getsource(further)


@dataclass(frozen=True)
class Run:
    """One seed of one architecture: a base, its specialists and a joint model."""

    architecture: str
    seed: int
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.seed}{'-quick' if self.quick else ''}"

    @property
    def recipes(self) -> settings.Training:
        return settings.training(self.architecture, self.quick)


class Pools:
    """Training pictures of a run, made when they are first asked for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._photographs = faces.read_photographs()
        self._people = faces.split_people(run.seed).train
        self._made: dict[str, Picture] = {}

    def pretraining(self) -> samples.PretrainingSet:
        return samples.make_pretraining(self._photographs, self._people, self._run.recipes.draws, self._run.seed)

    def get(self, kind: str) -> Picture:
        """``real``, or a family's forged pictures: (n, 48, 48) float32 in [0, 1]."""
        if kind not in self._made:
            arguments = (self._run.recipes.draws, self._run.seed, "training")
            if kind == "real":
                made = samples.make_real(self._photographs, self._people, *arguments)
            else:
                forgery = further.FURTHER_FORGERIES.get(kind)
                made = samples.make_forged(self._photographs, self._people, kind, *arguments, forgery=forgery)
            self._made[kind] = made
        return self._made[kind]


class Models:
    """The detectors of a run, from the cache or trained; one thread of torch, so that bits do not depend on others.

    Attributes:
        cached: False trains everything anew and keeps nothing.
    """

    def __init__(self, run: Run, say: Callable[[str], None] = lambda line: None) -> None:
        self.run, self.cached = run, True
        self._say = say
        self._pools: Pools | None = None

    @property
    def pools(self) -> Pools:
        if self._pools is None:
            self._pools = Pools(self.run)
        return self._pools

    def base(self) -> StateDict:
        def train() -> Detector:
            new = partial(new_network, self.run.architecture)
            return train_base(self.pools.pretraining(), self.run.recipes.base, self.run.seed, _ignore, new)

        return self._get("base", self.run.recipes.base, train)

    def specialist(self, kind: str) -> StateDict:
        return self._fine_tuned(kind, (kind,), self.run.recipes.specialist)

    def trained(self) -> tuple[StateDict, list[StateDict]]:
        """The base and the three specialists."""
        return self.base(), [self.specialist(kind) for kind in settings.MAIN]

    def joint(self, kinds: Sequence[str] = settings.MAIN) -> StateDict:
        return self._fine_tuned("joint " + "+".join(kinds), kinds, self.run.recipes.joint)

    def overtrained(self, kind: str) -> StateDict:
        """A specialist trained ten times as long."""
        recipe = self.run.recipes.specialist
        longer = Recipe(10 * recipe.steps, recipe.batch, recipe.learning_rate, recipe.weight_decay)
        return self._fine_tuned(f"{kind} overtrained", (kind,), longer)

    def shuffled(self, kind: str) -> StateDict:
        """A specialist whose labels mean nothing: its real and forged pictures were thrown together and dealt anew."""

        def train() -> Detector:
            both = np.concatenate([self.pools.get("real"), self.pools.get(kind)])
            order = np.random.default_rng(self.run.seed).permutation(len(both))
            half = len(both) // 2
            base = load_state(self.run.architecture, self.base())
            arguments = (self.run.recipes.specialist, self.run.seed, _ignore)
            return train_detector(base, both[order[:half]], [both[order[half:]]], *arguments)

        return self._get(f"{kind} shuffled", self.run.recipes.specialist, train)

    def _fine_tuned(self, name: str, kinds: Sequence[str], recipe: Recipe) -> StateDict:
        def train() -> Detector:
            base = load_state(self.run.architecture, self.base())
            forged = [self.pools.get(kind) for kind in kinds]
            return train_detector(base, self.pools.get("real"), forged, recipe, self.run.seed, _ignore)

        return self._get(name, recipe, train)

    def _get(self, name: str, recipe: Recipe, train: Callable[[], Detector]) -> StateDict:
        path = CACHE / self.run.name / f"{name.replace(' ', '-')}-{_hash(self.run, name, recipe)}.safetensors"
        if not (self.cached and path.exists()):
            start = time.monotonic()
            state = {key: tensor.detach().contiguous() for key, tensor in train().state_dict().items()}
            if not self.cached:
                # From a file, as from the cache: torch rounds by where in memory a tensor starts.
                with tempfile.TemporaryDirectory() as folder:
                    save_file(state, Path(folder) / "state")
                    return load_file(Path(folder) / "state")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path = path.with_suffix(f".{os.getpid()}.partial")
            save_file(state, partial_path)
            partial_path.rename(path)
            self._say(f"{self.run.name}: trained {name} in {time.monotonic() - start:.0f} s")
        return load_file(path)


def _ignore(loss: float) -> None:
    pass


def _hash(run: Run, name: str, recipe: Recipe) -> str:
    """Of the run, the recipes and the code. Specialists also depend on the base's recipe."""
    sources = [_SOURCES]
    if run.architecture != "cnn":
        sources.append(_TRANSFORMERS)
    if any(kind in name for kind in settings.FURTHER):
        sources.append(_FURTHER)
    shaped_by = {
        "run": [run.architecture, run.seed],
        "name": name,
        "recipes": [asdict(recipe), asdict(run.recipes.base), run.recipes.draws],
        "torch": torch.__version__,
        "code": sources,
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()[:12]
