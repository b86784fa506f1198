"""Training: a base on a generic task, then specialists and a joint model from it, all by one recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from r2m.demo.networks import Detector, initialise, new_detector
from r2m.demo.resampling import Picture
from r2m.demo.samples import DEGRADATIONS, PretrainingSet

Progress = Callable[[float], None]
"""Called after each step with the step's loss."""


@dataclass(frozen=True)
class Recipe:
    """Steps, batch and learning rate of one training run."""

    steps: int  # updates, > 0
    batch: int = 64  # pictures an update, even: half of them real
    learning_rate: float = 1e-3  # its peak, after a tenth of the steps; then it falls to 0 along a cosine
    weight_decay: float = 0.01  # decoupled, of AdamW
    head_rate: float = 1.0  # the head's learning rate over the backbone's, in fine-tuning


@dataclass(frozen=True)
class Setting:
    """How much a run trains, and how many crops of each photograph there are, real and for each forgery."""

    base: Recipe  # the generic pretraining
    specialist: Recipe  # the same for all
    training_draws: int
    validation_draws: int
    test_draws: int

    @property
    def joint(self) -> Recipe:
        """Three times a specialist's steps: as many forgeries of each family as that family's specialist sees."""
        return replace(self.specialist, steps=3 * self.specialist.steps)


FULL = Setting(Recipe(400, learning_rate=2e-3), Recipe(300), training_draws=12, validation_draws=4, test_draws=4)
# One to two minutes: specialists are far above chance on their own families, and behind what more training gives.
QUICK = Setting(
    Recipe(250, batch=32, learning_rate=2e-3),
    Recipe(200, batch=32),
    training_draws=8,
    validation_draws=1,
    test_draws=2,
)


def train_base(
    data: PretrainingSet, recipe: Recipe, seed: int, progress: Progress, new: Callable[[int], Detector] = new_detector
) -> Detector:
    """Train a backbone to tell rotation, degradation and identity, beside the fresh head that every specialist gets.

    ``seed`` is of the parameters, which ``new`` draws, and of the order of pictures. The result is in evaluation mode.
    """
    detector = new(seed)
    kinds = (4, len(DEGRADATIONS), int(data.labels[2].max()) + 1)
    with torch.device("meta"):
        heads = nn.ModuleList([nn.Linear(detector.head.in_features, count) for count in kinds])
    heads.to_empty(device="cpu")
    initialise(heads, torch.Generator().manual_seed(seed))
    pictures, labels = torch.from_numpy(data.pictures), torch.from_numpy(data.labels)
    order = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = torch.randint(len(pictures), (recipe.batch,), generator=order)
        features = detector.backbone(pictures[chosen])
        losses = [nn.functional.cross_entropy(head(features), labels[task, chosen]) for task, head in enumerate(heads)]
        return torch.stack(losses).sum()

    detector.train()
    _optimise([*detector.backbone.parameters(), *heads.parameters()], loss, recipe, progress)
    return detector.eval()


def train_detector(
    base: Detector, real: Picture, forged: list[Picture], recipe: Recipe, seed: int, progress: Progress
) -> Detector:
    """Fine-tune a copy of the base to tell real pictures from forged ones.

    Batch normalisation keeps the base's running statistics, as is usual with little data. Without data a merge cannot
    re-estimate them, and the mean of several models' statistics fits none of the merged features.

    Args:
        base: where training starts; not modified.
        real: (n, size, size) float32 in [0, 1].
        forged: one such array for each family: one for a specialist, all for the joint model.
        recipe, seed, progress: how; the seed is of the order of pictures. The result is in evaluation mode.
    """
    detector = copy.deepcopy(base).eval()  # batch normalisation is all that the mode changes
    reals = torch.from_numpy(real)
    fakes = torch.cat([torch.from_numpy(pictures) for pictures in forged])
    order = torch.Generator().manual_seed(seed)
    half = recipe.batch // 2
    labels = torch.tensor([0, 1]).repeat_interleave(half)

    def loss() -> Tensor:
        chosen_reals = torch.randint(len(reals), (half,), generator=order)
        chosen_fakes = torch.randint(len(fakes), (half,), generator=order)
        pictures = torch.cat([reals[chosen_reals], fakes[chosen_fakes]])
        return nn.functional.cross_entropy(detector(_vary(pictures, order)), labels)

    backbone: dict[str, Any] = {"params": list(detector.backbone.parameters())}
    head = {"params": list(detector.head.parameters()), "lr": recipe.head_rate * recipe.learning_rate}
    _optimise([backbone, head], loss, recipe, progress)
    return detector


def _vary(pictures: Tensor, order: torch.Generator) -> Tensor:
    """Mirror half of the pictures and change brightness a little, real and forged alike."""
    mirrored = torch.rand(len(pictures), 1, 1, generator=order) < 0.5
    pictures = torch.where(mirrored, pictures.flip(2), pictures)
    return pictures + 0.1 * (torch.rand(len(pictures), 1, 1, generator=order) - 0.5)


def _optimise(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    loss: Callable[[], Tensor],
    recipe: Recipe,
    progress: Progress,
) -> None:
    """AdamW with a short warm-up and a cosine decay."""
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    warm_up = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / max(1, recipe.steps))),
    )
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(value.item())
