"""The architectures: two small ones trained from nothing, two with weights of ImageNet."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from r2m.demo.networks import Detector, new_detector
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench.quality import efficientnet, mobilenet
from bench.quality.transformer import transformer

Weights = Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]


class Architecture(NamedTuple):
    """How a detector is made, and where its backbone's weights come from."""

    make: Callable[[], Detector]
    weights: Weights | None = None  # from a package; without them the base is trained


ARCHITECTURES: dict[str, Architecture] = {
    "cnn": Architecture(Detector),
    "vit": Architecture(transformer),
    "mobilenet": Architecture(mobilenet.mobilenet, mobilenet.read_weights),
    "lite0": Architecture(efficientnet.efficientnet_lite0, efficientnet.read_weights),
}


def new_network(architecture: str, seed: int) -> Detector:
    """A fresh detector of one of ``ARCHITECTURES``: drawn whole, or a head alone before a pretrained backbone."""
    make, weights = ARCHITECTURES[architecture]
    detector = new_detector(seed, make)
    if weights is not None:
        detector.backbone.load_state_dict(weights()[0], strict=True)
        detector.eval()
    return detector


def load_state(architecture: str, state: dict[str, Tensor], *, folded: bool = False) -> Detector:
    """A detector with these parameters, in evaluation mode.

    ``folded``: batch normalisation of pretrained networks becomes part of the convolutions before it, which takes a
    third less time and is for scoring alone.
    """
    made = ARCHITECTURES[architecture]
    with torch.device("meta"):
        detector = made.make()
    detector.load_state_dict(state, strict=True, assign=True)
    detector.eval()
    if made.weights is not None:
        if folded:
            _fold(detector)
        nn.utils.convert_conv2d_weight_memory_format(detector, torch.channels_last)  # the state's tensors have not
    return detector


def _fold(network: nn.Module) -> None:
    """Replace every convolution that a batch normalisation follows by one that does both."""
    for part in list(network.modules()):
        for (name, first), (second_name, second) in itertools.pairwise(list(part.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(part, name, fuse_conv_bn_eval(first, second))
                setattr(part, second_name, nn.Identity())
