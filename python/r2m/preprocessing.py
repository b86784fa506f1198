"""What is done to an image before a detector sees it: part of the model, and never mixed silently."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from r2m_kernels.errors import BadOption, DoesNotFit

FILE = "preprocessor_config.json"  # of transformers
_CHANNELS = 3
_MOST = 2**15  # pixels of a side

# How an image gets to its size: both sides to it; its shorter side, or its longer one, to it, the shape kept; not.
Resize = Literal["squash", "shortest", "longest", "none"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]  # by Pillow's numbers
# The corner of a centre crop that cannot lie in the middle: transformers rounds down, torchvision to the even number.
Corner = Literal["down", "even"]
RESAMPLES: tuple[Resample, ...] = get_args(Resample)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes numbers: upright and in colours, resized, cut in its centre, scaled, normalised.

    Attributes:
        size: pixels of the sides of what the detector sees.
        mean, std: of the channels, of scaled values: what is subtracted, and what the rest is divided by.
        resize: how it is brought to ``scale``.
        scale: pixels of the side that it is resized to; what is more than ``size`` is cut off around the centre, what
            is less is filled. 0: ``size``.
        resample: how pixels in between are found.
        rescale: what values from 0 to 255 are multiplied with.
        corner: of the cut.
        fill: values from 0 to 255 of the channels of what is filled.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "squash"
    scale: int = 0
    resample: Resample = "bicubic"
    rescale: float = 1 / 255
    corner: Corner = "down"
    fill: tuple[int, ...] = (0,) * _CHANNELS

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.scale or self.size)
        for name in ("size", "scale"):
            value = getattr(self, name)
            if not _whole(value) or not 1 <= value <= _MOST:
                raise BadOption(f"preprocessing: {name}: expected pixels of a side, got {value}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != _CHANNELS or not all(map(math.isfinite, values)):
                raise BadOption(f"preprocessing: {name}: expected {_CHANNELS} numbers, got {list(values)}")
        if min(self.std) <= 0:
            raise BadOption(f"preprocessing: std: expected positive numbers, got {list(self.std)}")
        if not 0 < self.rescale < math.inf:
            raise BadOption(f"preprocessing: rescale: expected a positive number, got {self.rescale}")
        if len(self.fill) != _CHANNELS or not all(_whole(one) and 0 <= one <= 255 for one in self.fill):
            raise BadOption(f"preprocessing: fill: expected {_CHANNELS} numbers from 0 to 255, got {list(self.fill)}")
        for name, choices in (("resize", get_args(Resize)), ("resample", RESAMPLES), ("corner", get_args(Corner))):
            if getattr(self, name) not in choices:
                raise BadOption(f"preprocessing: {name}: expected {', '.join(choices)}, got {getattr(self, name)}")

    @classmethod
    def of(cls, size: int, mean: Sequence[float], std: Sequence[float], **more: Any) -> Preprocessing:
        """From any sequences of numbers; ``more``: other attributes."""
        if "fill" in more:
            more["fill"] = tuple(more["fill"])
        return cls(size, tuple(map(float, mean)), tuple(map(float, std)), **more)

    def plain(self) -> dict[str, Any]:
        """As plain values, for recipes and reports: the size, mean and deviation, and what is not as by default."""
        usual = {one.name: one.default for one in fields(self)} | {"scale": self.size}
        values = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def for_transformers(self) -> bytes | None:
        """The text of a ``preprocessor_config.json``; None where transformers has no words for it."""
        if self.resize == "longest" or any(self.fill):
            return None
        square = {"height": self.scale, "width": self.scale}
        # Of transformers' own classes those that do just this; others add steps.
        crops = self.resize != "squash" or self.scale != self.size
        content = {
            "do_convert_rgb": True,
            "do_resize": self.resize != "none",
            "size": {"shortest_edge": self.scale} if self.resize == "shortest" else square,
            "resample": RESAMPLES.index(self.resample),
            "do_center_crop": crops,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": self.rescale != 1,
            "rescale_factor": self.rescale,
            "do_normalize": (self.mean, self.std) != ((0.0,) * _CHANNELS, (1.0,) * _CHANNELS),
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_processor_type": "CLIPImageProcessor" if crops else "ViTImageProcessor",
            # No word of transformers': its crops are always so, one pixel beside torchvision's at most.
            **({} if self.corner == "down" else {CORNER: self.corner}),
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    def __str__(self) -> str:
        numbers = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        sides = {"squash": "both sides", "shortest": "the shorter side", "longest": "the longer side"}
        steps = [f"{self.size} px"]
        if self.resize == "none" or (self.resize, self.scale) != ("squash", self.size):
            scaled = "not resized" if self.resize == "none" else f"{sides[self.resize]} resized to {self.scale}"
            steps.append(f"the centre of a picture {scaled}")
        steps += [self.resample] * (self.resample != "bicubic")
        steps += [f"rescaled by {self.rescale:g}"] * (not math.isclose(self.rescale, 1 / 255))
        return ", ".join([*steps, "mean {}, std {}".format(*numbers)])


CORNER = "crop_corner"  # of r2m, in a file that is else transformers'


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
