"""A small vision transformer with LayerNorm, trained from nothing."""

from __future__ import annotations

import itertools

from r2m.demo.networks import Detector
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, STEM = 64, 3, 4, (24, 48)
TOKENS = 36  # 6 × 6 after three convolutions of stride 2


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm; q, k, v in one matrix, as timm has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 3 * WIDTH)
        self.fc2 = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, width) to the same."""
        n, count, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(n, count, 3, HEADS, width // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(n, count, width))
        made: Tensor = tokens + self.fc2(nn.functional.gelu(self.fc1(self.norm2(tokens))))
        return made


class TransformerBackbone(nn.Module):
    """A convolutional stem, which lets so small a transformer learn from few pictures, and three blocks."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, *STEM, WIDTH)
        self.stem = nn.ModuleList([nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(channels)])
        # One group: a LayerNorm over channels and places.
        self.stem_norms = nn.ModuleList([nn.GroupNorm(1, width) for width in channels[1:]])
        # A linear map from one-hot places: drawn by the rule of every other layer.
        self.place = nn.Linear(TOKENS, WIDTH, bias=False)
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 48, 48) float32 in [0, 1] to (n, 64) float32."""
        maps = (pictures.unsqueeze(1) - 0.45) * 4.0
        for convolution, norm in zip(self.stem, self.stem_norms, strict=True):
            maps = nn.functional.gelu(norm(convolution(maps)))
        tokens = maps.flatten(2).transpose(1, 2) + self.place.weight.T
        for block in self.blocks:
            tokens = block(tokens)
        pooled: Tensor = self.norm(tokens).mean(dim=1)
        return pooled


def transformer() -> Detector:
    """A detector without parameters' values."""
    return Detector(TransformerBackbone(), WIDTH)
