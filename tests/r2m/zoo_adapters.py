"""Adapters made by PEFT on models of several libraries; run by test_adapters.py in their environment.

``zoo_adapters.py make DIR`` saves for each kind a base, three adapters, and the three models that
``merge_and_unload()`` makes of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.pytorch_utils import Conv1D

EXPERTS = ("fs", "fr", "efs")


class Pooled(nn.Module):
    """Layers that no detector of the others has: an embedding, PyTorch's attention, Conv1D, a 1-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.wide, self.square = Conv1D(24, 16), Conv1D(24, 24)
        self.along = nn.Conv1d(24, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.tokens(indices)
        x = self.square(self.wide(self.attention(x, x, x)[0]))
        return self.head(self.along(x.mT).mean(-1))


@dataclass(frozen=True)
class Kind:
    """A model and the adapters on it.

    Attributes:
        build: the base.
        options: of PEFT's configuration, of all three.
        each: of the second and the third alone.
        whole: whether the base is saved as a directory of transformers.
    """

    build: Callable[[], nn.Module]
    options: Mapping[str, Any]
    each: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}))
    whole: bool = False


def tower() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**zoo.VISION))


KINDS = {
    "timm_vit": Kind(
        zoo.KINDS["timm_vit"].build,
        {"target_modules": ["qkv", "proj", "fc1"], "modules_to_save": ["head"]},
        (
            {"use_rslora": True, "rank_pattern": {"qkv": 6}, "alpha_pattern": {r"blocks\.1\.attn\.qkv": 3}},
            {"bias": "all", "lora_alpha": 1},
        ),
    ),
    "clip_tower": Kind(
        tower,
        {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]},
        ({"use_dora": True}, {"target_modules": ["fc1", "fc2", "patch_embedding"], "use_dora": True}),
        whole=True,
    ),
    "resnet": Kind(
        lambda: zoo.torchvision.models.resnet18(num_classes=2),
        {"target_modules": ["conv1", "conv2", "downsample.0"], "modules_to_save": ["fc"]},
        ({"use_dora": True}, {"lora_bias": True, "target_modules": ["fc"], "modules_to_save": None}),
    ),
    "others": Kind(
        Pooled,
        {"target_modules": ["tokens", "attention", "along"]},
        (
            {"target_modules": ["tokens", "wide", "square"], "use_dora": True, "fan_in_fan_out": True},
            {"target_modules": ["wide", "square", "along"], "fan_in_fan_out": True},
        ),
    ),
}


def make(directory: Path) -> None:
    for number, (name, kind) in enumerate(KINDS.items()):
        place = directory / name
        place.mkdir()
        torch.manual_seed(number)
        base = kind.build()
        state = {key: value.clone() for key, value in base.state_dict().items()}
        if kind.whole:
            base.save_pretrained(place / "base")
        else:
            save_file(state, place / "base.safetensors")
        for expert, more in zip(EXPERTS, ({}, *kind.each), strict=True):
            model = kind.build()
            model.load_state_dict(state, strict=True)
            adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **kind.options, **more}))
            trained(adapted)
            adapted.save_pretrained(place / expert)
            merged = adapted.merge_and_unload()
            if kind.whole:
                merged.save_pretrained(place / f"{expert}-unloaded")
            else:
                save_file(contiguous(merged.state_dict()), place / f"{expert}-unloaded.safetensors")
    print(json.dumps({name: kind.whole for name, kind in KINDS.items()}))


def trained(model: nn.Module) -> None:
    """As after some steps: whatever could be trained has moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)


def contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


if __name__ == "__main__":
    {"make": make}[sys.argv[1]](Path(sys.argv[2]))
