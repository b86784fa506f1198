"""What is done to an image before a detector sees it: part of the model, and never mixed silently."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m.places import read_beside
from r2m_kernels.errors import BadOption, DoesNotFit, InvalidInput

FILE = "preprocessor_config.json"  # of transformers
_CHANNELS = 3


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes numbers.

    Attributes:
        size: pixels of its sides.
        mean, std: of the channels, of values in [0, 1]: what is subtracted, and what the rest is divided by.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 2**15:
            raise BadOption(f"preprocessing: size: expected pixels of a side, got {self.size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != _CHANNELS or not all(map(math.isfinite, values)):
                raise BadOption(f"preprocessing: {name}: expected {_CHANNELS} numbers, got {list(values)}")
        if min(self.std) <= 0:
            raise BadOption(f"preprocessing: std: expected positive numbers, got {list(self.std)}")

    @classmethod
    def of(cls, size: int, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
        """From any sequences of numbers."""
        return cls(size, tuple(map(float, mean)), tuple(map(float, std)))

    def plain(self) -> dict[str, Any]:
        """As plain values, for recipes and reports."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std)}

    def for_transformers(self) -> bytes:
        """The text of a ``preprocessor_config.json``."""
        side = {"height": self.size, "width": self.size}
        content = {
            "do_resize": True,
            "size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_processor_type": "ViTImageProcessor",
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    def __str__(self) -> str:
        numbers = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return "{} px, mean {}, std {}".format(self.size, *numbers)


def beside(checkpoint: str | Path) -> Preprocessing | None:
    """What stands in a checkpoint's directory; None where nothing does, or not all of it."""
    path = Path(checkpoint)
    path = (path if path.is_dir() else path.parent) / FILE
    content = read_beside(path)
    try:
        size = content.get("crop_size") if content.get("do_center_crop") else None
        size = size or content["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        return Preprocessing.of(int(size), content["image_mean"], content["image_std"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, InvalidInput):
        return None


def common(experts: Mapping[str, Preprocessing | None], chosen: Preprocessing | None) -> Preprocessing | None:
    """The preprocessing of a merge.

    Args:
        experts: name → what it has; None where nobody has said.
        chosen: what was asked for, whatever the experts have.

    Returns:
        None where nothing is known.

    Raises:
        DoesNotFit: experts differ and nothing was chosen.
    """
    known = {name: one for name, one in experts.items() if one is not None}
    if chosen is not None or not known:
        return chosen
    first, *others = known
    for name in others:
        if known[name] != known[first]:
            raise DoesNotFit(
                f"preprocessing: expert '{first}' has {known[first]}, expert '{name}' has {known[name]}; a merge of "
                "both sees images as neither does; say which one it shall have (preprocessing in the recipe) if that "
                "is meant"
            )
    return known[first]
