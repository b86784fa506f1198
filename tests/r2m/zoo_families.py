"""Detectors in directories as transformers, timm and open_clip leave them, merged and judged without an option.

Run by test_pictures.py in their environment: ``zoo_families.py judge DIR`` prints by family how far the probabilities
of ``r2m evaluate OUT --data D --out E`` are from those of the library's own model and transform.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

# PyPI's torchvision holds operators for another build of torch; these two are looked up when it is imported.
for operator in ("nms", "qnms"):
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import timm  # noqa: E402
import timm.data  # noqa: E402
import transformers  # noqa: E402
from r2m.commands.main import main  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

SIZE = 32
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
TOWER = {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": 8}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": TOWER,
    "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1},
}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 2,
    "model_args": {"img_size": SIZE, "patch_size": 8, "depth": 2},
    "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "crop_pct": 0.9, "interpolation": "bilinear"},
    "label_names": ["fake", "real"],
}
PREPROCESS = {"mean": [0.4] * 3, "std": [0.2] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}
See = Callable[[Image.Image], Tensor]


class OpenClip(nn.Module):
    """An image tower and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = open_clip.CLIP(**OPEN_CLIP).visual
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.visual(images))


def of_timm() -> nn.Module:
    return timm.create_model(TIMM["architecture"], num_classes=2, **TIMM["model_args"])


def of_transformers() -> nn.Module:
    labels = {"id2label": {0: "Fake", 1: "Real"}, "label2id": {"Fake": 0, "Real": 1}}
    config = transformers.ViTConfig(**VISION, image_size=SIZE, patch_size=8, **labels)
    return transformers.ViTForImageClassification(config)


def save(family: str, model: nn.Module, place: Path) -> None:
    place.mkdir(parents=True)
    if family == "transformers":
        model.save_pretrained(place)
        transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(place)
        return
    save_file(model.state_dict(), place / "model.safetensors", {"format": "pt"})
    if family == "timm":
        (place / "config.json").write_text(json.dumps(TIMM))
    else:
        content = {"model_cfg": OPEN_CLIP, "preprocess_cfg": PREPROCESS}
        (place / "open_clip_config.json").write_text(json.dumps(content))


def own(family: str, out: Path) -> tuple[nn.Module, See, int]:
    """The library's model of what was merged, its transform, and the fake's output."""
    if family == "transformers":
        processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
        model = transformers.AutoModelForImageClassification.from_pretrained(out)
        fake = model.config.label2id["Fake"]
        return model, lambda image: processor(image, return_tensors="pt")["pixel_values"][0], fake
    model = of_timm() if family == "timm" else OpenClip()
    model.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    if family == "timm":
        cfg = timm.data.resolve_data_config(pretrained_cfg=TIMM["pretrained_cfg"])
        return model, timm.data.create_transform(**cfg), 0
    whole = open_clip.transform.PreprocessCfg(size=SIZE, **PREPROCESS)
    return model, open_clip.transform.image_transform_v2(whole, is_train=False), 1


def judge(directory: Path) -> None:
    dice = np.random.default_rng(0)
    for label in ("real", "fake"):
        for number in range(3):
            path = directory / "set" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dice.integers(0, 256, (40 + 9 * number, 61, 3), np.uint8)).save(path)
    found = {}
    for number, (family, build) in enumerate(
        {"timm": of_timm, "open_clip": OpenClip, "transformers": of_transformers}.items()
    ):
        torch.manual_seed(number)
        model, place = build(), directory / family
        for name in ("base", "fs", "fr"):
            save(family, model, place / name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
        words = ["--base", str(place / "base"), "--expert", str(place / "fs"), "--expert", str(place / "fr"), "--quiet"]
        codes = [main(["merge", *words, "--out", str(place / "out")])]
        codes += [main(["evaluate", str(place / "out"), "--data", str(directory / "set"), "--out", str(place / "e")])]
        merged, see, fake = own(family, place / "out")
        rows = {row["path"]: float(row["probability"]) for row in csv.DictReader((place / "e" / "scores-1.csv").open())}
        differences = []
        for path, probability in rows.items():
            with torch.no_grad():
                output = merged.eval()(see(Image.open(path))[None])
            logits = output if isinstance(output, Tensor) else output.logits
            differences.append(abs(float(logits.double().softmax(1)[0, fake]) - probability))
        models = json.loads((place / "e" / "evaluation.json").read_text())["models"]
        found[family] = {
            "codes": codes,
            "difference": max(differences),
            "spread": max(rows.values()) - min(rows.values()),
            "models": list(models),
            "fake": models["out"]["fake"]["index"],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    {"judge": judge}[sys.argv[1]](Path(sys.argv[2]))
