"""What ``r2m report`` says first: who is who, by how much they differ, and whether that can be told apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from r2m.reporting import answer
from r2m.reporting.beside import evaluations_beside
from r2m.reporting.geometry import by_number, layers_and_kinds
from r2m.reporting.matrix import Matrix, number, signed
from r2m.reporting.standing import standing
from r2m.shorten import shorten

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
REPORT = {"experts": ["fs", "fr"], "method": "r2m"}


def model(source: str, mean: float, interval: list[float] | None = None, **sets: float | None) -> dict[str, Any]:
    datasets = {
        name: {
            "frames": 40,
            "videos": 40,
            "auc": value,
            "intervals": {"auc": None if value is None else [value - 0.1, 1]},
        }
        for name, value in sets.items()
    }
    return {
        "source": source,
        "detector": "timm:vit",
        "datasets": datasets,
        "average": {"auc": mean},
        "average_intervals": {"auc": interval},
    }


def evaluation(**models: dict[str, Any]) -> dict[str, Any]:
    def row(model: str, than: str, difference: float, low: float, high: float) -> dict[str, Any]:
        names = {"model": model, "than": than, "dataset": "mean", "metric": "auc"}
        return {**names, "difference": difference, "interval": [low, high]}

    rows = [row("mine", "fs", 0.021, 0.004, 0.038), row("soup", "mine", -0.03, -0.05, 0.01)]
    return {"models": models, "differences": [one for one in rows if {one["model"], one["than"]} <= {*models}]}


@pytest.fixture
def merged(checkpoints: Checkpoints, command: Command) -> Checkpoints:
    assert command("merge", *checkpoints.arguments, "--out", "out", "--quiet").code == 0
    return checkpoints


def test_the_answer(merged: Checkpoints) -> None:
    measured = evaluation(
        mine=model("out/model.safetensors", 0.823, [0.79, 0.85], celeb=0.9, dfdc=0.61),
        fs=model("fs.safetensors", 0.802, [0.78, 0.83], celeb=0.95, dfdc=0.55),
        fr=model("fr.safetensors", 0.7, celeb=0.7, dfdc=0.7),
        soup={**model("soup", 0.793, celeb=0.8, dfdc=0.79), "role": "average"},
        start=model("base.safetensors", 0.5, celeb=0.5, dfdc=0.5),
        weaker={**model("swept/eta=0.5", 0.6, celeb=0.6, dfdc=0.6), "role": "merge"},
    )
    found = standing(measured, REPORT, "out")
    assert dict(found.roles) == {
        "mine": "this merge",
        "soup": "average",
        "fs": "specialist",
        "fr": "specialist",
        "start": "base",
        "weaker": "a merge",
    }
    assert answer.sentences(found) == [
        "mine .82 [.79, .85] mean AUC over 2 test sets",
        "best specialist (fs) .80: better by +.021 [+.004, +.038]",
        "weight average (soup) .79: not told apart, +.030 [−.010, +.050]",
        "worst test set: dfdc .61",
    ]
    assert answer.notes(found) == answer.missing(found) == []
    table = answer.table(found)
    assert table.headings == ["mean", "worst", "minus best specialist", "minus average", "celeb", "dfdc"]
    first, soup, fs, *_ = table.lines
    assert first.leads
    assert [entry.text for entry in first.entries] == [".823", ".610", "+.021", "+.030", ".900", ".610"]
    assert [entry.beneath for entry in first.entries][:4] == [".79–.85", "dfdc", "+.004 to +.038", "−.010 to +.050"]
    assert [entry.strong for entry in first.entries] == [True, False, True, False, False, False]
    assert [entry.text for entry in soup.entries][2:4] == ["−.009", ""]  # not compared with fs: of the numbers alone
    assert fs.entries[4].strong  # the best on celeb
    row = answer.rows(found)[0]
    assert (row["minus average"], row["minus average, low"], row["minus average, high"]) == (0.03, -0.01, 0.05)
    assert (row["celeb"], row["celeb, low"]) == (0.9, 0.8)


def test_worse_is_said_to_be_worse(merged: Checkpoints) -> None:
    measured = evaluation(mine=model("out", 0.7, a=0.7), fs=model("fs.safetensors", 0.9, a=0.9))
    names = {"model": "fs", "than": "mine", "dataset": "a", "metric": "auc"}  # the only dataset there is
    measured["differences"] = [{**names, "difference": 0.2, "interval": [0.1, 0.3]}]
    assert answer.sentences(standing(measured, REPORT, "out")) == [
        "mine .70 [.60, 1.00] AUC on a",
        "best specialist (fs) .90: worse by −.200 [−.300, −.100]",
    ]


def test_an_evaluation_of_before(merged: Checkpoints) -> None:
    """Without the keys that came later."""
    measured = evaluation(mine=model("out", 0.8, a=0.9, b=0.7), fs=model("fs.safetensors", 0.75, a=0.8, b=0.7))
    del measured["differences"]
    for one in measured["models"].values():
        del one["average_intervals"]
    found = standing(measured, REPORT, "out")
    said = ["mine .80 mean AUC over 2 test sets", "best specialist (fs) .75: difference +.050", "worst test set: b .70"]
    assert answer.sentences(found) == said
    assert "No weight average is among the models" in answer.missing(found)[0]


def test_a_merge_that_is_the_average_itself(merged: Checkpoints) -> None:
    measured = evaluation(mine=model("out", 0.8, a=0.8), fs=model("fs.safetensors", 0.7, a=0.7))
    found = standing(measured, {**REPORT, "method": "weight_average"}, "out")
    assert answer.missing(found) == []
    assert answer.sentences(found)[1:] == ["best specialist (fs) .70: difference +.100"]


def test_what_is_not_of_this_merge_says_so(merged: Checkpoints) -> None:
    of_others = evaluation(mine=model("elsewhere/out", 0.8, a=0.8), fs=model("elsewhere/fs.safetensors", 0.7, a=0.7))
    found = standing(of_others, REPORT, "out")
    assert answer.notes(found)[0].startswith("This evaluation is of other models than this merge")
    assert answer.sentences(found) == ["mine .80 [.70, 1.00] AUC on a"]  # no word of specialists
    of_inputs = evaluation(fs=model("fs.safetensors", 0.7, a=0.7))
    assert answer.notes(standing(of_inputs, REPORT, "out"))[0].startswith("The merged model itself is not in this")


def test_scores_are_known_by_their_names(merged: Checkpoints) -> None:
    def scores(name: str, mean: float) -> dict[str, Any]:
        return {**model(f"{name}.csv", mean, a=mean), "detector": None}

    names = {"merged": "this merge", "weight_average": "average", "fs": "specialist", "base": "base", "x": "other"}
    found = standing(evaluation(**{name: scores(name, 0.8) for name in names}), REPORT, "out")
    assert dict(found.roles) == names
    assert "that merged is this merge is taken from names" in answer.missing(found)[0]


def test_videos_where_they_have_several_frames(merged: Checkpoints) -> None:
    one = model("out", 0.8, a=0.8)
    one["datasets"]["a"] |= {"videos": 4, "video_auc": 0.9}
    one["average"]["video_auc"] = 0.9
    found = standing(evaluation(mine=one), REPORT, "out")
    assert (found.unit, answer.sentences(found)[0]) == ("videos", "mine .90 AUC on a")


def test_the_evaluation_beside_a_merge_is_found(merged: Checkpoints) -> None:
    for name, source in (("one", "../out"), ("other", "../fs.safetensors"), ("broken", None)):
        Path(name).mkdir()
        content = {"models": {"m": {"source": source}}} if source else {"models": 1}
        Path(name, "evaluation.json").write_text(json.dumps(content))
    assert evaluations_beside("out") == ["one"]
    assert evaluations_beside(os.path.abspath("out")) == [os.path.abspath("one")]
    Path("two").mkdir()
    Path("two/evaluation.json").write_text(json.dumps({"models": {"m": {"source": "../out/model.safetensors"}}}))
    assert evaluations_beside("out/") == ["one", "two"]


def test_names_are_shortened_to_what_differs() -> None:
    assert list(shorten(["train_on_fs/clip.pth", "train_on_fr/clip.pth"], ["merged"]).values()) == [
        "fs",
        "fr",
        "merged",
    ]
    assert list(shorten([f"specialists/expert_{n}.safetensors" for n in (1, 2)]).values()) == ["expert_1", "expert_2"]
    assert list(shorten(["efs", "fs"]).values()) == ["efs", "fs"]  # words, not letters
    assert list(shorten(["a/fs", "a/fr"], ["fs"]).values()) == ["a/fs", "a/fr", "fs"]  # two would be one
    long = ["x" * 40 + "a" + "y" * 40, "x" * 40 + "b" + "y" * 40]
    short = shorten(long, limit=10)
    assert len({*short.values()}) == 2
    assert max(map(len, shorten(["one" * 30, "other" * 30], limit=10).values())) == 10
    odd = shorten(["a b", "a\tb", r"a\tb"])
    assert len({*odd.values()}) == 3
    assert all(text.isprintable() for text in odd.values())


def test_layers_and_kinds() -> None:
    vit = [f"vision.blocks.{n}.{kind}.weight" for n in range(3) for kind in ("attn.qkv", "mlp.fc1", "mlp.0")]
    place = layers_and_kinds([*vit, "vision.patch.weight"])
    assert place["vision.blocks.2.mlp.fc1.weight"] == ("vision.blocks.2", "mlp.fc1")
    assert place["vision.blocks.2.mlp.0.weight"] == ("vision.blocks.2", "mlp.0")
    assert place["vision.patch.weight"] == ("vision.patch", "other")
    resnet = layers_and_kinds(
        [f"layer{n}.{m}.conv{k}.weight" for n in (1, 2, 3, 4) for m in (0, 1) for k in (1, 2)] + ["conv1.weight"]
    )
    assert resnet["layer3.1.conv2.weight"] == ("layer3.1", "conv2")
    xception = [
        f"backbone.block{n}.rep.{m}.{kind}.weight" for n in (1, 2, 3) for m in (0, 3) for kind in ("conv", "pw")
    ]
    assert len(set(layers_and_kinds(xception).values())) == len(xception)
    assert layers_and_kinds(["a.weight"]) == {"a.weight": ("a", "other")}
    layers = ["blocks.10", "blocks.9", "patch", "blocks.2.10", "blocks.2.9", "layer1²"]
    assert sorted(layers, key=by_number) == ["blocks.2.9", "blocks.2.10", "blocks.9", "blocks.10", "layer1²", "patch"]


def test_numbers() -> None:
    assert [number(one) for one in (0.825, 1.0, -0.07, None, -0.001)] == [".82", "1.00", "−.07", "–", ".00"]
    assert [signed(one) for one in (0.0212, -0.3, 0.0004, None)] == ["+.021", "−.300", ".000", "–"]


def test_numbers_on_a_map_can_be_read() -> None:
    values = np.linspace(-0.5, 1.5, 200).tolist()
    cells = Matrix(["row"], ["column"] * len(values), [values], 0.0).table()[0][1]

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for cell in cells:
        low, high = sorted((luminance(cell.ink), luminance(cell.ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, cell
