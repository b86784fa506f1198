"""Training: a base on a generic task, then specialists and a joint model from it, all by one recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from r2m.demo.networks import Detector, initialise, new_detector
from r2m.demo.resampling import Picture
from r2m.demo.samples import DEGRADATIONS, PretrainingSet

Progress = Callable[[float], None]
"""Called after each step with the step's loss."""


@dataclass(frozen=True)
class Recipe:
    """Steps, batch and learning rate of one training run.

    Attributes:
        steps: number of updates, > 0.
        batch: pictures an update, even: half of them real.
        learning_rate: its peak, after a tenth of the steps; then it falls to 0 along a cosine.
        weight_decay: decoupled weight decay of AdamW.
    """

    steps: int
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01


def train_base(
    data: PretrainingSet,
    recipe: Recipe,
    seed: int,
    progress: Progress,
    new: Callable[[int], Detector] = new_detector,
) -> Detector:
    """Train a backbone to tell rotation, degradation and identity, then give it a fresh real/fake head.

    Args:
        data: pictures and their three labels.
        recipe: steps, batch and learning rate.
        seed: of the parameters and of the order of pictures.
        progress: called after each step.
        new: makes the detector from the seed.

    Returns:
        A detector in evaluation mode: the trained backbone, and the head that every specialist starts from.
    """
    detector = new(seed)
    people = int(data.identity.max()) + 1
    kinds = (4, len(DEGRADATIONS), people)
    with torch.device("meta"):
        heads = nn.ModuleList([nn.Linear(detector.head.in_features, count) for count in kinds])
    heads.to_empty(device="cpu")
    initialise(heads, torch.Generator().manual_seed(seed))
    pictures = torch.from_numpy(data.pictures)
    labels = torch.from_numpy(np.stack([data.rotation, data.degradation, data.identity]))
    order = torch.Generator().manual_seed(seed)
    parameters = [*detector.backbone.parameters(), *heads.parameters()]

    def loss() -> Tensor:
        chosen = torch.randint(len(pictures), (recipe.batch,), generator=order)
        features = detector.backbone(pictures[chosen])
        losses = [nn.functional.cross_entropy(head(features), labels[task, chosen]) for task, head in enumerate(heads)]
        return torch.stack(losses).sum()

    _optimise(detector, parameters, loss, recipe, progress)
    return detector


def train_detector(
    base: Detector, real: Picture, forged: list[Picture], recipe: Recipe, seed: int, progress: Progress
) -> Detector:
    """Fine-tune a copy of the base to tell real pictures from forged ones.

    Batch normalisation keeps the base's running statistics, as is usual with little data. Without data a merge cannot
    re-estimate them, and the mean of several models' statistics fits none of the merged features.

    Args:
        base: where training starts; not modified.
        real: (n, 48, 48) float32 in [0, 1].
        forged: one such array for each family: one for a specialist, all for the joint model.
        recipe: steps, batch and learning rate.
        seed: of the order of pictures.
        progress: called after each step.

    Returns:
        The fine-tuned detector, in evaluation mode.
    """
    detector = copy.deepcopy(base)
    reals = torch.from_numpy(real)
    fakes = torch.cat([torch.from_numpy(pictures) for pictures in forged])
    order = torch.Generator().manual_seed(seed)
    half = recipe.batch // 2
    labels = torch.cat([torch.zeros(half, dtype=torch.int64), torch.ones(half, dtype=torch.int64)])

    def loss() -> Tensor:
        chosen_reals = torch.randint(len(reals), (half,), generator=order)
        chosen_fakes = torch.randint(len(fakes), (half,), generator=order)
        pictures = torch.cat([reals[chosen_reals], fakes[chosen_fakes]])
        return nn.functional.cross_entropy(detector(_vary(pictures, order)), labels)

    _optimise(detector, list(detector.parameters()), loss, recipe, progress, keep_statistics=True)
    return detector


def _vary(pictures: Tensor, order: torch.Generator) -> Tensor:
    """Mirror half of the pictures and change brightness a little, real and forged alike."""
    mirrored = torch.rand(len(pictures), 1, 1, generator=order) < 0.5
    pictures = torch.where(mirrored, pictures.flip(2), pictures)
    return pictures + 0.1 * (torch.rand(len(pictures), 1, 1, generator=order) - 0.5)


def _optimise(
    detector: Detector,
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    recipe: Recipe,
    progress: Progress,
    keep_statistics: bool = False,
) -> None:
    """AdamW with a short warm-up and a cosine decay; leaves the detector in evaluation mode."""
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    warm_up = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / max(1, recipe.steps))),
    )
    detector.train(not keep_statistics)  # batch normalisation is all that the mode changes
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(value.item())
    detector.eval()
