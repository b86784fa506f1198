"""Pictures through a detector, batch by batch: the one way by which every command comes to its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from r2m.evaluation.detectors import probabilities
from r2m_kernels.errors import BadOption
from r2m_kernels.streaming import usable_device

T = TypeVar("T")
_THREADS = 4  # that read pictures, while the detector works


def scored(
    name: str,
    model: nn.Module,
    pictures: Iterable[T],
    read: Callable[[T], Tensor | str],
    *,
    batch: int,
    device: str,
) -> Iterator[list[tuple[T, float | str]]]:
    """Batches of pictures, in order, each with its probability of fake, or why there is none.

    Args:
        name: of the model, for error messages.
        model: in evaluation mode.
        pictures: whatever ``read`` knows.
        read: gives (3, s, s) float32, or why there is none; several threads call it.
        batch: pictures at a time.
        device: where the model runs.

    Raises:
        InvalidInput: outputs that are no probabilities, or no such device.
    """
    place = usable_device(device)
    model = model.to(place)
    for loaded in _loaded(pictures, read, batch):
        images = [image for _, image in loaded if isinstance(image, Tensor)]
        values: Iterator[float] = iter(())
        if images:
            with torch.inference_mode():
                found = probabilities(model(torch.stack(images).to(place)), f"model '{name}'").tolist()
            if len(found) != len(images):
                raise BadOption(f"model '{name}': expected {len(images)} outputs, got {len(found)}")
            values = iter(found)
        yield [(picture, next(values) if isinstance(image, Tensor) else image) for picture, image in loaded]


def _loaded(
    pictures: Iterable[T], read: Callable[[T], Tensor | str], count: int
) -> Iterator[list[tuple[T, Tensor | str]]]:
    """Batches with their images, the next being read while one is used."""
    left = iter(pictures)
    with ThreadPoolExecutor(_THREADS) as pool:
        batches = iter(lambda: list(islice(left, count)), [])
        begun = ([(picture, pool.submit(read, picture)) for picture in batch] for batch in batches)
        for batch, _next in pairwise(chain(begun, [[]])):
            yield [(picture, image.result()) for picture, image in batch]
