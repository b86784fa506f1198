"""Preprocessing as it stands beside a checkpoint: in r2m's report, and in files of transformers, timm and open_clip.

What such a file asks for is obeyed whole, or it is refused by name. Files' meanings are those of transformers 5, timm 1
and open_clip 3, which tests compare with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r2m.places import MOST_CONFIG, MOST_RECORD, FileSystemWarning, read_beside
from r2m.preprocessing import CORNER, FILE, RESAMPLES, Preprocessing
from r2m.records import REPORT
from r2m_kernels.errors import BadFile, InvalidInput, printable, quoted

CONFIG, OPEN_CLIP = "config.json", "open_clip_config.json"
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5] * 3, [0.5] * 3)
_OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

# What image processors of transformers do where their file does not say, by how their class is called.
_SQUARE: Mapping[str, Any] = {"size": {"height": 224, "width": 224}}
_SHORTEST: Mapping[str, Any] = {"size": {"shortest_edge": 224}}
_CROPPED: Mapping[str, Any] = {"do_center_crop": True, "crop_size": 224}
_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {**_SQUARE, "resample": 2, "statistics": _HALF},
    "DeiT": {**_CROPPED, "size": {"height": 256, "width": 256}, "resample": 3, "statistics": _HALF},
    "Beit": {**_SQUARE, "resample": 3, "statistics": _HALF},
    "Siglip": {**_SQUARE, "resample": 3, "statistics": _HALF},
    "Pvt": {**_SQUARE, "resample": 3, "statistics": _IMAGENET},
    "CLIP": {**_SHORTEST, **_CROPPED, "resample": 3, "statistics": _OPENAI},
    "Bit": {**_SHORTEST, **_CROPPED, "resample": 3, "statistics": _OPENAI},
    "ConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "resample": 3, "statistics": _HALF},
    "MobileNetV2": {**_CROPPED, "size": {"shortest_edge": 256}, "resample": 2, "statistics": _HALF},
    "MobileNetV1": {**_CROPPED, "size": {"shortest_edge": 256}, "resample": 2, "statistics": _HALF},
    "": {},  # a file that names none
}
_SHORT_BY_A_NUMBER = {"CLIP", "Bit", "ConvNext", "MobileNetV1", "MobileNetV2"}  # of which a size that is a number is so
_OBEYED = {"do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", CORNER}
_OBEYED |= {"do_normalize", "image_mean", "image_std", "crop_pct", "do_convert_rgb"}
# That say nothing of an image, or of masks and batches.
_ASIDE = {"image_processor_type", "feature_extractor_type", "processor_class", "return_tensors", "data_format"}
_ASIDE |= {"input_data_format", "device", "disable_grouping", "default_to_square", "do_reduce_labels", "reduce_labels"}
_ASIDE |= {"_valid_processor_keys", "image_processor_class", "num_channels", "transformers_version", "backend"}
_WARPED_FROM = 384  # pixels from which ConvNext's processor squashes


def stated(checkpoint: str | Path) -> Preprocessing | None:
    """What stands in a checkpoint's directory; None where nothing does.

    Raises:
        BadFile: it asks for something that is not done here.
    """
    path = Path(checkpoint)
    directory = path if path.is_dir() else path.parent
    for file, read in _FILES.items():
        content = read_beside(directory / file, MOST_RECORD if file == REPORT.file else MOST_CONFIG)
        if content:
            try:
                found = read(content)
            except (InvalidInput, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
                kind = "" if isinstance(error, InvalidInput | ValueError) else f"{type(error).__name__}: "
                raise BadFile(f"{printable(str(directory / file))}: {kind}{printable(str(error))}") from error
            if found is not None:
                return found
    return None


def beside(checkpoint: str | Path) -> Preprocessing | None:
    """The same for who can do without: what is not obeyed here is told, and None."""
    try:
        return stated(checkpoint)
    except BadFile as error:
        warnings.warn(f"{error}; nothing is taken from it", FileSystemWarning, stacklevel=2)
        return None


def _of_report(content: Mapping[str, Any]) -> Preprocessing | None:
    """What a merge wrote of its output."""
    known = content.get("preprocessing")
    return Preprocessing.of(**known) if isinstance(known, dict) else None


def _of_transformers(content: Mapping[str, Any]) -> Preprocessing | None:
    named = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")
    kind = named
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind == "TimmWrapper":
        return _of_timm({"architecture": "", **content})
    if kind not in _PROCESSORS:
        known = ", ".join(filter(None, _PROCESSORS))
        raise ValueError(f"is of a {quoted(named)}; known are image processors of {known}")
    for key, value in content.items():
        if key not in _OBEYED | _ASIDE and value not in (None, False):
            raise ValueError(f"asks for {quoted(key)} {quoted(str(value)[:40])}, which is not done here")
    usual = _PROCESSORS[kind]
    said = {**usual, **{key: value for key, value in content.items() if value is not None}}
    if kind == "" and not (said.get("size") or said.get("crop_size")):
        return None
    mean, std = usual.get("statistics", (None, None))
    size, resize, scale = _geometry(kind, said)
    normalised, rescaled = said.get("do_normalize", True), said.get("do_rescale", True)
    return Preprocessing.of(
        size,
        _three(said.get("image_mean", mean), "image_mean") if normalised else (0, 0, 0),
        _three(said.get("image_std", std), "image_std") if normalised else (1, 1, 1),
        resize=resize,
        scale=scale,
        resample=RESAMPLES[said.get("resample", RESAMPLES.index("bicubic"))],
        rescale=float(said.get("rescale_factor", 1 / 255)) if rescaled else 1.0,
        corner=said.get(CORNER, "down"),
    )


def _geometry(kind: str, said: Mapping[str, Any]) -> tuple[int, str, int]:
    """The side of what is seen, how a picture is resized, and to what."""
    crop = _side(said["crop_size"], "crop_size") if said.get("do_center_crop") else None
    if not said.get("do_resize", True):
        if crop is None:
            raise ValueError("neither resizes nor cuts pictures, which then have as many sizes as there are")
        return crop, "none", crop
    size = said["size"]
    if isinstance(size, dict):
        size = {key: value for key, value in size.items() if value is not None}
    elif kind in _SHORT_BY_A_NUMBER or (kind == "" and crop is not None):
        size = {"shortest_edge": size}
    else:
        size = {"height": size, "width": size}
    if size.keys() == {"height", "width"}:
        scale = _side(size, "size")
        return crop or scale, "squash", scale
    if size.keys() != {"shortest_edge"}:
        raise ValueError(f"has a size by {', '.join(map(quoted, size))}, which is not done here")
    scale = size["shortest_edge"]
    if "crop_pct" in said and kind == "ConvNext":
        if scale >= _WARPED_FROM:
            return crop or scale, "squash", scale
        if crop not in (None, scale):
            raise ValueError("cuts pictures twice, which is not done here")
        return scale, "shortest", int(scale / said["crop_pct"])
    if crop is None:
        raise ValueError("resizes a picture's shorter side and does not cut it, so that each keeps its shape")
    return crop, "shortest", scale


def _side(size: Any, name: str) -> int:
    """Of a square."""
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
    if height != width:
        raise ValueError(f"has a {name} of {height} × {width}; only squares are made here")
    return int(height)


def _three(values: Any, name: str) -> list[float]:
    if values is None:
        raise ValueError(f"has no {name}")
    return [float(values)] * 3 if isinstance(values, int | float) else list(values)


def _of_timm(content: Mapping[str, Any]) -> Preprocessing | None:
    """Of a ``config.json`` of timm, as its ``create_transform`` makes it of ``resolve_data_config``."""
    if not isinstance(content.get("architecture"), str):
        return None
    inner = content.get("pretrained_cfg")
    said = {key: value for key, value in {**content, **(inner if isinstance(inner, dict) else {})}.items() if value}
    channels, *sides = said.get("input_size", (3, 224, 224))
    if channels != 3 or len(set(sides)) != 1:
        raise ValueError(f"has an input_size of {said['input_size']}; only squares of three channels are made here")
    size = int(sides[0])
    scale = math.floor(size / said.get("crop_pct", 0.875))
    mean, std = said.get("mean", _IMAGENET[0]), said.get("std", _IMAGENET[1])
    modes = {"center": "shortest", "squash": "squash", "border": "longest"}
    mode = said.get("crop_mode", "center")
    if mode not in modes:
        raise ValueError(f"asks for the crop_mode {quoted(str(mode))}; known are {', '.join(modes)}")
    fill = [round(255 * value) for value in mean] if mode == "border" else [0, 0, 0]
    resample = _resample(said.get("interpolation", "bicubic"))
    more = {"resize": modes[mode], "scale": scale, "resample": resample, "corner": "even", "fill": fill}
    return Preprocessing.of(size, mean, std, **more)


def _of_open_clip(content: Mapping[str, Any]) -> Preprocessing | None:
    """Of an ``open_clip_config.json``, as its ``image_transform_v2`` has it."""
    said = content.get("preprocess_cfg") or {}
    size = said.get("size", content["model_cfg"]["vision_cfg"].get("image_size", 224))
    sides = size if isinstance(size, list) else [size]
    if len(set(sides)) != 1:
        raise ValueError(f"has a size of {size}; only squares are made here")
    modes = {"shortest": "shortest", "squash": "squash", "longest": "longest"}
    mode = said.get("resize_mode") or "shortest"
    if mode not in modes:
        raise ValueError(f"asks for the resize_mode {quoted(str(mode))}; known are {', '.join(modes)}")
    fill = [int(said.get("fill_color") or 0)] * 3 if mode == "longest" else [0, 0, 0]
    asked = said.get("interpolation") or "bicubic"
    resample = "bicubic" if asked == "random" else _resample(asked)  # of which its evaluation makes bicubic
    mean, std = (_three(said.get(name) or usual, name) for name, usual in zip(("mean", "std"), _OPENAI, strict=True))
    return Preprocessing.of(sides[0], mean, std, resize=modes[mode], resample=resample, corner="even", fill=fill)


def _resample(name: Any) -> str:
    if name not in RESAMPLES:
        raise ValueError(f"asks for the interpolation {quoted(str(name))}; known are {', '.join(RESAMPLES)}")
    return str(name)


# In the order in which they are believed.
_FILES: Mapping[str, Callable[[Mapping[str, Any]], Preprocessing | None]] = {
    REPORT.file: _of_report,
    FILE: _of_transformers,
    CONFIG: _of_timm,
    OPEN_CLIP: _of_open_clip,
}
