"""Test suites as they lie on disks: tiny copies by their own naming, and what is made of their names."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from r2m.evaluation import classes
from r2m.evaluation.data import Data
from r2m.evaluation.reading import read_all, read_data
from r2m.evaluation.request import Request

from r2m_kernels import InvalidInput


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(*paths: str) -> None:
    """Empty: readers of layouts look at names alone."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()


def read(path: str, **options: Any) -> Data:
    return read_data(path, Request(**options))


def seen(data: Data) -> dict[str, tuple[list[str], list[str]]]:
    """Dataset → paths of its reals, and of its fakes."""
    return {
        name: tuple([str(frame.path) for frame in one.frames if frame.label == label] for label in (0, 1))
        for name, one in data.datasets.items()
    }


def videos(data: Data) -> dict[str, int]:
    return {name: len({frame.video for frame in one.frames}) for name, one in data.datasets.items()}


def test_forensynths_has_generators_of_one_and_of_two_levels() -> None:
    files(
        *(
            f"set/progan/{category}/{label}/{n}.png"
            for category in ("cat", "car")
            for label in ("0_real", "1_fake")
            for n in "12"
        ),
        "set/biggan/0_real/a.png",
        "set/biggan/1_fake/b.png",
        "set/biggan/other/c.png",
    )
    found = read("set")
    assert list(found.datasets) == ["biggan", "progan"]
    assert seen(found)["biggan"] == (["set/biggan/0_real/a.png"], ["set/biggan/1_fake/b.png"])
    assert [len(one) for one in seen(found)["progan"]] == [4, 4]
    assert videos(found) == {"biggan": 2, "progan": 8}
    assert found.datasets["progan"].labels == {
        "real": ["progan/car/0_real", "progan/cat/0_real"],
        "fake": ["progan/car/1_fake", "progan/cat/1_fake"],
    }
    assert found.notes == ["progan is car, cat together"]
    (left,) = found.left_out
    assert (left.data, left.what, left.images) == ("set", "biggan/other", 1)


def test_universalfakedetects_reals_are_shared_by_diffusion_models() -> None:
    files("d/imagenet/0_real/a.jpg", "d/laion/0_real/b.jpg", "d/guided/1_fake/c.png", "d/ldm_200/1_fake/d.png")
    reals = ["d/imagenet/0_real/a.jpg", "d/laion/0_real/b.jpg"]
    found = read("d")
    assert seen(found) == {
        "guided": (reals, ["d/guided/1_fake/c.png"]),
        "ldm_200": (reals, ["d/ldm_200/1_fake/d.png"]),
    }
    assert found.notes == ["guided, ldm_200 share the 2 reals of imagenet, laion"]


def test_genimage_is_its_val_by_generator() -> None:
    for place in ("ADM/imagenet_ai_0508_adm", "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4"):
        for split in ("train", "val"):
            files(f"g/{place}/{split}/ai/1.png", f"g/{place}/{split}/nature/n01440764/x.JPEG")
    found = read("g")
    assert seen(found)["ADM"] == (
        ["g/ADM/imagenet_ai_0508_adm/val/nature/n01440764/x.JPEG"],
        ["g/ADM/imagenet_ai_0508_adm/val/ai/1.png"],
    )
    assert list(found.datasets) == ["ADM", "stable_diffusion_v_1_4"]
    assert [(one.what, one.images) for one in found.left_out] == [("the split train", 4)]
    assert all("train" in path for one in seen(read("g", split="train")).values() for path in [*one[0], *one[1]])
    one = read("g/ADM/imagenet_ai_0508_adm/val")
    assert list(one.datasets) == ["val"]
    files("t/train/ai/1.png", "t/train/nature/1.png")
    with pytest.raises(InvalidInput, match=r"data \(t\): has the splits train, not test"):
        read("t")


def test_aigibench_is_read_from_its_test_or_above() -> None:
    files(*(f"A/test/{g}/{label}/1.png" for g in ("FLUX1-dev", "R3GAN") for label in ("0_real", "1_fake")))
    for place in ("A", "A/test"):
        found = read(place)
        assert list(found.datasets) == ["FLUX1-dev", "R3GAN"]
        assert videos(found) == {"FLUX1-dev": 2, "R3GAN": 2}
        assert not found.left_out


def test_community_forensics_shares_its_sources() -> None:
    files(
        "c/sd14/fake/1.png", "c/RealVisXL/fake/1.png", "c/coco/real/1.png", "c/unreal/fake/1.png", "c/coco/real/2.png"
    )
    found = read("c")
    assert list(found.datasets) == ["RealVisXL", "sd14", "unreal"]
    assert seen(found)["RealVisXL"] == (["c/coco/real/1.png", "c/coco/real/2.png"], ["c/RealVisXL/fake/1.png"])
    assert videos(found)["unreal"] == 3


def test_one_real_folder_beside_fakes_by_generator() -> None:
    files("s/real/1.png", "s/real/2.png", "s/fake/sd14/1.png", "s/fake/RealVisXL/1.png", "s/fake/RealVisXL/2.png")
    found = read("s")
    reals = ["s/real/1.png", "s/real/2.png"]
    assert seen(found) == {
        "RealVisXL": (reals, ["s/fake/RealVisXL/1.png", "s/fake/RealVisXL/2.png"]),
        "sd14": (reals, ["s/fake/sd14/1.png"]),
    }
    assert videos(found) == {"RealVisXL": 4, "sd14": 3}
    assert {key: list(one) for key, one in found.datasets["sd14"].labels.items()} == {
        "real": ["real"],
        "fake": ["fake"],
    }
    # Each of several suites has its own.
    files("two/a/real/1.png", "two/a/fake/x/1.png", "two/b/real/2.png", "two/b/fake/2.png")
    assert seen(read("two")) == {
        "a/x": (["two/a/real/1.png"], ["two/a/fake/x/1.png"]),
        "b": (["two/b/real/2.png"], ["two/b/fake/2.png"]),
    }


def test_folders_in_both_classes_are_videos_and_above_them_generators() -> None:
    files(*(f"v/{label}/v{n}/{frame}.png" for label in ("real", "fake") for n in "01" for frame in (2, 10, 1)))
    found = read("v", frames=2)
    assert videos(found) == {"v": 4}
    assert [frame.path.name for frame in found.datasets["v"].frames[:2]] == ["1.png", "2.png"]  # by number, spread
    assert videos(read("v", subfolders="none")) == {"v": 12}
    assert videos(read("v", subfolders="generator")) == {"v0": 9, "v1": 9}
    files(*(f"f/{place}/{n}/0.png" for place in ("original", "fake/Deepfakes", "fake/Face2Face") for n in "01"))
    assert videos(read("f")) == {"Deepfakes": 4, "Face2Face": 4}
    # 0_real and 1_fake hold images: a folder in them is a category.
    files(*(f"c/{label}/cat/{n}.png" for label in ("0_real", "1_fake") for n in "01"))
    assert videos(read("c")) == {"c": 4}
    assert videos(read("c", subfolders="video")) == {"c": 2}


def test_a_folder_beside_real_and_fake_is_told_and_may_be_named() -> None:
    files(
        "x/real/1.png", "x/adm/1.png", "x/adm/2.png", "x/top.png", "x/real/clip.mp4", "x/real/._1.png", "x/fake/1.jpg"
    )
    found = read("x")
    assert seen(found) == {"x": (["x/real/1.png"], ["x/fake/1.jpg"])}
    assert [(one.what, one.images) for one in found.left_out] == [
        ("adm", 2),
        ("the folder itself", 1),
        ("files of the kind .mp4", 1),
    ]
    assert "x: left out 2 images of adm: no name in their path says real or fake (--label NAME=0|1)" in found.told()
    assert len(seen(read("x", labels=("adm=1",)))["x"][1]) == 3
    Path("empty").mkdir()
    with pytest.raises(InvalidInput, match=r"expected folders named real, reals, nature, original, .* there are none"):
        read("empty")


def test_links_are_followed_and_never_round() -> None:
    files("elsewhere/real/1.png", "l/a/fake/1.png", "l/b/fake/1.png")
    for generator in "ab":
        os.symlink("../../elsewhere/real", f"l/{generator}/real")
    os.symlink("..", "l/a/fake/up")
    os.symlink("../../elsewhere/gone.png", "l/a/fake/gone.png")
    assert seen(read("l")) == {
        "a": (["l/a/real/1.png"], ["l/a/fake/gone.png", "l/a/fake/1.png"]),
        "b": (["l/b/real/1.png"], ["l/b/fake/1.png"]),
    }


def rows(path: str, content: list[dict[str, Any]]) -> str:
    if path.endswith(".json"):
        Path(path).write_text(json.dumps(content))
        return path
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    return path


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_forensichubs_list(suffix: str) -> None:
    listed = rows(f"hub.{suffix}", [{"path": f"i/{n}.png", "label": n % 2} for n in range(4)])
    found = read(listed, root="/data")
    assert seen(found) == {"hub": (["/data/i/0.png", "/data/i/2.png"], ["/data/i/1.png", "/data/i/3.png"])}
    assert videos(found) == {"hub": 4}  # in one folder, and each for itself
    assert found.datasets["hub"].labels == {"real": ["0"], "fake": ["1"]}
    assert [len(one) for one in seen(read(listed, labels=("0=1", "1=0")))["hub"]] == [2, 2]


def test_openfakes_table() -> None:
    keys = ("file_name", "prompt", "label", "model", "type", "release_date")
    values = [
        ("r/1.jpg", "", "real", "imagenet", "real", ""),
        ("r/2.jpg", "", "real", "docci", "real", ""),
        ("f/1.png", "a, b", "fake", "RealVisXL", "base", "2024-01"),
        ("f/2.png", "c", "fake", "sdxl", "base", "2023-07"),
    ]
    found = read(rows("o.csv", [dict(zip(keys, one, strict=True)) for one in values]))
    assert seen(found) == {
        "RealVisXL": (["r/1.jpg", "r/2.jpg"], ["f/1.png"]),
        "sdxl": (["r/1.jpg", "r/2.jpg"], ["f/2.png"]),
    }


def test_rows_with_videos_and_splits() -> None:
    content = [{"path": f"{n}.png", "label": "real", "video": n // 2, "split": "test"} for n in range(4)]
    found = read(
        rows("v.csv", [*content, {**content[0], "split": "train"}, {**content[0], "label": "FAKE", "path": "z"}])
    )
    assert videos(found) == {"v": 2}
    assert [(one.what, one.images) for one in found.left_out] == [("the split train", 1)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([{"path": "a"}], "entry 0: expected a path and a label (path or file_name, label), got {'path': 'a'}"),
        (
            [{"path": "a", "label": "RealVisXL"}],
            "entry 0: label: expected 0 or real, 1 or fake, got 'RealVisXL'; --label",
        ),
        ([{"path": "a", "label": 2}], "got '2'"),
        ([], "holds no frames of the split 'test'"),
    ],
)
def test_rows_that_are_none(content: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read(rows("r.json", content))
    assert sentence in str(error.value)


def test_labels_are_whole_words() -> None:
    labels = {
        0: [
            "real",
            "Real",
            "FF-real",
            "CelebDFv2_real",
            "DFDCP_Real",
            "whichisreal_Real",
            "real_images",
            0,
            "0",
            False,
            0.0,
        ],
        1: ["fake", "DFDC_Fake", "not real", "sd1.5_Fake", "ai", 1, "1", True],
        None: [
            "RealVisXL",
            "unreal",
            "FF-DF",
            "real-esrgan",
            "realistic_vision",
            "surreal",
            "DFDCP_FakeA",
            2,
            0.5,
            "",
            "2",
        ],
    }
    for expected, names in labels.items():
        assert {str(name): classes.of_label(name, {}) for name in names} == dict.fromkeys(map(str, names), expected)
    folders = {
        0: ["real", "0_real", "Real_Images", "nature", "original_sequences"],
        1: ["1_fake", "AI", "ai_generated_images", "manipulated_sequences"],
        None: [
            "unreal",
            "RealVisXL",
            "real_vs_fake",
            "imagenet_ai_0419_sdv4",
            "real-esrgan",
            "gan",
            "diffusion",
            "0",
            "",
        ],
    }
    for expected, names in folders.items():
        assert {name: classes.of_folder(name, {}) for name in names} == dict.fromkeys(names, expected)


def test_a_manipulations_name_in_deepfakebenchs_list_is_fake() -> None:
    frame = {"frames": ["a/b/1.png"]}
    content = {"x": {name: {"test": {"v": frame}} for name in ("RealVisXL", "unreal", "FF-real", "DFDCP_FakeA")}}
    content["x"]["n"] = {"test": {"v": {**frame, "label": 0}}}
    Path("d.json").write_text(json.dumps(content))
    found = read("d.json").datasets["x"]
    assert found.labels == {"real": ["0", "FF-real"], "fake": ["DFDCP_FakeA", "RealVisXL", "unreal"]}
    assert len({frame.video for frame in found.frames}) == 5  # one folder, five entries


def test_datasets_of_one_name_are_told_apart_by_their_places() -> None:
    for suite in ("one", "two"):
        files(f"{suite}/biggan/0_real/1.png", f"{suite}/biggan/1_fake/1.png")
    assert list(read_all(Request(data=("one", "two"))).datasets) == ["biggan", "two/biggan"]
    with pytest.raises(InvalidInput, match=r"data \(two/\): is given twice"):
        read_all(Request(data=("one", "two", "two/")))
