"""The detector: a small convolutional network with batch normalisation and a two-logit head."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from r2m.places import new_file
from r2m_kernels.errors import BadCheckpoint

FEATURES = 128
# (channels out, stride) of each block: 48 → 24 → 12 → 6 pixels, 213 thousand parameters in all.
_BLOCKS = ((16, 2), (32, 1), (48, 2), (64, 1), (96, 2), (FEATURES, 1))


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """3 by 3 convolution, batch normalisation, rectification."""
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(channels_out), relu=nn.ReLU()))


class Backbone(nn.Module):
    """Pictures to features."""

    def __init__(self) -> None:
        super().__init__()
        pairs = itertools.pairwise(((1, 0), *_BLOCKS))
        self.blocks = nn.Sequential(*(_block(before, *block) for (before, _), block in pairs))

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 48, 48) float32 in [0, 1] to (n, 128) float32."""
        maps: Tensor = self.blocks((pictures.unsqueeze(1) - 0.45) * 4.0)
        return maps.mean(dim=(2, 3))


class Detector(nn.Module):
    """Backbone and head. Logits are (real, fake): a forgery's probability is ``softmax(logits)[:, 1]``."""

    def __init__(self, backbone: nn.Module | None = None, features: int = FEATURES) -> None:
        super().__init__()
        self.backbone = Backbone() if backbone is None else backbone
        self.head = nn.Linear(features, 2)
        # Convolutions on CPUs are a tenth faster on this layout; checkpoints do not show it.
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 48, 48) float32 in [0, 1] to (n, 2) float32 logits."""
        logits: Tensor = self.head(self.backbone(pictures))
        return logits


def new_detector(seed: int, make: Callable[[], Detector] = Detector) -> Detector:
    """A detector with fresh parameters, the same for the same seed; torch's own stream is left alone."""
    with torch.device("meta"):  # the usual initialisation would draw from a stream that all threads share
        detector = make()
    detector.to_empty(device="cpu")
    initialise(detector, torch.Generator().manual_seed(seed))
    return detector


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the parameters of a module and of those inside it from torch's usual distributions."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            bound = part.weight[0].numel() ** -0.5
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        elif isinstance(part, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            part.reset_parameters()


def save_detector(detector: Detector, path: Path) -> None:
    """Write parameters and buffers, running statistics and counters included, as a safetensors checkpoint."""
    state = {name: tensor.detach().contiguous() for name, tensor in detector.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    new_file(path, safetensors.torch.save(state, metadata={"format": "pt"}))


def load_detector(path: Path) -> Detector:
    """Read a detector back, in evaluation mode.

    Raises:
        BadCheckpoint: it does not hold exactly a detector's tensors.
    """
    detector = new_detector(0)
    try:
        detector.load_state_dict(safetensors.torch.load_file(path), strict=True)
    except RuntimeError as error:
        raise BadCheckpoint(f"{path}: does not hold the demo's detector: {' '.join(str(error).split())}") from error
    return detector.eval()
