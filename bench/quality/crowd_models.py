"""Further specialists of a run, for merges of many: again in another order, of several families, by other recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from r2m.demo import samples, training
from r2m.demo.faces import PHOTOGRAPHS_EACH
from r2m.demo.forgeries import forge
from r2m.demo.networks import Detector
from r2m.demo.resampling import Picture
from torch import Tensor, nn

from bench.quality import settings
from bench.quality.models import Models, Run, StateDict
from bench.quality.networks import load_state

FAMILIES = settings.MAIN + settings.FURTHER
FINER = "FS′"  # face swaps by the shifted parameters of the demo's cross group: another generator of that family
THIRDS = 3  # parts of the people, where every specialist has people of its own


class Crowd(Models):
    """Further specialists of a run, from the cache or trained."""

    def member(self, number: int) -> StateDict:
        """Families by turns; after the first round each again, with pictures in another order."""
        kind, copy = FAMILIES[number % len(FAMILIES)], number // len(FAMILIES)
        return self.specialist(kind) if not copy else self._like(f"{kind} again {copy}", kind)

    def of_both(self, *kinds: str) -> StateDict:
        """One specialist of several families, trained as long as one of one."""
        return self._like(" with ".join(kinds), *kinds)

    def finer(self) -> StateDict:
        """Of the generator that is new in an old family."""
        return self._fine_tuned(f"{FINER} alone", self.run.setting.specialist, self._shifted, ())

    def retrained(self) -> StateDict:
        """The old family's specialist, trained anew with the new generator beside the old one, as long."""
        return self._fine_tuned(f"FS and {FINER}", self.run.setting.specialist, self._shifted, ("FS",))

    def otherwise(self, kind: str) -> StateDict:
        """A specialist by a recipe that is not the others': longer and slower, small batches, or three times faster."""
        usual = self.run.setting.specialist
        recipes = {
            "FS": replace(usual, steps=2 * usual.steps, learning_rate=usual.learning_rate / 2),
            "FR": replace(usual, batch=usual.batch // 2, weight_decay=10 * usual.weight_decay),
            "EFS": replace(usual, learning_rate=3 * usual.learning_rate),
        }
        return self._fine_tuned(f"{kind} otherwise", recipes[kind], self._pictures, (kind,))

    def of_third(self, kind: str, part: int) -> StateDict:
        """A specialist that saw only a third of the people, real and forged."""
        return self._fine_tuned(
            f"{kind} of third {part}", self.run.setting.specialist, partial(self._third, part), (kind,)
        )

    def of_camera(self, kind: str) -> StateDict:
        """A specialist whose pictures, real and forged, are all by the other camera."""
        return self._fine_tuned(f"{kind} elsewhere", self.run.setting.specialist, self._elsewhere, (kind,))

    def multiclass(self) -> Detector:
        """Joint training on one class a family beside Real."""
        base = load_state(self.run.architecture, self.base())
        with torch.random.fork_rng():
            torch.manual_seed(self.run.seed)
            base.head = nn.Linear(base.head.in_features, 1 + len(settings.MAIN))
        recipe, order = self.run.setting.joint, self.order("joint by family")
        _train_by_family(base, *self._pictures(*settings.MAIN), recipe, order)
        return base

    def _like(self, name: str, *kinds: str) -> StateDict:
        return self._fine_tuned(name, self.run.setting.specialist, self._pictures, kinds)

    def _shifted(self, *kinds: str) -> tuple[Picture, list[Picture]]:
        made = finer_pictures(*self._of_people, self.run.setting.training.forged, self.run, "training")
        return self._pool("real"), [*(self._pool(kind) for kind in kinds), made]

    def _third(self, part: int, kind: str) -> tuple[Picture, list[Picture]]:
        people = len(self._of_people[1])

        def some(pictures: Picture) -> Picture:
            by_person = pictures.reshape(-1, people, PHOTOGRAPHS_EACH, *pictures.shape[1:])
            chosen: Picture = by_person[:, part::THIRDS].reshape(-1, *pictures.shape[1:])
            return chosen

        return some(self._pool("real")), [some(self._pool(kind))]

    def _elsewhere(self, kind: str) -> tuple[Picture, list[Picture]]:
        setting = self.run.setting

        def make(what: str, draws: int, forgery: samples.Forgery | None) -> Picture:
            return samples.make_pictures(
                *self._of_people,
                what,
                draws,
                self.run.seed,
                "training elsewhere",
                elsewhere=True,
                forgery=forgery,
                size=setting.size,
            )

        return make("real", setting.training.real, None), [make(kind, setting.training.forged, partial(forge, kind))]


def finer_pictures(photographs: Picture, people: Sequence[int], draws: int, run: Run, label: str) -> Picture:
    """By the new generator of the old family, the usual camera."""
    forgery = partial(forge, "FS", shifted=True)
    size = run.setting.size
    return samples.make_pictures(photographs, people, FINER, draws, run.seed, label, forgery=forgery, size=size)


def _train_by_family(
    detector: Detector, real: Picture, forged: Sequence[Picture], recipe: training.Recipe, seed: int
) -> None:
    """As ``training.train_detector`` trains, with the family as class: half of a batch real, forgeries alike often."""
    reals, fakes = torch.from_numpy(real), torch.from_numpy(np.concatenate(forged))
    family = torch.arange(len(forged)).repeat_interleave(len(forged[0])) + 1
    order, half = torch.Generator().manual_seed(seed), recipe.batch // 2

    def loss() -> Tensor:
        chosen = torch.randint(len(reals), (half,), generator=order)
        others = torch.randint(len(fakes), (half,), generator=order)
        pictures = training._vary(torch.cat([reals[chosen], fakes[others]]), order)
        labels = torch.cat([torch.zeros(half, dtype=torch.long), family[others]])
        return nn.functional.cross_entropy(detector(pictures), labels)

    head = {"params": list(detector.head.parameters()), "lr": recipe.head_rate * recipe.learning_rate}
    training._optimise([{"params": list(detector.backbone.parameters())}, head], loss, recipe, lambda loss: None)
