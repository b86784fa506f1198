"""Trains the base, specialists and joint model of one run, and keeps them by a hash of all that shaped them."""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from r2m.demo import camera, faces, forgeries, networks, resampling, samples, training
from r2m.demo.networks import Detector, save_detector
from r2m.demo.resampling import Picture
from r2m.demo.training import Recipe, train_base, train_detector
from safetensors.torch import load_file
from torch import Tensor

from bench.machine import ROOT
from bench.quality import efficientnet, mobilenet, packages, settings, transformer
from bench.quality import forgeries as further
from bench.quality.networks import load_state, new_network
from bench.quality.settings import Setting

StateDict = dict[str, Tensor]
CACHE = ROOT / "build" / "quality"


class _Shaping(ast.NodeTransformer):
    """Leaves out what shapes no detector: imports, docstrings, errors, and recipes, which count by their values."""

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> ast.Pass:
        return ast.Pass()

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        made = node.value.func if isinstance(node.value, ast.Call) else None
        return None if isinstance(made, ast.Name) and made.id == training.Setting.__name__ else self.generic_visit(node)


def code_of(module: ModuleType) -> str:
    """What a module does, in words that no comment, message or other recipe changes."""
    return ast.unparse(_Shaping().visit(ast.parse(inspect.getsource(module))))


# What a trained detector depends on beside its recipe; a change in any of these files trains it anew.
_SOURCES = "".join(map(code_of, (camera, faces, forgeries, networks, resampling, samples, training)))
_FURTHER = code_of(further)
_OF_ARCHITECTURE = {
    "cnn": (),
    "vit": (code_of(transformer),),
    "mobilenet": (code_of(mobilenet), code_of(packages)),
    "lite0": (code_of(efficientnet), code_of(packages)),
}


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
    def regime(self) -> str:
        """``scratch`` or ``pretrained``."""
        return settings.REGIMES[self.architecture]

    @property
    def setting(self) -> Setting:
        return settings.setting(self.architecture, self.quick)


def runs_of(seeds_of: Callable[[str], Sequence[int]]) -> list[Run]:
    """Every architecture's, of such seeds: ``settings.development_of`` or ``settings.fresh_of``."""
    return [Run(name, seed) for name in settings.REGIMES for seed in seeds_of(name)]


def run_among(runs: Sequence[Run]) -> Callable[[str], Run]:
    """What ``argparse`` makes of a name: the run, or an error that says which there are."""
    known = {run.name: run for run in runs}

    def run(text: str) -> Run:
        if text not in known:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {text}")
        return known[text]

    return run


class Models:
    """The detectors of a run, from the cache or trained; one thread of torch, so that bits do not depend on others.

    Args:
        run: whose.
        directory: keeps what is trained.
    """

    def __init__(self, run: Run, directory: Path = CACHE) -> None:
        self.run = run
        self._directory = directory / run.name
        self._pool = cache(self._make_pool)  # of this run alone

    @cached_property
    def _of_people(self) -> tuple[faces.Photographs, tuple[int, ...]]:
        return faces.read_photographs(), faces.split_people(self.run.seed).train

    def _make_pool(self, kind: str) -> Picture:
        """``real``, or a family's forged pictures to train on: (n, size, size) float32 in [0, 1]."""
        setting, forgery = self.run.setting, further.FURTHER_FORGERIES.get(kind)
        draws = setting.training.real if kind == "real" else setting.training.forged
        return samples.make_pictures(
            *self._of_people, kind, draws, self.run.seed, "training", forgery=forgery, size=setting.size
        )

    def base(self) -> StateDict:
        """Trained on the generic task, or a package's weights; with the head that every specialist starts from."""
        setting, new = self.run.setting, partial(new_network, self.run.architecture)

        def make() -> Detector:
            if setting.base is None:
                return new(self.run.seed)
            data = samples.make_pretraining(*self._of_people, setting.training.real, self.run.seed)
            return train_base(data, setting.base, self.run.seed, _ignore, new)

        return self._get("base", None, make)

    def specialist(self, kind: str) -> StateDict:
        return self._fine_tuned(kind, self.run.setting.specialist, self._pictures, (kind,))

    def trained(self) -> tuple[StateDict, list[StateDict]]:
        """The base and the three specialists."""
        return self.base(), [self.specialist(kind) for kind in settings.MAIN]

    def joint(self, kinds: Sequence[str] = settings.MAIN) -> StateDict:
        return self._fine_tuned("joint " + "+".join(kinds), self.run.setting.joint, self._pictures, kinds)

    def overtrained(self, kind: str) -> StateDict:
        """A specialist trained ten times as long."""
        return self.longer(kind, 10)

    def longer(self, kind: str, times: int) -> StateDict:
        """A specialist trained ``times`` as long, at the usual rate."""
        recipe = self.run.setting.specialist
        name = f"{kind} overtrained" + f" by {times}" * (times != 10)  # ten times has the name that caches know
        return self._fine_tuned(name, replace(recipe, steps=times * recipe.steps), self._pictures, (kind,))

    def moved(self, kind: str, rate: int) -> StateDict:
        """A specialist whose backbone was trained at ``rate`` times the learning rate, and its head as ever."""
        recipe = self.run.setting.specialist
        faster = replace(recipe, learning_rate=rate * recipe.learning_rate, head_rate=recipe.head_rate / rate)
        return self._fine_tuned(f"{kind} at rate {rate}", faster, self._pictures, (kind,))

    def shuffled(self, kind: str) -> StateDict:
        """A specialist whose labels mean nothing: its real and forged pictures were thrown together and mixed."""
        return self._fine_tuned(f"{kind} shuffled", self.run.setting.specialist, self._mixed, (kind,))

    def flipped(self, kind: str) -> StateDict:
        """A specialist whose labels were exchanged."""
        return self._fine_tuned(f"{kind} flipped", self.run.setting.specialist, self._turned, (kind,))

    def order(self, name: str) -> int:
        """The seed of the order of pictures of a detector: the run's, or its own where orders are independent.

        An order that all share makes task vectors more alike than what they learned.
        """
        if not self.run.setting.independent:
            return self.run.seed
        return int(samples.stream(self.run.seed, f"order/{name}").integers(2**31))

    def _pictures(self, *kinds: str) -> tuple[Picture, list[Picture]]:
        return self._pool("real"), [self._pool(kind) for kind in kinds]

    def _turned(self, kind: str) -> tuple[Picture, list[Picture]]:
        return self._pool(kind), [self._pool("real")]

    def _mixed(self, kind: str) -> tuple[Picture, list[Picture]]:
        both = np.concatenate([self._pool("real"), self._pool(kind)])
        order, half = np.random.default_rng(self.run.seed).permutation(len(both)), len(both) // 2
        return both[order[:half]], [both[order[half:]]]

    def _fine_tuned(
        self, name: str, recipe: Recipe, pictures: Callable[..., tuple[Picture, list[Picture]]], kinds: Sequence[str]
    ) -> StateDict:
        def train() -> Detector:
            base = load_state(self.run.architecture, self.base())
            return train_detector(base, *pictures(*kinds), recipe, self.order(name), _ignore)

        return self._get(name, recipe, train)

    def _get(self, name: str, recipe: Recipe | None, train: Callable[[], Detector]) -> StateDict:
        path = self._directory / f"{name.replace(' ', '-')}-{_hash(self.run, name, recipe)}.safetensors"
        if not path.exists():
            save_detector(train(), path)
        # From a file also when it is new: torch rounds by where in memory a tensor starts.
        return load_file(path)


def _ignore(loss: float) -> None:
    pass


def _hash(run: Run, name: str, recipe: Recipe | None) -> str:
    """Of the run, the recipes and the code. Specialists also depend on the base's recipe."""
    sources = [_SOURCES, *_OF_ARCHITECTURE[run.architecture]]
    if any(kind in name for kind in settings.FURTHER):
        sources.append(_FURTHER)
    shaped_by = {
        "run": [run.architecture, run.seed],
        "name": name,
        "recipes": [one and asdict(one) for one in (recipe, run.setting.base)],
        "pictures": [run.setting.training, run.setting.size, run.setting.independent],
        "torch": torch.__version__,
        "code": sources,
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()[:12]
