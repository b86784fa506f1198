"""``r2m calibrate``: few pictures in, probabilities that mean something out, and the way back."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from faults import SCRIPT
from forked import Child
from PIL import Image
from r2m.calibrated_head import CalibratedHead
from r2m.evaluation.calibrating import SEPARATION, Labelled, with_labels, without_labels
from r2m.log_odds import Calibration
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from r2m_kernels import InvalidInput
from r2m_kernels.streaming import TensorSpec

if TYPE_CHECKING:
    from conftest import Result

    Command = Callable[..., Result]
    Start = Callable[..., Child]

MODULE = """
from torch import nn

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(48, 6), nn.Linear(6, OUTPUTS)

    def forward(self, images):
        return self.head(self.body(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)))
"""
DETECTOR = ("--detector", "mine:Detector", "--size", "16", "--mean", "0.5", "--std", "0.5")
MERGE = ("--base", "base.safetensors", "--expert", "fs=fs.safetensors", "--expert", "fr=fr.safetensors")
MODEL = "model.safetensors"


def detectors(outputs: int, dtype: torch.dtype = torch.float32) -> None:
    """A base and two experts for which bright pictures are fake, far from where one half is."""
    Path("mine.py").write_text(MODULE.replace("OUTPUTS", str(outputs)))
    dice = torch.Generator().manual_seed(0)
    sign = torch.tensor([[1.0]]) if outputs == 1 else torch.tensor([[-0.5], [0.5]])
    state = {
        "body.weight": torch.full((6, 48), 0.5),
        "body.bias": torch.zeros(6),
        "head.weight": 0.16 * sign.expand(outputs, 6).contiguous(),
        "head.bias": 6 * sign[:, 0],
    }
    for name in ("base", "fs", "fr", "efs"):
        moved = {
            key: one + 0.01 * torch.randn(one.shape, generator=dice) * (name != "base") for key, one in state.items()
        }
        save_file({key: one.to(dtype) for key, one in moved.items()}, f"{name}.safetensors")


def image(path: Path, brightness: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(int(brightness * 100)).normal(0, 4, (20, 20, 3))
    Image.fromarray((noise + brightness).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures: fakes are brighter than reals, with some overlap."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    dice = np.random.default_rng(0)
    for index in range(32):
        label = index % 2
        image(Path("set", ("real", "fake")[label], f"{index}.png"), dice.normal(110 + 25 * label, 12))


def logits(command: Command, out: str) -> dict[str, float]:
    result = command("detect", out, "set", *DETECTOR, "--json")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    return {row["file"]: math.log(row["score"]) - math.log1p(-row["score"]) for row in rows}


def report(out: str) -> dict[str, dict[str, float]]:
    content = json.loads(Path(out, "r2m_report.json").read_text())
    assert isinstance(content, dict)
    return content


def unchanging(out: str) -> dict[str, bytes]:
    """All files but the report, which has times, and the card, which names the recipe's own output."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != "r2m_report.json"}


@pytest.mark.parametrize(
    ("outputs", "fake"),
    [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 1, marks=pytest.mark.slow)],
)
def test_without_labels_half_is_fake_and_the_order_stays(command: Command, outputs: int, fake: int) -> None:
    detectors(outputs)
    chosen = ("--fake", "0") if fake == 0 else ()
    assert command("merge", *MERGE, *chosen, "--out", "out", "--quiet").code == 0
    shutil.copytree("out", "kept")
    before, weights = logits(command, "out"), load_file("out/" + MODEL)
    result = command("calibrate", "out", "set", *DETECTOR)
    assert result.code == 0, result.err
    assert "32 pictures of which 50% are taken to be fakes" in result.out
    after = logits(command, "out")
    found = report("out")["calibration"]
    bias = found["bias"] if fake else -found["bias"]
    for file, value in before.items():
        assert after[file] == pytest.approx(value / found["temperature"] + bias, abs=1e-4)
    assert np.mean([1 / (1 + math.exp(-value)) for value in after.values()]) == pytest.approx(0.5, abs=1e-4)
    assert np.std([*after.values()]) == pytest.approx(SEPARATION * math.sqrt(1 + SEPARATION**2 / 4), rel=1e-3)
    labels = ["fake/" in file for file in before]
    assert roc_auc_score(labels, [*after.values()]) == pytest.approx(
        roc_auc_score(labels, [*before.values()]), abs=1e-6
    )
    changed = {name for name, one in load_file("out/" + MODEL).items() if not torch.equal(one, weights[name])}
    assert changed == {"head.weight", "head.bias"}
    # Again on the same pictures: the same, and not once more on top.
    assert command("calibrate", "out", "set", *DETECTOR, "--quiet").code == 0
    assert report("out")["calibration"]["temperature"] == pytest.approx(found["temperature"], rel=1e-4)
    # The card and the recipe say it; the recipe repeats the bytes; --undo takes it back.
    assert "## Calibration" in Path("out/README.md").read_text()
    assert command("merge", "out/r2m_config.yaml", "--out", "again", "--quiet").code == 0
    assert Path("again", MODEL).read_bytes() == Path("out", MODEL).read_bytes()
    undone = command("calibrate", "out/", "--undo")
    assert undone.code == 0
    assert undone.out.endswith("Next: r2m evaluate out/ --data PICTURES --out out.evaluation\n")  # not inside
    assert unchanging("out") == unchanging("kept")
    assert command("calibrate", "out", "--undo").err == "Error: calibrate: --undo: out is not calibrated\n"


NORMED = """
import torch
from torch import nn

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).mean((2, 3)))
"""


def normed(moved: float) -> None:
    """A base and two experts with batch normalisation, whose running statistics they moved."""
    Path("mine.py").write_text(NORMED)
    dice = torch.Generator().manual_seed(1)
    base = {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=dice),
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
        "norm.running_mean": torch.zeros(8),
        "norm.running_var": torch.ones(8),
        "norm.num_batches_tracked": torch.tensor(5),
        "head.weight": torch.randn(2, 8, generator=dice),
        "head.bias": torch.zeros(2),
    }
    save_file(base, "base.safetensors")
    for name in ("fs", "fr", "efs"):
        state = {
            key: one + 0.01 * torch.randn(one.shape, generator=dice) for key, one in base.items() if "num" not in key
        }
        state |= {key: base[key] + moved for key in ("norm.running_mean", "norm.running_var")}
        save_file({**state, "norm.num_batches_tracked": torch.tensor(9)}, f"{name}.safetensors")


def test_statistics_are_those_of_the_pictures_and_undone(command: Command) -> None:
    normed(0.5)
    assert command("merge", *MERGE, "--out", "out", "--quiet").code == 0
    shutil.copytree("out", "kept")
    result = command("calibrate", "out", "set", *DETECTOR, "--statistics")
    assert result.code == 0, result.err
    assert "running means and variances from the same pictures" in result.out
    merged, made = load_file("kept/" + MODEL), load_file("out/" + MODEL)
    images = [np.asarray(Image.open(path).convert("RGB").resize((16, 16), 3)) for path in Path("set").rglob("*.png")]
    pictures = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    maps = torch.nn.functional.conv2d(pictures, merged["conv.weight"])
    assert torch.allclose(made["norm.running_mean"], maps.mean((0, 2, 3)), atol=0.02)
    assert torch.allclose(made["norm.running_var"], maps.var((0, 2, 3)), rtol=0.1)
    changed = {name for name, one in made.items() if not torch.equal(one, merged[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "head.weight", "head.bias"}
    # The head was fitted to what the model gives with them.
    assert np.mean([1 / (1 + math.exp(-value)) for value in logits(command, "out").values()]) == pytest.approx(
        0.5, abs=1e-3
    )
    assert report("out")["statistics"] == "../out.statistics.safetensors"
    assert "## Batch normalisation" in Path("out/README.md").read_text()
    assert command("merge", "out/r2m_config.yaml", "--out", "again", "--quiet").code == 0
    assert Path("again", MODEL).read_bytes() == Path("out", MODEL).read_bytes()
    assert command("calibrate", "out", "--undo").code == 0
    assert unchanging("out") == unchanging("kept")
    assert not Path("out.statistics.safetensors").exists()
    # And what makes another merge leaves them out.
    assert command("calibrate", "out", "set", *DETECTOR, "--statistics", "--quiet").code == 0
    result = command("add", "out", "--expert", "efs=efs.safetensors")
    assert "the calibration of the merge before (temperature, head_bias, statistics) is gone" in result.err
    assert torch.equal(load_file("out/" + MODEL)["norm.running_mean"], torch.full((8,), 0.5))


def test_statistics_that_were_frozen_or_are_not_there_are_left_alone(command: Command) -> None:
    normed(0.0)
    assert command("merge", *MERGE, "--out", "out", "--quiet").code == 0
    files = unchanging("out")
    result = command("calibrate", "out", "set", *DETECTOR, "--statistics")
    assert (result.code, "they were frozen in training" in result.err) == (2, True)
    Path("few").mkdir()
    shutil.copy("set/real/0.png", "few")
    assert "expected 8 pictures at least" in command("calibrate", "out", "few", *DETECTOR, "--statistics").err
    assert unchanging("out") == files
    assert not Path("out.statistics.safetensors").exists()
    save_file({"norm.running_mean": torch.zeros(3)}, "other.safetensors")
    result = command("merge", *MERGE, "--statistics", "other.safetensors", "--out", "o")
    assert (result.code, "statistics: 'norm.running_mean': expected [3] in the output, got [8]" in result.err) == (
        2,
        True,
    )


def test_labels_are_judged_before_and_after(command: Command) -> None:
    detectors(2)
    assert command("merge", *MERGE, "--out", "out", "--quiet").code == 0
    result = command("calibrate", "out", "--data", "set", *DETECTOR)
    assert result.code == 0, result.err
    found = report("out")["calibration"]
    was, now = found["before"], found["after"]
    assert (found["pictures"], found["fakes"]) == (32, 0.5)
    assert now["ece"] < 0.15 < was["ece"]  # type: ignore[index]
    assert now["f1"] > was["f1"] + 0.05  # type: ignore[index]
    assert now["best_f1"] == pytest.approx(was["best_f1"])  # type: ignore[index]


@pytest.mark.slow  # 5 s: pictures are drawn
def test_the_page_shows_reliability_before_and_after(command: Command) -> None:
    detectors(2)
    numbers = ("--temperature", "0.5", "--head-bias", "1.5")
    assert command("merge", *MERGE, *numbers, "--out", "out", "--quiet").code == 0
    evaluated = ("evaluate", "--model", "out", "--data", "set", *DETECTOR, "--bootstrap", "0", "--out", "e", "--quiet")
    assert command(*evaluated).code == 0
    (one,) = json.loads(Path("e/evaluation.json").read_text())["models"].values()
    assert one["calibration"] == {"temperature": 0.5, "bias": 1.5}
    assert command("report", "out", "--evaluation", "e", "--to", "page").code == 0
    assert "Before and after calibration" in Path("page/report.html").read_text()
    lines = Path("page/calibration.csv").read_text().splitlines()
    assert {line.split(",")[1] for line in lines[1:]} == {"before", "now"}


def test_what_changes_the_merge_leaves_it_out_and_says_so(command: Command) -> None:
    detectors(2)
    assert command("merge", *MERGE, "--out", "out", "--quiet").code == 0
    assert command("calibrate", "out", "set", *DETECTOR, "--quiet").code == 0
    for words in (("add", "out", "--expert", "efs=efs.safetensors"), ("remove", "out", "--expert", "efs")):
        result = command(*words)
        assert result.code == 0, result.err
        assert ("calibration of the merge before" in result.err) == (words[0] == "add")
        assert report("out")["calibration"] is None
    assert command("merge", *MERGE, "--out", "plain", "--quiet").code == 0
    assert Path("out", MODEL).read_bytes() == Path("plain", MODEL).read_bytes()
    assert command("calibrate", "out", "set", *DETECTOR, "--quiet").code == 0
    assert command("sweep", "out", "--to", "swept", "--eta", "1", "--quiet").code == 0
    assert Path("swept/eta=1", MODEL).read_bytes() == Path("plain", MODEL).read_bytes()
    assert "calibration of the merge before" in report("swept/eta=1")["notes"][0]  # type: ignore[index]


def test_what_cannot_be_done_is_one_sentence(command: Command) -> None:
    detectors(2)
    assert command("merge", *MERGE, "--out", "out", "--quiet").code == 0
    files = unchanging("out")
    Path("few").mkdir()
    for index in range(3):
        shutil.copy(f"set/real/{2 * index}.png", "few")
        image(Path("alike", f"{index}.png"), 100)
    for index in range(3, 9):
        image(Path("alike", f"{index}.png"), 100)
    wrong = {
        ("few",): "expected 8 pictures at least, better 32, got 3",
        ("alike",): "expected pictures that differ, got the same log-odds for all 9",
        (): "expected pictures without labels (FILE…), or --data with labels",
        ("set", "--data", "set"): "expected pictures without labels (FILE…), or --data with labels",
        ("set", "--fakes", "1"): "fakes: expected a share between 0 and 1, got 1",
        ("set", "--undo"): "--undo: expected nothing with it",
    }
    for words, sentence in wrong.items():
        result = command("calibrate", "out", *words, *DETECTOR)
        assert (result.code, result.err.count("\n")) == (2, 1), (words, result.err)
        assert sentence in result.err, words
    assert unchanging("out") == files
    with_adapters = ("--format", "adapters", "--temperature", "2")
    assert "are for one model, got --format adapters" in command("merge", *MERGE, *with_adapters, "--out", "o").err
    assert (
        "temperature: expected a finite number of at least 0.001"
        in command("merge", *MERGE, "--temperature", "0", "--out", "o").err
    )


@pytest.mark.slow  # 15 s
def test_a_kill_around_the_renames_leaves_one_or_the_other(command: Command, start: Start) -> None:
    detectors(2)
    assert command("merge", *MERGE, "--out", "out", "--quiet").code == 0
    words = ("calibrate", "out", "set", *DETECTOR, "--quiet")
    shutil.copytree("out", "kept")
    with start("0", "count", *words, script=SCRIPT) as child:
        whole = int(child.communicate(timeout=120)[0].split()[-1])
        assert child.returncode == 0
    states = [unchanging("kept"), unchanging("out")]
    assert states[0][MODEL] != states[1][MODEL]
    for at in (whole - 12, whole - 8, whole - 5, whole - 2):  # around both renames
        for name in ("out", "out.partial"):
            shutil.rmtree(name, ignore_errors=True)
        shutil.copytree("kept", "out")
        with start(str(at), "kill", *words, script=SCRIPT) as child:
            child.communicate(timeout=120)
            assert child.returncode == -signal.SIGKILL
        assert command("inspect", "out").code == 0  # which puts back what was moved aside
        assert unchanging("out") in states, at
        assert command(*words, "--resume").code == 0, at
        assert unchanging("out") == states[1], at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_classifier_is_divided_and_shifted_in_whole_or_in_parts(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    state = {"body.weight": torch.randn(4, 6, generator=dice), "head.weight": torch.randn(2, 6, generator=dice)}
    state = {name: one.to(dtype) for name, one in {**state, "head.bias": torch.randn(2, generator=dice)}.items()}
    written: dict[str, torch.Tensor] = {name: torch.empty_like(one).reshape(-1) for name, one in state.items()}

    class Sink:
        def begin(self, specs: object) -> None:
            pass

        def write(self, name: str, tensor: torch.Tensor) -> None:
            written[name].copy_(tensor.reshape(-1))

        def write_elements(self, name: str, start: int, elements: torch.Tensor) -> None:
            written[name][start : start + len(elements)] = elements

    expected = {
        "body.weight": state["body.weight"],
        "head.weight": (state["head.weight"].double() / 1.7).to(dtype),
        "head.bias": (state["head.bias"].double() / 1.7 + torch.tensor([0.15, -0.15], dtype=torch.float64)).to(dtype),
    }
    for parts in (False, True):
        sink = CalibratedHead(Sink(), Calibration(1.7, -0.3))
        sink.begin({name: TensorSpec(tuple(one.shape), one.dtype) for name, one in state.items()})
        for name, one in state.items():
            if parts:
                for start in range(one.numel()):
                    sink.write_elements(name, start, one.reshape(-1)[start : start + 1])
            else:
                sink.write(name, one)
            assert torch.equal(written[name].reshape(one.shape), expected[name]), (name, parts)
    for shapes in ({"head.weight": (3, 6), "head.bias": (3,)}, {"head.weight": (2, 6)}, {"body.weight": (6, 6)}):
        specs = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
        with pytest.raises(InvalidInput, match="expected a classifier of one matrix with 1 or 2 outputs and its bias"):
            CalibratedHead(Sink(), Calibration(1.7, -0.3)).begin(specs)


def test_labels_give_what_many_pictures_say() -> None:
    """Of two normal distributions of one width the log-odds are a line: its slope and its place are found."""
    dice, count = np.random.default_rng(0), 40_000
    labels = (dice.random(count) < 0.3).astype(np.int64)
    seen = 5 + 2 * dice.normal(1.5 * labels, 1.0)  # d' is 1.5: the slope is 1.5 / 2
    found = with_labels(Labelled(seen, labels), 0.3)
    assert 1 / found.temperature == pytest.approx(0.75, rel=0.03)
    assert found.bias == pytest.approx(math.log(0.3 / 0.7) - 0.75 * (5 + 1.5), abs=0.1)
    # As if there were as many of both.
    assert with_labels(Labelled(seen, labels), 0.5).bias == pytest.approx(-0.75 * 6.5, abs=0.1)
    # Told apart without an error: still a slope that somebody would believe.
    apart = with_labels(Labelled(np.array([-2.0, -1.9, -2.1, 1.0, 1.1, 0.9]), np.array([0, 0, 0, 1, 1, 1])), 0.5)
    assert 0.1 < apart.temperature < 1.5
    assert -apart.bias * apart.temperature == pytest.approx(-0.5, abs=0.2)


def test_without_labels_the_mean_is_the_share_whatever_the_units() -> None:
    dice = np.random.default_rng(0)
    seen = dice.normal(0, 1, 32)
    for fakes in (0.1, 0.5, 0.9):
        found = without_labels(seen, fakes)
        assert np.mean(1 / (1 + np.exp(-found.done(seen)))) == pytest.approx(fakes, abs=1e-9)
        other = without_labels(7 * seen - 300, fakes)
        np.testing.assert_allclose(other.done(7 * seen - 300), found.done(seen), atol=1e-9)
        np.testing.assert_allclose(found.undone(found.done(seen)), seen, atol=1e-12)
