"""Pictures as a detector sees them: by numbers of our own, and beside transformers, timm and open_clip."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libraries import with_libraries
from PIL import Image
from r2m.evaluation.pictures import read_image, read_picture
from r2m.preprocessing import Preprocessing
from r2m.preprocessing_files import stated
from torch import Tensor

from r2m_kernels import InvalidInput

libraries = partial(with_libraries, "zoo_pictures.py")
PLAIN = Preprocessing.of(4, [0] * 3, [1] * 3, rescale=1.0)
CLIP = {
    "do_resize": True,
    "size": {"shortest_edge": 4},
    "do_center_crop": True,
    "crop_size": {"height": 4, "width": 4},
    "do_rescale": False,
    "do_normalize": False,
    "resample": 0,
    "image_processor_type": "CLIPImageProcessor",
}
TIMM = {"architecture": "vit_tiny_patch16_224", "num_classes": 2}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(content: dict[str, Any], name: str = "preprocessor_config.json") -> Preprocessing | None:
    Path(name).write_text(json.dumps(content))
    return stated(".")


def seen(picture: Image.Image, preprocessing: Preprocessing, name: str = "p.png", **options: Any) -> np.ndarray:
    """(s, s) of the first channel."""
    picture.save(name, **options)
    image = read_image(Path(name), preprocessing)
    assert isinstance(image, Tensor)
    return image[0].numpy()


def columns(*values: int) -> Image.Image:
    """Four rows of columns with these values."""
    return Image.fromarray(np.tile(np.array(values, np.uint8)[None, :, None], (4, 1, 3)))


@pytest.mark.parametrize(
    ("preprocessing", "row"),
    [
        (PLAIN, None),
        (Preprocessing.of(4, [0] * 3, [1] * 3, rescale=1.0, resize="shortest"), [20, 30, 40, 50]),
        (Preprocessing.of(4, [0] * 3, [1] * 3, rescale=1.0, resize="shortest", corner="even"), [30, 40, 50, 60]),
        (Preprocessing.of(4, [0] * 3, [1] * 3, rescale=1.0, resize="none"), [20, 30, 40, 50]),
        (Preprocessing.of(4, [1] * 3, [2] * 3, rescale=0.1, resize="none"), [0.5, 1, 1.5, 2]),
    ],
)
def test_a_wide_picture_is_cut_where_it_is_said(preprocessing: Preprocessing, row: list[float] | None) -> None:
    found = seen(columns(10, 20, 30, 40, 50, 60, 70), preprocessing)
    assert found.shape == (4, 4)
    if row is None:
        assert (found[0, 0] < 20, found[0, 3] > 60) == (True, True)  # the whole of it
    else:
        assert np.abs(found - np.array(row)).max() < 1e-6


def test_a_smaller_picture_is_filled() -> None:
    filled = Preprocessing.of(4, [0] * 3, [1] * 3, rescale=1.0, resize="none", fill=[7, 7, 7])
    picture = Image.fromarray(np.full((2, 4, 3), 99, np.uint8))
    assert seen(picture, filled)[:, 0].tolist() == [7, 99, 99, 7]
    longest = Preprocessing.of(4, [0] * 3, [1] * 3, rescale=1.0, resize="longest", fill=[7, 7, 7], corner="even")
    assert seen(picture.resize((8, 4)), longest)[:, 0].tolist() == [7, 99, 99, 7]


def test_files_of_libraries_say_how() -> None:
    crop = said(CLIP)
    assert crop == Preprocessing.of(4, [0] * 3, [1] * 3, resize="shortest", resample="nearest", rescale=1.0)
    assert seen(columns(*range(0, 80, 10)), crop)[0].tolist() == [20, 30, 40, 50]
    square = {"size": {"height": 8, "width": 8}, "crop_size": 4}
    assert said({**CLIP, **square}) == Preprocessing.of(4, [0] * 3, [1] * 3, scale=8, resample="nearest", rescale=1.0)
    half = [0.5] * 3
    vit = said({"image_processor_type": "ViTImageProcessorFast"})
    assert vit == Preprocessing.of(224, half, half, resample="bilinear")
    convnext = said({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.5})
    assert convnext == Preprocessing.of(224, half, half, resize="shortest", scale=448)
    Path("preprocessor_config.json").unlink()
    cfg = {"input_size": [3, 10, 10], "crop_pct": 0.95, "interpolation": "bilinear", "mean": half, "std": half}
    timm = said({**TIMM, "pretrained_cfg": cfg}, "config.json")
    own = {"resize": "shortest", "corner": "even"}
    assert timm == Preprocessing.of(10, half, half, scale=10, resample="bilinear", **own)
    assert said({**TIMM, **cfg, "crop_mode": "squash"}, "config.json") == Preprocessing.of(
        10, half, half, resample="bilinear", corner="even"
    )
    assert said({"model_type": "vit"}, "config.json") is None
    model = {"vision_cfg": {"image_size": 32}}
    preprocess = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}
    open_clip = said({"model_cfg": model, "preprocess_cfg": preprocess}, "open_clip_config.json")
    assert open_clip == Preprocessing.of(32, half, half, **own)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"do_flip_channel_order": True}, "asks for 'do_flip_channel_order' 'True', which is not done here"),
        ({"do_pad": True}, "asks for 'do_pad' 'True', which is not done here"),
        (
            {"image_processor_type": "LevitImageProcessor"},
            "is of a 'LevitImageProcessor'; known are image processors of V",
        ),
        (
            {"do_center_crop": False},
            "resizes a picture's shorter side and does not cut it, so that each keeps its shape",
        ),
        ({"do_center_crop": False, "do_resize": False}, "neither resizes nor cuts pictures"),
        ({"size": {"height": 4, "width": 5}}, "has a size of 4 × 5; only squares are made here"),
        (
            {"size": {"shortest_edge": 4, "longest_edge": 9}},
            "has a size by 'shortest_edge', 'longest_edge', which is not",
        ),
        ({"size": {"shortest_edge": "x"}}, "expected pixels of a side, got x"),
        ({"resample": 9}, "IndexError"),
        ({"rescale_factor": 0, "do_rescale": True}, "preprocessing: rescale: expected a positive number, got 0.0"),
    ],
)
def test_what_is_not_obeyed_is_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput) as error:
        said({**CLIP, **change})
    assert str(error.value).startswith("preprocessor_config.json: ")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", {**TIMM, "input_size": [1, 8, 8]}, "has an input_size of [1, 8, 8]; only squares of three"),
        ("config.json", {**TIMM, "crop_mode": "x"}, "asks for the crop_mode 'x'; known are center, squash, border"),
        (
            "config.json",
            {**TIMM, "interpolation": "random"},
            "asks for the interpolation 'random'; known are nearest, ",
        ),
        (
            "open_clip_config.json",
            {"model_cfg": {"vision_cfg": {"image_size": [8, 9]}}},
            "has a size of [8, 9]; only sq",
        ),
        ("open_clip_config.json", {"model_cfg": 1}, "TypeError: "),
    ],
)
def test_the_same_of_timms_and_open_clips(name: str, content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput) as error:
        said(content, name)
    assert sentence in str(error.value)


def test_what_is_written_is_read_the_same() -> None:
    for own in (
        Preprocessing.of(224, [0.5] * 3, [0.25] * 3),
        Preprocessing.of(224, [0] * 3, [1] * 3, resize="shortest", scale=256, resample="lanczos", corner="even"),
        Preprocessing.of(224, [0] * 3, [1] * 3, scale=256, rescale=1.0),
        Preprocessing.of(224, [0.1] * 3, [1] * 3, resize="none", rescale=1 / 127.5),
    ):
        text = own.for_transformers()
        assert text is not None
        assert said(json.loads(text)) == own
        assert Preprocessing.of(**own.plain()) == own
    bordered = Preprocessing.of(8, [0] * 3, [1] * 3, resize="longest", fill=[1, 2, 3])
    assert bordered.for_transformers() is None
    assert Preprocessing.of(**bordered.plain()) == bordered


def test_a_photograph_lies_as_its_camera_was_held() -> None:
    picture = Image.fromarray(np.repeat(np.array([[200], [100], [50], [10]], np.uint8)[:, :, None], 3, 2).repeat(4, 1))
    orientation = Image.Exif()
    orientation[0x0112] = 3  # upside down
    found = seen(picture, PLAIN, "p.jpg", exif=orientation, quality=100, subsampling=0)
    assert np.abs(found[:, 0] - [10, 50, 100, 200]).max() <= 2


def test_greys_of_16_bits_keep_their_upper_8() -> None:
    values = np.array([[0, 300, 40_000, 65_535]], np.uint16).repeat(4, 0)
    for name in ("p.png", "p.tif"):
        assert seen(Image.fromarray(values), PLAIN, name)[0].tolist() == [0, 1, 156, 255]
    Image.fromarray(values.astype(np.int32)).save("wide.tif")
    assert read_picture(Path("wide.tif")) == (
        "not a readable image: grey of 32 bits (mode I), of which white is not known"
    )


def test_palettes_and_transparency_become_their_colours() -> None:
    clear = columns(10, 200, 30, 40).convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.array([0, 128, 255, 255], np.uint8), (4, 1))))
    assert seen(clear, PLAIN)[0].tolist() == [10, 200, 30, 40]
    palette = columns(10, 200, 30, 40).quantize(8)
    assert seen(palette, PLAIN, transparency=0)[0].tolist() == [10, 200, 30, 40]
    assert seen(columns(10, 200, 30, 40).convert("LA"), PLAIN)[0].tolist() == [10, 200, 30, 40]
    assert seen(columns(0, 255, 0, 255).convert("1"), PLAIN)[0].tolist() == [0, 255, 0, 255]


@pytest.mark.slow
def test_pictures_are_their_librarys_own(tmp_path: Path) -> None:
    """Beside transformers' processors that Pillow computes, timm's and open_clip's transforms."""
    found = libraries("compare", tmp_path)
    assert len(found) > 30
    assert max(found.values()) <= 1e-6, found


@pytest.mark.slow
def test_a_merge_of_each_family_is_judged_without_an_option(tmp_path: Path) -> None:
    """As its library's own model and transform judge it, the fake's output by its label."""
    found = with_libraries("zoo_families.py", "judge", tmp_path)
    assert {name: one["fake"] for name, one in found.items()} == {"timm": 0, "open_clip": 1, "transformers": 0}
    for name, one in found.items():
        assert one["codes"] == [0, 0], name
        assert one["models"] == ["out", "fs", "fr"], name
        assert one["difference"] <= 1e-6 < one["spread"], (name, one)
