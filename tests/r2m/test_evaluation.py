"""Metrics by definition, datasets as they lie around, and ``r2m evaluate`` on real images with a real module."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from r2m.evaluation import run
from r2m.evaluation.data import Frame, read_scores
from r2m.evaluation.degradations import DEGRADATIONS, degraded
from r2m.evaluation.detectors import probabilities
from r2m.evaluation.reading import read_data
from r2m.evaluation.request import Request
from r2m.preprocessing import Preprocessing
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from r2m_kernels import InvalidInput

if TYPE_CHECKING:
    from conftest import Result

Command = Callable[..., "Result"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def image(path: str, brightness: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path) + brightness).integers(0, 20, (40, 30, 3))
    Image.fromarray((noise + brightness).astype(np.uint8)).save(path)


def deepfakebench() -> dict[str, Any]:
    """Frames on the disk and their list: FF++ with compressions, another set without, a path from Windows."""
    for video, brightness in (
        ("real/000", 60),
        ("real/001", 80),
        ("Deepfakes/000_003", 150),
        ("NeuralTextures/000_003", 200),
    ):
        for frame in range(4):
            image(f"frames/FF/{video}/{frame:03d}.png", brightness)
    for frame in range(2):
        image(f"frames/Celeb/fake/id0/{frame}.png", 180)

    def entry(label: str, folder: str, count: int, slash: str = "/") -> dict[str, Any]:
        names = [f"frames/{folder}/{frame:03d}.png" for frame in range(count)]
        return {"label": label, "frames": [name.replace("/", slash) for name in names]}

    ff = {
        "FF-real": {
            "test": {"c23": {v: entry("FF-real", f"FF/real/{v}", 4) for v in ("000", "001")}},
            "train": {"c23": {}},
        },
        "FF-DF": {"test": {"c23": {"000_003": entry("FF-DF", "FF/Deepfakes/000_003", 4, "\\")}, "c40": {}}},
        "FF-NT": {"test": {"c23": {"000_003": entry("FF-NT", "FF/NeuralTextures/000_003", 4)}}},
    }
    celeb = {"fake_one": {"test": {"id0": {"label": "fake_one", "frames": ["frames/Celeb/fake/id0/0.png"]}}}}
    return {"FaceForensics++": ff, "Celeb": celeb}


def write_json(content: Any, name: str = "list.json") -> str:
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def frames(path: str, **options: Any) -> dict[str, list[Frame]]:
    return {name: list(one.frames) for name, one in read_data(path, Request(**options)).datasets.items()}


def test_deepfakebenchs_lists_are_read() -> None:
    found = frames(write_json(deepfakebench()), frames=2)
    ff = found["FaceForensics++"]
    assert [frame.label for frame in ff] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(frame.path.is_file() for frames in found.values() for frame in frames)
    assert [frame.path.name for frame in ff[:2]] == ["000.png", "002.png"]  # spread over the video
    assert len({frame.video for frame in ff}) == 4  # 000_003 of two manipulations are two videos
    assert frames("list.json", labels=("fake_one=0",))["Celeb"][0].label == 0
    moved = frames("list.json", root="elsewhere")
    assert str(moved["Celeb"][0].path) == "elsewhere/frames/Celeb/fake/id0/0.png"


def test_deepfakebenchs_way_is_its_own() -> None:
    """First frames by number, whatever their order in the list, and videos by their folder's name alone."""
    content = deepfakebench()
    video = content["FaceForensics++"]["FF-DF"]["test"]["c23"]["000_003"]
    folder = "frames\\FF\\Deepfakes\\000_003\\"
    video["frames"] = [f"{folder}{number}.png" for number in (10, 9, 100, 2)]
    found = frames(write_json(content), frames=2, deepfakebench_compat=True)["FaceForensics++"]
    assert [frame.path.name for frame in found] == ["000.png", "001.png"] * 2 + ["2.png", "9.png", "000.png", "001.png"]
    assert [frame.video for frame in found] == ["000"] * 2 + ["001"] * 2 + ["000_003"] * 4
    video["frames"] = ["a/b.png"]
    with pytest.raises(InvalidInput, match="frame 'b': --deepfakebench-compat sorts frames by number"):
        frames(write_json(content), deepfakebench_compat=True)
    Path("folder").mkdir()
    with pytest.raises(InvalidInput, match="--deepfakebench-compat is for lists of DeepfakeBench"):
        frames("folder", deepfakebench_compat=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "data (list.json): not valid JSON (Expecting property name"),
        ("[1]", "data (list.json): entry 0: expected a path and a label (path or file_name, label), got 1"),
        ("1", "expected {dataset: {label: {split: {video: {label, frames}}}}}, got int in the place of a mapping"),
        ({"a": {"real": {"train": {}}}}, "dataset 'a' holds no frames of the split 'test'"),
        ({}, "holds no frames of the split 'test'"),
        ({"a": {"real": {"test": {"v": {"frames": "x"}}}}}, "'a': 'real': video 'v': expected frames: a list of paths"),
        ({"a": {"real": {"test": {"c40": {"v": {"frames": []}}}}}}, "'a': 'real': has the compressions 'c40', not c23"),
        ({"a": {"real": {"test": [1]}}}, "'a': 'real': expected {dataset:"),
    ],
)
def test_lists_that_are_none(content: Any, sentence: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_data(write_json(content), Request())
    assert sentence in str(error.value)


def write_csv(rows: list[list[Any]], name: str = "scores.csv") -> str:
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return name


def test_finished_scores_are_judged(command: Command) -> None:
    header = ["path", "label", "probability", "dataset", "video"]
    dice = np.random.default_rng(0)
    rows = [[f"{i}.png", i // 3 % 2, round(float(dice.random()), 2), "ab"[i % 2], f"v{i // 3}"] for i in range(60)]
    write_csv([header, *rows])
    flipped = [[path, label, 1 - value, *more] for path, label, value, *more in rows]
    write_csv([header, *flipped], "flipped.csv")
    result = command("evaluate", "--scores", "one=scores.csv", "--scores", "flipped.csv", "--out", "eval")
    assert result.code == 0, result.err
    found = json.loads(Path("eval/evaluation.json").read_text())["models"]
    for dataset in "ab":
        own = [row for row in rows if row[3] == dataset]
        auc = roc_auc_score([row[1] for row in own], [row[2] for row in own])
        assert found["one"]["datasets"][dataset]["auc"] == pytest.approx(auc)
        assert found["flipped.csv"]["datasets"][dataset]["auc"] == pytest.approx(1 - auc)  # inverted, and left so
    assert found["one"]["average"]["auc"] == pytest.approx(
        np.mean([found["one"]["datasets"][dataset]["auc"] for dataset in "ab"])
    )
    lines = result.out.splitlines()
    assert lines[0].split() == ["dataset", "model", "videos", "video", "AUC", "AUC", "bal", "acc"]
    assert [line.split()[:2] for line in lines[1:9]] == [
        [dataset, model] for dataset in ("a", "b", "mean", "worst") for model in ("one", "flipped.csv")
    ]
    assert lines[9:11] == ["", "model        minus  on                  video AUC"]
    assert lines[11].split()[:3] == ["flipped.csv", "one", "mean"]
    assert max(map(len, lines)) <= 80
    assert sorted(path.name for path in Path("eval").iterdir()) == [
        *("differences.csv", "differences.md", "differences.tex", "evaluation.json"),
        *("table.csv", "table.md", "table.tex"),
    ]
    for kind, file in (("markdown", "md"), ("latex", "tex"), ("csv", "csv")):
        shown = command("evaluate", "--scores", "one=scores.csv", "--scores", "flipped.csv", "--table", kind)
        tables = (Path(f"eval/{name}.{file}").read_text() for name in ("table", "differences"))
        assert (shown.out, shown.err) == ("\n".join(tables), "")
    words = ("evaluate", "--scores", "scores.csv", "--threshold-from", "a", "--columns", "acc,video_f1")
    chosen = command(*words)
    assert chosen.out.splitlines()[0].split() == ["dataset", "model", "acc", "video", "F1"]
    assert "thresholds chosen on a by balanced_acc: scores.csv 0." in chosen.out
    assert chosen.out.splitlines()[-1].endswith("; a is in no mean")
    again = command("evaluate", "--scores", "scores.csv", "--out", "eval")
    assert (again.code, again.err) == (2, "Error: out (eval): holds an evaluation already; --overwrite replaces it\n")


def test_of_two_evaluations_in_one_directory_the_second_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv([["path", "label", "probability"], ["a.png", 0, 0.25], ["b.png", 1, 0.75]])
    words = ("evaluate", "--scores", path, "--bootstrap", "5", "--out", "new/eval")
    held, refused = run.write_result, []

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(run, "write_result", held)
        refused.append(command(*words, "--overwrite"))
        held(*arguments)

    monkeypatch.setattr(run, "write_result", meanwhile)
    assert command(*words).code == 0
    assert [one.err for one in refused] == ["Error: new/eval/scores: another process is writing it\n"]
    assert sorted(os.listdir("new/eval")) == ["evaluation.json", "table.csv", "table.md", "table.tex"]
    assert command("evaluate", "--scores", "none.csv", "--out", "other/eval").code == 2
    assert not Path("other").exists()


def test_names_cannot_make_rows_of_their_own(command: Command) -> None:
    rows = [[f"{label}.png", label, 0.5, "d\n\x1b[2Jmean  best"] for label in (0, 1)]
    path = write_csv([["path", "label", "probability", "dataset"], *rows])
    result = command("evaluate", "--scores", f"a\nb={path}", "--bootstrap", "5")
    assert result.code == 0
    assert len(result.out.split("\n")) == 3
    assert all(line.isprintable() for line in result.out.split("\n"))


def test_a_set_of_one_class_is_named_and_not_zero(command: Command) -> None:
    write_csv([["path", "label", "probability"], ["a/1", 1, 0.2], ["b/1", 1, 0.9]])
    result = command("evaluate", "--scores", "scores.csv")
    assert result.code == 0
    assert result.out.splitlines()[-1] == "data: fake alone: AUC, EER and AP are undefined"
    assert result.out.splitlines()[1].split() == ["data", "scores.csv", "2", "–", "–", "–"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "expected the columns path, label, probability in its first line, got nothing"),
        ([["path", "label"]], "expected the columns path, label, probability in its first line, got 'path', 'label'"),
        ([["path", "label", "probability"]], "holds no rows"),
        ([["path", "label", "probability"], ["a", 2, 0.5]], "line 2: label: expected 0 (real) or 1 (fake), got '2'"),
        (
            [["path", "label", "probability"], ["a", 1, "nan"]],
            "line 2: probability: expected a number from 0 to 1, got 'nan'",
        ),
        (
            [["path", "label", "probability"], ["a", 1]],
            "line 2: probability: expected a number from 0 to 1, got 'None'",
        ),
    ],
)
def test_scores_that_are_none(rows: list[list[Any]], sentence: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_scores(write_csv(rows))
    assert str(error.value) == f"scores (scores.csv): {sentence}"


MODULE = """
import torch
from torch import nn

class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("position_ids", torch.arange(3))

    def forward(self, images):
        assert images.shape[1:] == (3, 16, 16)
        return {"cls": images.mean((2, 3)) @ self.weight.T + self.bias}

def build():
    return Brightness()

nothing = 3
"""


@pytest.fixture
def detector() -> str:
    """A module of the user's, and two checkpoints: one that knows that fakes here are bright, and its opposite."""
    Path("mine.py").write_text(MODULE)
    for name, sign in (("good", 1.0), ("bad", -1.0)):
        weight = sign * torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
        save_file({"weight": weight, "bias": torch.zeros(2)}, f"{name}.safetensors")
    return "mine:build"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


PREPARED = ("--size", "16", "--mean", "0.5", "--std", "0.5,0.5,0.5")


def test_detectors_are_run(detector: str, command: Command) -> None:
    write_json(deepfakebench())
    arguments = [
        "evaluate",
        "--model",
        "good=good.safetensors",
        "--model",
        "bad=bad.safetensors",
        "--detector",
        detector,
    ]
    result = command(*arguments, *PREPARED, "--data", "list.json", "--out", "eval", "--batch", "3", "--bootstrap", "20")
    assert result.code == 0, result.err
    found = json.loads(Path("eval/evaluation.json").read_text())
    good, bad = (found["models"][name]["datasets"]["FaceForensics++"] for name in ("good", "bad"))
    assert (good["auc"], bad["auc"]) == (1.0, 0.0)
    assert (good["frames"], good["videos"]) == (16, 4)
    assert found["models"]["good"]["preprocessing"] == Preprocessing.of(16, [0.5] * 3, [0.5] * 3).plain()
    assert found["unreadable"] == {}
    assert "Celeb: fake alone: AUC, EER and AP are undefined" in result.out
    # The scores are there to be judged again, to the same numbers.
    again = command("evaluate", "--scores", "good=eval/scores-1.csv", "--bootstrap", "20", "--out", "again")
    assert again.code == 0
    once, twice = (json.loads(Path(place, "evaluation.json").read_text()) for place in ("eval", "again"))
    assert once["models"]["good"]["datasets"] == twice["models"]["good"]["datasets"]


def test_a_sweep_of_degradations(detector: str, command: Command) -> None:
    """Brightness survives blur and JPEG, as it must; a detector of sharp edges would not."""
    for number in range(4):
        image(f"set/real/{number}.png", 60)
        image(f"set/fake/{number}.png", 66)
    words = [
        "evaluate",
        "--model",
        "good.safetensors",
        "--detector",
        detector,
        *PREPARED,
        "--data",
        "set",
        "--robustness",
    ]
    result = command(*words, "--bootstrap", "0", "--out", "e")
    assert result.code == 0, result.err
    swept = json.loads(Path("e/evaluation.json").read_text())["models"]["good.safetensors"]["robustness"]
    assert list(swept) == list(DEGRADATIONS)
    for one in swept.values():
        assert one["average"] == one["datasets"]["set"]
        assert (one["average"]["auc"], one["average"]["acc"]) == (1.0, 0.5)
    lines = result.out.splitlines()
    assert lines[lines.index("") + 1 :][0].split() == ["pictures,", "AUC", "good.safetensors"]
    assert Path("e/robustness.csv").read_text().startswith('"pictures, AUC",good.safetensors\nas they are,1.0\n')


def test_pictures_are_degraded_as_they_say() -> None:
    dice = np.random.default_rng(0)
    picture = Image.fromarray(dice.integers(0, 256, (64, 48, 3), np.uint8))
    pixels = np.asarray(picture, float)
    found = {name: degraded(picture, name, 0) for name in DEGRADATIONS}
    assert {name: one.size for name, one in found.items() if one.size != (48, 64)} == {
        "resize-0.5": (24, 32),
        "resize-0.25": (12, 16),
    }
    errors = {
        name: float(np.sqrt(np.mean((np.asarray(one, float) - pixels) ** 2)))
        for name, one in found.items()
        if one.size == (48, 64)
    }
    assert 0 < errors["jpeg-90"] < errors["jpeg-70"] < errors["jpeg-50"] < errors["jpeg-30"]
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    for name, deviation in (("noise-5", 5), ("noise-10", 10)):
        noise = np.asarray(degraded(grey, name, 0), float) - 128
        assert np.std(noise) == pytest.approx(deviation, rel=0.02)
        assert abs(np.mean(noise)) < 0.1
    assert np.std(np.asarray(found["blur-2"], float)) < np.std(np.asarray(found["blur-1"], float)) < np.std(pixels) / 2
    assert degraded(picture, "noise-5", 0) == found["noise-5"] != degraded(picture, "noise-5", 1)
    assert np.asarray(degraded(grey, "noise-5", 0)).std() != np.asarray(degraded(picture, "noise-5", 0)).std()


def test_a_merge_is_judged_beside_its_specialists(detector: str, command: Command) -> None:
    """By its recipe; and compared with them and with their average."""
    words = ["--expert", "good.safetensors", "--expert", "fr=bad.safetensors", "--head", "merge", "--quiet"]
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "base.safetensors")
    save_file({"weight": torch.tensor([[0.1] * 3, [-0.2] * 3]), "bias": torch.zeros(2)}, "bad.safetensors")
    for out, method in (("merged", "task_arithmetic"), ("mean", "weight_average")):
        assert command("merge", "--base", "base.safetensors", *words, "--method", method, "--out", out).code == 0
    for number in range(4):
        image(f"set/real/{number}.png", 60 + number)
        image(f"set/fake/{number}.png", 66 - number)
    asked = ("--detector", detector, *PREPARED, "--data", "set", "--bootstrap", "20")
    result = command("evaluate", "merged", "--model", "mean", *asked, "--out", "e")
    assert result.code == 0, result.err
    found = json.loads(Path("e/evaluation.json").read_text())
    roles = {name: (one["role"], one["specialists"]) for name, one in found["models"].items()}
    assert roles == {
        "merged": ("merge", ["good.safetensors", "fr"]),
        "mean": ("average", ["good.safetensors", "fr"]),
        "good.safetensors": ("specialist", []),
        "fr": ("specialist", []),
    }
    pairs = {(row["model"], row["than"]) for row in found["differences"]}
    assert pairs == {("merged", "good.safetensors"), ("merged", "fr"), ("merged", "mean")}
    assert [line.split()[:3] for line in result.out.splitlines() if "specialist" in line or "average" in line] == [
        ["merged", "good.safetensors", "best"],
        ["merged", "mean", "average"],
    ]
    Path("bad.safetensors").unlink()
    result = command("evaluate", "merged", *asked)
    assert result.code == 0, result.err
    assert "not beside it: fr, of merged: bad.safetensors is not there" in result.out
    words = ["merged", "--model", "good.safetensors=merged/model.safetensors", *asked, "--out", "named"]
    assert command("evaluate", *words).code == 0
    found = json.loads(Path("named/evaluation.json").read_text())
    assert list(found["models"]) == ["merged", "good.safetensors", "good.safetensors#2"]


LAYERS = """
import torch
from torch import nn

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(48, 40), nn.LayerNorm(40), nn.Linear(40, 2)

    def forward(self, images):
        return self.head(self.norm(self.body(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))))
"""


def test_an_ensemble_is_the_mean_logit_of_a_model_with_each_adapter(command: Command) -> None:
    Path("mine.py").write_text(LAYERS)
    generator = torch.Generator().manual_seed(0)
    shapes = {"body.weight": (40, 48), "body.bias": (40,), "norm.weight": (40,), "norm.bias": (40,)}
    shapes |= {"head.weight": (2, 40), "head.bias": (2,)}
    base = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(base, "base.safetensors")
    words = ["merge", "--quiet", "--base", "base.safetensors", "--svd", "exact", "--rank", "38"]
    for name in ("fs", "fr"):
        moved = {key: one + 0.2 * torch.randn(one.shape, generator=generator) for key, one in base.items()}
        moved["body.weight"] = base["body.weight"] + 0.1 * torch.randn(40, 9, generator=generator) @ torch.randn(9, 48)
        save_file(moved, f"{name}.safetensors")
        words += ["--expert", f"{name}={name}.safetensors"]
    assert command(*words, "--format", "adapters", "--out", "m").code == 0
    for number in range(12):
        image(f"set/{'fake' if number % 2 else 'real'}/{number}.png", 20 * number)
    evaluate = ["evaluate", "--detector", "mine:Layers", *PREPARED, "--data", "set", "--bootstrap", "5"]
    result = command(*evaluate, "--model", "fs=fs.safetensors", "--adapters", "m", "--out", "e")
    assert result.code == 0, result.err
    found = json.loads(Path("e/evaluation.json").read_text())["models"]
    assert list(found) == ["fs", "m", "m/fr", "m/fs"]
    files = (Path(f"e/scores-{number}.csv").read_text().splitlines() for number in range(1, 5))
    rows = [[float(row["probability"]) for row in csv.DictReader(lines)] for lines in files]
    alone, together, *members = np.array(rows)
    assert np.abs(members[1] - alone).max() < 1e-5  # with its adapter the mean is that specialist
    assert np.abs(members[0] - alone).max() > 0.01
    logits = np.log(members) - np.log1p(-np.array(members))
    assert np.abs(together - 1 / (1 + np.exp(-logits.mean(0)))).max() < 1e-12
    assert found["m"]["looks_like"]["set"]["fs"] == np.mean(logits.argmax(0)[together > 0.5] == 1)
    assert "m on set: what it calls fake looks like fr (" in result.out
    middle = float(np.median(together))
    assert command(*evaluate, "--adapters", "m", "--threshold", str(middle), "--out", "t").code == 0
    moved = json.loads(Path("t/evaluation.json").read_text())["models"]["m"]["looks_like"]["set"]
    assert moved.get("fs", 0) == np.mean(logits.argmax(0)[together > middle] == 1)
    stored = {name: one["bytes"] for name, one in found.items()}
    assert stored["fs"] == Path("fs.safetensors").stat().st_size
    assert stored["m"] == stored["m/fs"] + stored["m/fr"] + Path("m/model.safetensors").stat().st_size
    assert "on the disk: fs " in result.out
    refused = command(*evaluate, "--model", "m/fs=fs.safetensors", "--adapters", "m")
    assert (refused.code, refused.err.splitlines()[-1][:49]) == (2, "Error: model 'm/fs': is also an adapter's name, o")
    assert command(*words, "--format", "adapters", "--adapters", "merge", "--out", "n").code == 0
    assert "its adapters are parts of one merge, and none is a" in command(*evaluate, "--adapters", "n").err


def test_weights_under_other_names_need_a_preset(detector: str, command: Command) -> None:
    image("set/real/a.png", 70)
    image("set/fake/b.png", 190)
    state = {f"module.{name}": tensor for name, tensor in load_file("good.safetensors").items()}
    torch.save({"state_dict": state}, "wrapped.pth")
    arguments = ["evaluate", "--model", "wrapped.pth", "--detector", detector, *PREPARED, "--data", "set"]
    result = command(*arguments)
    assert result.code == 2
    assert "it lacks weight, bias" in result.err
    result = command(*arguments, "--preset", "wrapped", "--out", "e")
    assert result.code == 0, result.err
    found = json.loads(Path("e/evaluation.json").read_text())
    assert found["models"]["wrapped.pth"]["datasets"]["set"]["auc"] == 1.0


def test_probabilities_are_those_of_the_module_by_hand(detector: str, command: Command) -> None:
    image("set/real/a.png", 70)
    image("set/fake/b.png", 190)
    assert (
        command(
            "evaluate", "--model", "good.safetensors", "--detector", detector, *PREPARED, "--data", "set", "--out", "e"
        ).code
        == 0
    )
    rows = {row["path"]: row for row in csv.DictReader(Path("e/scores-1.csv").read_text().splitlines())}
    for path, label in (("set/real/a.png", "0"), ("set/fake/b.png", "1")):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 255
        brightness = ((pixels - 0.5) / 0.5).mean((0, 1)).sum()
        assert float(rows[path]["probability"]) == pytest.approx(1 / (1 + np.exp(-2 * brightness)), rel=1e-5)
        assert rows[path]["label"] == label


def test_images_that_cannot_be_read_are_told_or_stop_it(detector: str, command: Command) -> None:
    content = deepfakebench()
    write_json(content)
    Path("frames/FF/real/000/001.png").unlink()
    Path("frames/FF/real/001/002.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    arguments = ["evaluate", "--model", "good.safetensors", "--detector", detector, *PREPARED, "--data", "list.json"]
    result = command(*arguments, "--out", "eval")
    assert result.code == 0, result.err
    assert "2 images were left out: 1 no such file, 1 not a readable image" in result.out
    assert "  frames/FF/real/000/001.png: no such file" in result.out
    found = json.loads(Path("eval/evaluation.json").read_text())
    assert found["unreadable"].keys() == {"frames/FF/real/000/001.png", "frames/FF/real/001/002.png"}
    assert found["models"]["good.safetensors"]["datasets"]["FaceForensics++"]["frames"] == 14
    strict = command(*arguments, "--strict", "--out", "strict")
    assert (strict.code, Path("strict").exists()) == (2, False)
    assert strict.err == "Error: dataset 'FaceForensics++': frames/FF/real/000/001.png: no such file\n"
    for path in Path("frames/Celeb").rglob("*.png"):
        path.unlink()
    result = command(*arguments)
    assert result.code == 2
    assert "dataset 'Celeb': none of its 1 images can be read: " in result.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "evaluate: expected the output of a merge, --model, --adapters or --scores"),
        (
            "good.safetensors --data set --detector mine:build {}",
            "good.safetensors: expected the output of a merge; a ch",
        ),
        ("--adapters m --data set", "model 'm' (m): nothing says what it is the weights of; expected --detector tr"),
        (
            "--adapters set --detector mine:build --data set {}",
            "expected what a merge with --format adapters",
        ),
        (
            "--model good.safetensors --data set",
            "(good.safetensors): nothing says what it is the weights of; expected --detector transfo",
        ),
        ("--model good.safetensors --detector mine:build", "evaluate: --model needs --data"),
        (
            "--model good.safetensors --detector mine:build --data set",
            "model 'good.safetensors' (good.safetensors): its prep",
        ),
        ("--model good.safetensors --detector mine:built --data set {}", "mine has no function 'built'"),
        ("--model good.safetensors --detector mine:nothing --data set {}", "mine has no function 'nothing'"),
        ("--model good.safetensors --detector our:build --data set {}", "detector our:build: no module 'our'"),
        (
            "--model good.safetensors --detector resnet --data set {}",
            "detector 'resnet': expected transformers, clip:DIR",
        ),
        ("--model other.safetensors --detector mine:build --data set {}", "it lacks bias"),
        (
            "--model good.safetensors --detector mine:build --data set --data set {}",
            "data (set): is given twice",
        ),
        ("--model good.safetensors --detector mine:build --data gone {}", "data (gone): no such file or directory"),
        (
            "--model good.safetensors --detector mine:build --data set --size 16 --mean 1,2 --std 1",
            "--mean 1,2: expected a",
        ),
        ("--model good.safetensors --detector mine:build --data set --label x=2 {}", "--label x=2: expected NAME=0"),
        ("--scores gone.csv", "scores (gone.csv): no such file"),
        ("--scores list.csv --columns auroc", "--columns auroc: expected some of frames, videos, acc, acc_real"),
        ("--threshold 1.5", "--threshold 1.5: expected a probability, from 0 to 1"),
        ("--threshold .5 --threshold-from set", "--threshold and --threshold-from: expected one of them, got both"),
        (
            "--model good.safetensors --detector mine:build --data set --threshold-from other {}",
            "--threshold-from other: expected the name of a dataset, one of 'set'",
        ),
        (
            "--model good.safetensors --detector mine:build --data set --against other {}",
            "--against other: no model is called that; expected one of 'good.safetensors'",
        ),
    ],
)
def test_what_is_refused(arguments: str, sentence: str, detector: str, command: Command) -> None:
    image("set/real/a.png", 70)
    image("set/fake/b.png", 190)
    save_file({"weight": torch.zeros(2, 3)}, "other.safetensors")
    before = sorted(os.listdir())
    result = command("evaluate", *arguments.format(" ".join(PREPARED)).split(), *(["--out", "e"] if arguments else []))
    assert result.code == 2
    assert result.err.startswith("Error: ")
    assert sentence in result.err
    assert len(result.err.splitlines()) == 1
    assert sorted({*os.listdir()} - {"__pycache__"}) == before


def test_what_detectors_give() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    expected = logits.double().softmax(1)[:, 1]
    for output in (logits, {"logits": logits}, {"cls": logits, "feat": logits}, type("Output", (), {})()):
        if not isinstance(output, dict | torch.Tensor):
            output.logits = logits
        assert torch.equal(probabilities(output, "m"), expected)
    assert torch.equal(probabilities({"prob": expected, "cls": logits}, "m"), expected)
    for single in (logits[:, :1], logits[:, 0]):
        assert torch.equal(probabilities(single, "m"), logits[:, 0].double().sigmoid())
    for wrong in (torch.zeros(2, 5), torch.zeros(2, 2, 2), {"features": logits}, None, torch.full((2, 2), torch.nan)):
        with pytest.raises(InvalidInput, match=r"^m: (expected logits of shape|gave probabilities that are NaN)"):
            probabilities(wrong, "m")
