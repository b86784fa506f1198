"""``r2m detect``: pictures, directories and videos get the scores that ``evaluate`` gives them."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from r2m import extras
from r2m.evaluation.videos import Still, spread, stills
from safetensors.torch import save_file

from r2m_kernels import InvalidInput

if TYPE_CHECKING:
    from conftest import Result

Command = Callable[..., "Result"]

MODULE = """
import torch
from torch import nn

class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(2, 48)), nn.Parameter(torch.zeros(2))
        self.norm = nn.LayerNorm(48)

    def forward(self, images):
        seen = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return 0.02 * seen @ self.weight.T + self.bias
"""
OPTIONS = ("--detector", "mine:Brightness", "--size", "16", "--mean", "0.5", "--std", "0.5")


@pytest.fixture(autouse=True)
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, and weights for which bright pictures are fake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MODULE)
    save_file(weights(torch.tensor([-1.0, 1.0])[:, None].expand(2, 48)), "bright.safetensors")


def weights(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    fixed = {"norm.weight": torch.ones(48), "norm.bias": torch.zeros(48), "bias": torch.zeros(2)}
    return {"weight": weight.contiguous(), **fixed}


def image(path: str, brightness: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(brightness).integers(0, 20, (40, 30, 3))
    Image.fromarray((noise + brightness).astype(np.uint8)).save(path)


def video(path: str, brightness: list[int], rotated: bool = False) -> None:
    """Frames of one grey each, ten a second, with a frame in four that others build on."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"g": "4", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for value in brightness:
            pixels = np.full((48, 64, 3), value, np.uint8)
            pixels[:24, :, 0] = 255 - pixels[:24, :, 0] // 2
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    if rotated:  # as a telephone held upright says it: how the picture is to be turned, 90° clockwise
        content = bytearray(Path(path).read_bytes())
        at = content.index(b"tkhd") + 4 + 40
        matrix = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
        content[at : at + 36] = matrix
        Path(path).write_bytes(content)


def rows(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


EVALUATED = ("--data", "set", "--bootstrap", "0", "--out", "e")


def written(number: int) -> dict[str, float]:
    """Scores of an evaluation, by path."""
    lines = Path(f"e/scores-{number}.csv").read_text().splitlines()
    return {row["path"]: float(row["probability"]) for row in csv.DictReader(lines)}


def test_scores_are_those_of_evaluate(command: Command) -> None:
    for number in range(40):
        image(f"set/{'fake' if number % 2 else 'real'}/{number}.png", 6 * number)
    assert command("evaluate", "--model", "bright.safetensors", *OPTIONS, *EVALUATED, "--batch", "7").code == 0
    expected = written(1)
    for batch in ("7", "32"):
        result = command("detect", "bright.safetensors", "set", *OPTIONS, "--json", "--batch", batch)
        assert (result.code, result.err) == (0, "")
        found = {row["file"]: row["score"] for row in rows(result)}
        assert found.keys() == expected.keys()
        # The last of the fakes and the first of the reals share a batch here, and rounding is another.
        assert max(abs(found[path] - value) for path, value in expected.items()) < 1e-6
    assert {row["label"] == "fake" for row in rows(result) if row["score"] > 0.5} == {True}
    assert {row["label"] == "real" for row in rows(result) if row["score"] <= 0.5} == {True}


def test_of_a_merge_nothing_needs_to_be_said_but_its_name(command: Command) -> None:
    """The recipe has the detector, and the report the preprocessing."""
    save_file(weights(torch.zeros(2, 48)), "base.safetensors")
    recipe = ["base_model: base.safetensors", "merge_method: weight_average", "detector: mine:Brightness"]
    recipe += ["preprocessing: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}", "models:"]
    Path("recipe.yaml").write_text("\n".join([*recipe, "- {model: bright.safetensors, name: fs}"]))
    assert command("merge", "recipe.yaml", "--out", "m", "--quiet").code == 0
    image("dark.png", 20)
    image("bright.png", 230)
    result = command("detect", "m", "dark.png", "bright.png", "--json")
    assert result.code == 0, result.err
    expected = rows(command("detect", "bright.safetensors", "dark.png", "bright.png", *OPTIONS, "--json"))
    assert rows(result) == expected
    assert [row["label"] for row in expected] == ["real", "fake"]


def test_a_table_for_people(command: Command) -> None:
    image("a/dark.png", 20)
    image("a/bright [1].png", 230)
    Path("a/notes.txt").write_text("not looked at")
    result = command("detect", "bright.safetensors", "a/dark.png", "a", *OPTIONS, "--quiet")
    assert (result.code, result.err) == (0, "")
    head, *lines = result.out.splitlines()
    assert head == "score  label  file"
    assert [line.split(maxsplit=2)[1:] for line in lines] == [
        ["real", "a/dark.png"],
        ["fake", "a/bright [1].png"],
        ["real", "a/dark.png"],
    ]
    bright = float(lines[1].split()[0])
    higher = command("detect", "bright.safetensors", "a/bright [1].png", *OPTIONS, "--threshold", f"{bright + 0.001}")
    assert higher.out.splitlines()[1].split()[1] == "real"


def test_what_cannot_be_read_is_told_and_the_rest_is_scored(command: Command) -> None:
    image("good.png", 200)
    Path("bad\n.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Path("bad.mp4").write_bytes(b"no video")
    result = command(
        "detect", "bright.safetensors", "gone.png", "good.png", "bad\n.png", "bad.mp4", "gone.mp4", *OPTIONS
    )
    assert result.code == 2
    assert result.out.splitlines()[1:] == [result.out.splitlines()[1]]
    told = result.err.splitlines()
    assert told[0] == "Error: gone.png: no such file"
    assert told[1].startswith("Error: bad\\n.png: not a readable image")
    assert told[2].startswith("Error: bad.mp4: not a readable video: ")
    assert told[3:] == ["Error: gone.mp4: no such file"]
    result = command("detect", "bright.safetensors", "gone.png", "good.png", *OPTIONS, "--json")
    assert (result.code, rows(result)[0]) == (2, {"file": "gone.png", "error": "no such file"})
    Path("empty").mkdir()
    result = command("detect", "bright.safetensors", "empty", *OPTIONS)
    assert (result.code, result.err[:59]) == (2, "Error: empty: expected pictures or videos in it, by their n")
    result = command("detect", "bright.safetensors", "good.png", *OPTIONS[2:])
    assert "nothing says what it is the weights of; expected --detector transfo" in result.err


def test_a_video_is_the_mean_of_its_frames(command: Command) -> None:
    for number in (0, 2, 10):
        image(f"frames/000/{number}.png", 15 * number)
    image("frames/001/0.png", 240)
    image("frames/2.png", 10)
    result = command("detect", "bright.safetensors", "frames", *OPTIONS, "--json", "--videos")
    found = rows(result)
    assert [row.get("video") for row in found if "video" in row] == ["frames", "frames/000", "frames/001"]
    assert [row["file"] for row in found[2:5]] == [f"frames/000/{name}.png" for name in (0, 2, 10)]
    assert found[5]["frames"] == 3
    assert found[5]["score"] == pytest.approx(np.mean([row["score"] for row in found[2:5]]))
    assert "mean of 3 frames" in command("detect", "bright.safetensors", "frames", *OPTIONS, "--videos").out
    apart = rows(command("detect", "bright.safetensors", "frames", *OPTIONS, "--json"))
    assert [row["file"] for row in apart] == [row["file"] for row in found if "file" in row]
    Path("linked").mkdir()
    for name, to in (("a", "../frames/000"), ("b", "../frames/000"), ("round", ".")):
        Path("linked", name).symlink_to(to)
    linked = rows(command("detect", "bright.safetensors", "linked", *OPTIONS, "--json"))
    assert [row["file"] for row in linked] == [f"linked/a/{name}.png" for name in (0, 2, 10)]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_frames_of_a_video_file(suffix: str, command: Command) -> None:
    path, values = f"clip.{suffix}", list(range(0, 240, 6))
    video(path, values)
    everything = list(stills(Path(path), 100))
    assert len(everything) == 40
    assert all(isinstance(one, Still) for one in everything)
    for count in (1, 7, 32):
        some = list(stills(Path(path), count))
        for one, number in zip(some, spread(40, count), strict=True):
            assert isinstance(one, Still)
            assert (one.number, round(one.seconds, 3)) == (number, number / 10)
            assert one.image.size == (64, 48)
            # The frame itself, though what lies before it was not decoded.
            assert abs(float(np.asarray(one.image, float)[40, :, 1].mean()) - values[number]) < 8
    result = command("detect", "bright.safetensors", path, *OPTIONS, "--frames", "8", "--json")
    *frames, whole = rows(result)
    assert [(row["frame"], round(row["seconds"], 3)) for row in frames] == [
        (5 * place, place / 2) for place in range(8)
    ]
    assert (whole["video"], whole["frames"]) == (path, 8)
    assert whole["score"] == pytest.approx(np.mean([row["score"] for row in frames]))
    text = command("detect", "bright.safetensors", path, *OPTIONS, "--frames", "8").out.splitlines()
    assert text[1:] == [f"{whole['score']:.3f}  {whole['label']}   {path}: mean of 8 frames"]


def test_a_video_that_ends_early_gives_what_it_has(command: Command) -> None:
    video("clip.mkv", [100] * 40)
    content = Path("clip.mkv").read_bytes()
    Path("clip.mkv").write_bytes(content[: len(content) * 2 // 3])
    result = command("detect", "bright.safetensors", "clip.mkv", *OPTIONS, "--json", "--frames", "40")
    last = rows(result)[-1]
    assert 10 < last["frames"] < 40
    Path("sound.mp4").write_bytes(b"")
    assert command("detect", "bright.safetensors", "sound.mp4", *OPTIONS).code == 2


def test_a_playlist_is_no_video(command: Command) -> None:
    """FFmpeg would open what it lists, wherever that is."""
    video("clip.mp4", [100] * 4)
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", str(Path("clip.mp4").absolute()), "#EXT-X-ENDLIST"]
    Path("list.mp4").write_text("\n".join(lines))
    Path("list.m3u8").write_text("\n".join(lines))
    Path("both.avi").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    for name in ("list.mp4", "both.avi"):
        result = command("detect", "bright.safetensors", name, *OPTIONS)
        assert (result.code, f"Error: {name}: not a readable video: Invalid " in result.err) == (2, True)
    Path("concat:clip.mp4").write_bytes(Path("clip.mp4").read_bytes())
    result = command("detect", "bright.safetensors", "concat:clip.mp4", *OPTIONS)
    assert (result.code, "mean of 4 frames" in result.out) == (0, True)


def test_a_telephones_video_stands_upright() -> None:
    video("clip.mp4", [100] * 4)
    video("turned.mp4", [100] * 4, rotated=True)
    (plain,), (turned,) = (list(stills(Path(path), 1)) for path in ("clip.mp4", "turned.mp4"))
    assert isinstance(plain, Still)
    assert isinstance(turned, Still)
    assert turned.image.size == (48, 64)
    # Clockwise: what was above is on the right.
    clockwise = np.asarray(plain.image.transpose(Image.Transpose.ROTATE_270), float)
    assert np.abs(np.asarray(turned.image, float) - clockwise).max() < 8


def test_without_a_decoder_one_sentence(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    video("clip.mp4", [100] * 4)
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    result = command("detect", "bright.safetensors", "clip.mp4", *OPTIONS)
    how = f"pip install '{extras.requirement('video', 'av')}'"
    assert (result.code, result.err) == (2, f"Error: clip.mp4: needs the package av: {how}\n")
    with pytest.raises(InvalidInput):
        list(stills(Path("clip.mp4"), 1))


LAYERS = """
import torch
from torch import nn

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(48, 40), nn.Linear(40, 2)

    def forward(self, images):
        return self.head(self.body(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)))
"""


def test_adapters_say_what_it_looks_like(command: Command) -> None:
    Path("mine.py").write_text(LAYERS)
    generator = torch.Generator().manual_seed(0)
    shapes = {"body.weight": (40, 48), "body.bias": (40,), "head.weight": (2, 40), "head.bias": (2,)}
    base = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(base, "base.safetensors")
    words = ["merge", "--quiet", "--base", "base.safetensors", "--svd", "exact", "--rank", "20", "--format", "adapters"]
    for name in ("fs", "fr"):
        moved = {key: one + 0.2 * torch.randn(one.shape, generator=generator) for key, one in base.items()}
        save_file(moved, f"{name}.safetensors")
        words += ["--expert", f"{name}={name}.safetensors"]
    assert command(*words, "--out", "m").code == 0
    for number in range(12):
        image(f"set/{'fake' if number % 2 else 'real'}/{number}.png", 20 * number)
    options = ("--detector", "mine:Layers", *OPTIONS[2:])
    assert command("evaluate", "--adapters", "m", *options, *EVALUATED).code == 0
    together, fr, fs = (written(place) for place in (1, 2, 3))
    result = command("detect", "m", "set/real", "set/fake", "--adapters", *options, "--json")
    assert result.code == 0, result.err
    found = rows(result)
    assert len(found) == 12
    for row in found:
        path, logits = row["file"], np.array([row["logits"][name] for name in ("fr", "fs")])
        assert row["score"] == pytest.approx(together[path], abs=1e-6)
        assert 1 / (1 + np.exp(-logits)) == pytest.approx([fr[path], fs[path]], abs=1e-6)
        assert row["looks_like"] == ("fs" if fs[path] > fr[path] else "fr")
    assert {row["looks_like"] for row in found} == {"fs", "fr"}
    assert {row["label"] for row in found} == {"real", "fake"}
    text = command("detect", "m", "set", "--adapters", *options, "--videos").out.splitlines()
    assert text[0].split() == ["score", "label", "looks", "like", "file"]
    words_of = [line.split() for line in text[1:]]
    assert all(one[2] in ("fs", "fr") for one in words_of if one[1] == "fake")
    assert all(one[2].startswith("set/") for one in words_of if one[1] == "real")
    whole = [
        row
        for row in rows(command("detect", "m", "set", "--adapters", *options, "--videos", "--json"))
        if "video" in row
    ]
    assert [row["frames"] for row in whole] == [6, 6]
    assert whole[0]["score"] == pytest.approx(
        np.mean([together[path] for path in together if "fake" in path]), abs=1e-6
    )
