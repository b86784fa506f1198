"""Pictures as transformers, timm and open_clip make them for a model, beside ours.

Run by test_pictures.py in their environment: ``zoo_pictures.py compare DIR`` writes for each kind what its library
leaves beside a model, and prints by kind the largest difference of any value of any picture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# PyPI's torchvision holds operators for another build of torch; these two are looked up when it is imported.
for operator in ("nms", "qnms"):
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import timm.data  # noqa: E402
import transformers  # noqa: E402
from r2m.evaluation.pictures import read_image  # noqa: E402
from r2m.preprocessing_files import stated  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402

SIZES = ((640, 480), (97, 331), (333, 222), (20, 30), (224, 224), (401, 300))  # wide, tall, smaller, odd
CLIP = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {}),
    "vit, another resampling": ("ViTImageProcessor", {"size": {"height": 96, "width": 96}, "resample": 1}),
    "vit, not normalised": ("ViTImageProcessor", {"do_normalize": False}),
    "vit, not rescaled": ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
    "vit, of -1 to 1": (
        "ViTImageProcessor",
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    "deit": ("DeiTImageProcessor", {}),
    "clip": ("CLIPImageProcessor", {}),
    "clip, smaller": ("CLIPImageProcessor", CLIP),
    "clip, cut smaller": ("CLIPImageProcessor", {**CLIP, "crop_size": {"height": 47, "width": 47}}),
    "clip, cut larger": ("CLIPImageProcessor", {**CLIP, "crop_size": {"height": 81, "width": 81}}),
    "clip, not resized": ("CLIPImageProcessor", {**CLIP, "do_resize": False}),
    "bit": ("BitImageProcessor", {"size": {"shortest_edge": 256}}),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    "convnext, large": ("ConvNextImageProcessor", {}),
    "siglip": ("SiglipImageProcessor", {}),
    "beit": ("BeitImageProcessor", {}),
    "pvt": ("PvtImageProcessor", {}),
    "mobilenet": ("MobileNetV2ImageProcessor", {}),
}
TIMM: dict[str, dict[str, Any]] = {
    "timm": {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"},
    "timm, defaults": {},
    "timm, squashed": {"input_size": [3, 99, 99], "crop_pct": 0.95, "crop_mode": "squash", "interpolation": "bilinear"},
    "timm, bordered": {"input_size": [3, 128, 128], "crop_pct": 1.0, "crop_mode": "border", "mean": [0.2, 0.4, 0.6]},
}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "open_clip": {},
    "open_clip, squashed": {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
    "open_clip, bordered": {"resize_mode": "longest", "fill_color": 9},
}
See = Callable[[Path], Tensor]


def pictures(directory: Path) -> list[Path]:
    dice = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        rough = dice.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), np.uint8)
        picture = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(directory / f"{number}.png")
    orientation = Image.Exif()
    orientation[0x0112] = 6
    picture.save(directory / "turned.jpg", exif=orientation, quality=95)
    picture.quantize(17).save(directory / "palette.png")
    picture.convert("L").save(directory / "grey.png")
    return sorted(directory.glob("*.*"))


def of_transformers(name: str, directory: Path, backend: str = "pil") -> See:
    kind, changes = TRANSFORMERS[name]
    getattr(transformers, kind)(**changes).save_pretrained(directory)
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend=backend)
    assert type(processor).__name__ == (kind + "Pil" if backend == "pil" else kind)
    return lambda path: processor(load_image(str(path)), return_tensors="pt")["pixel_values"][0]


def of_timm(name: str, directory: Path) -> See:
    cfg = TIMM[name]
    (directory / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg={**cfg, "x": 0}))
    return lambda path: transform(load_image(str(path)))


def of_open_clip(name: str, directory: Path) -> See:
    cfg = OPEN_CLIP[name]
    content = {"model_cfg": {"vision_cfg": {"image_size": 112}}, "preprocess_cfg": cfg}
    (directory / "open_clip_config.json").write_text(json.dumps(content))
    whole = open_clip.transform.PreprocessCfg(**{"size": 112, **cfg})
    transform = open_clip.transform.image_transform_v2(whole, is_train=False)
    return lambda path: transform(load_image(str(path)))


def compare(directory: Path) -> None:
    shown = directory / "shown"
    shown.mkdir()
    paths = pictures(shown)
    found = {}
    for kinds, library in ((TRANSFORMERS, of_transformers), (TIMM, of_timm), (OPEN_CLIP, of_open_clip)):
        for name in kinds:
            place = directory / name
            place.mkdir()
            see, own = library(name, place), stated(place)
            assert own is not None
            differences = []
            for path in paths:
                theirs, ours = see(path).float(), read_image(path, own)
                assert isinstance(ours, Tensor)
                assert theirs.shape == ours.shape, (name, path, theirs.shape, ours.shape)
                differences.append(float((theirs - ours).abs().max()))
            found[name] = max(differences)
            # What is written of it beside a merge is read the same, by them as well.
            text = own.for_transformers()
            if text is not None and library is of_transformers:
                (place / "preprocessor_config.json").write_bytes(text)
                assert stated(place) == own, name
                again = transformers.AutoImageProcessor.from_pretrained(place, backend="pil")
                seen = [again(load_image(str(path)), return_tensors="pt")["pixel_values"][0] for path in paths]
                found[f"{name}, written again"] = max(
                    float((theirs.float() - read_image(path, own)).abs().max())
                    for path, theirs in zip(paths, seen, strict=True)
                )
    print(json.dumps(found))


if __name__ == "__main__":
    {"compare": compare}[sys.argv[1]](Path(sys.argv[2]))
