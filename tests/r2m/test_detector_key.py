"""What a checkpoint is the weights of, said once: in recipes, or by files beside it; and which output is the fake's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from r2m.detector_kinds import FORMS, recognised
from r2m.recipe_file import read_recipe
from safetensors.torch import save_file

if TYPE_CHECKING:
    from conftest import Result

Command = Callable[..., "Result"]
MODULE = """
import torch
from torch import nn

class Brightness(nn.Module):
    def __init__(self, outputs=2):
        super().__init__()
        self.head = nn.Linear(3, outputs)

    def forward(self, images):
        return self.head(images.mean((2, 3)))

def one():
    return Brightness(1)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two specialists who know that fakes here are bright, pictures, and a module of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MODULE)
    for label, brightness in (("real", 60), ("fake", 180)):
        for number in range(3):
            Path(f"set/{label}").mkdir(parents=True, exist_ok=True)
            picture = np.full((8, 8, 3), brightness + number, np.uint8)
            Image.fromarray(picture).save(f"set/{label}/{number}.png")
    for name, slope in (("base", 0.0), ("fs", 1.0), ("fr", 2.0)):
        weight = slope * torch.tensor([[-1.0] * 3, [1.0] * 3])
        Path(name).mkdir()
        save_file({"head.weight": weight, "head.bias": torch.zeros(2)}, f"{name}/model.safetensors", {"format": "pt"})
    return tmp_path


def recipe(**more: Any) -> str:
    content = {
        "base_model": "base",
        "models": [{"model": name, "name": name} for name in ("fs", "fr")],
        "detector": "mine:Brightness",
        "preprocessing": {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
        **more,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    return "recipe.yaml"


def aucs(place: str) -> dict[str, float]:
    found = json.loads(Path(place, "evaluation.json").read_text())["models"]
    return {name: one["datasets"]["set"]["auc"] for name, one in found.items()}


def evaluate(command: Command, *words: str, out: str = "e") -> Result:
    result = command("evaluate", *words, "--data", "set", "--out", out, "--bootstrap", "5", "--overwrite")
    assert result.code == 0, result.err
    return result


def test_said_once_it_is_known_wherever_the_merge_goes(command: Command) -> None:
    assert command("merge", recipe(), "--out", "merged").code == 0
    result = evaluate(command, "merged")
    assert aucs("e") == {"merged": 1.0, "fs": 1.0, "fr": 1.0}
    found = json.loads(Path("e/evaluation.json").read_text())
    assert {one["detector"] for one in found["models"].values()} == {"mine:Brightness"}
    assert found["models"]["fs"]["fake"] == {"index": 1, "label": None, "by": "by default (--fake)"}
    assert found["models"]["fs"]["preprocessing"] == {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert "merged, fs, fr: fake is output 1, by default (--fake)" in result.out
    assert found["labels"] == {"set": {"real": ["real"], "fake": ["fake"]}}
    detected = command("detect", "merged", "set/fake/0.png")
    assert (detected.code, detected.err) == (0, "")
    # A model beside it is taken for the same; one alone has to be told.
    assert list(aucs("e")) == ["merged", "fs", "fr"]
    evaluate(command, "merged", "--model", "mine=fs", out="again")
    assert list(aucs("again")) == ["merged", "mine", "fr"]
    alone = command("evaluate", "--model", "fs", "--data", "set")
    assert alone.code == 2
    assert "model 'fs' (fs): nothing says what it is the weights of; expected --detector transformers" in alone.err
    assert command("remove", "merged", "--expert", "fr").code == 0
    assert command("add", "merged", "--expert", "fr=fr").code == 0
    assert read_recipe("merged/r2m_config.yaml").detector == "mine:Brightness"
    assert command("merge", recipe(), "--detector", "x:y", "--out", "other").code == 0
    assert read_recipe("other/r2m_config.yaml").detector == "x:y"


def test_an_option_of_merge_and_of_init(command: Command) -> None:
    words = ("--base", "base", "--expert", "fs", "--expert", "fr", "--out", "merged")
    refused = command("merge", *words, "--detector", "resnet")
    assert (refused.code, refused.err) == (
        2,
        f"Error: detector: expected {FORMS}, got 'resnet'\n",
    )
    for wrong in ("transformers:x", "timm", "timm:", ":x", "1a:b"):
        assert command("merge", *words, "--detector", wrong).code == 2
    assert command("merge", *words, "--detector", "clip:vit/large").code == 0
    assert read_recipe("merged/r2m_config.yaml").detector == "clip:vit/large"  # as from here
    assert yaml.safe_load(Path("merged/r2m_config.yaml").read_text())["detector"] == "clip:../vit/large"
    Path("p").mkdir()
    assert command("init", "base", "fs", "fr", "--to", "p/r.yaml", "--detector", "clip:vit").code == 0
    assert read_recipe("p/r.yaml").detector == "clip:vit"
    assert command("init", "base", "fs", "--to", "q.yaml", "--detector", "vit").code == 2
    assert not Path("q.yaml").exists()
    Path("fs/config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    assert command("init", "base", "fs", "fr", "--to", "r.yaml").code == 0
    assert read_recipe("r.yaml").detector == "timm:vit_tiny_patch16_224"


def test_files_beside_a_checkpoint_say_what_it_is() -> None:
    for name, content, kind in (
        ("config.json", {"architecture": "vit_tiny_patch16_224"}, "timm:vit_tiny_patch16_224"),
        ("config.json", {"model_type": "vit"}, "transformers"),
        ("config.json", {}, None),
        ("open_clip_config.json", {"model_cfg": {}}, "open_clip:fs"),
    ):
        Path("fs", name).write_text(json.dumps(content))
        assert recognised(Path("fs")) == kind
    assert recognised(Path("fr")) is None


def test_labels_say_which_output_is_fake(command: Command) -> None:
    """Experts whose first output is the fake's: AUC 0 by the second, and 1 by what their labels say."""
    for name, slope in (("fs", 1.0), ("fr", 2.0)):
        weight = slope * torch.tensor([[1.0] * 3, [-1.0] * 3])
        save_file({"head.weight": weight, "head.bias": torch.zeros(2)}, f"{name}/model.safetensors", {"format": "pt"})
        Path(name, "config.json").write_text(json.dumps({"id2label": {"0": "Fake", "1": "Real"}}))
    assert command("merge", recipe(), "--out", "merged").code == 0
    result = evaluate(command, "merged")
    assert aucs("e") == {"merged": 1.0, "fs": 1.0, "fr": 1.0}
    assert "merged: fake is output 0 (Fake), as its merge says" in result.out
    assert "fs, fr: fake is output 0 (Fake), as config.json says" in result.out
    evaluate(command, "merged", "--fake", "1", out="other")
    assert aucs("other") == {"merged": 0.0, "fs": 0.0, "fr": 0.0}
    # Without labels a recipe says it: of the merged head, or of the experts.
    for name in ("fs", "fr"):
        Path(name, "config.json").unlink()
    experts = [{"model": name, "name": name, "fake": 0} for name in ("fs", "fr")]
    for number, said in enumerate(({"fake": 0}, {"models": experts})):
        assert command("merge", recipe(**said), "--out", f"m{number}").code == 0
        evaluate(command, f"m{number}", out=f"e{number}")
        assert aucs(f"e{number}")[f"m{number}"] == 1.0
    assert aucs("e1")["fs"] == 1.0
    assert command("evaluate", "merged", "--data", "set", "--fake", "2").code == 2


def test_a_detector_of_one_output_has_no_other(command: Command) -> None:
    save_file({"head.weight": torch.ones(1, 3), "head.bias": torch.zeros(1)}, "one.safetensors")
    words = ("--model", "one.safetensors", "--detector", "mine:one", "--size", "8", "--mean", "0.5", "--std", "0.5")
    result = evaluate(command, *words)
    assert aucs("e") == {"one.safetensors": 1.0}
    assert "one.safetensors: fake is output 1, its only one" in result.out
    refused = command("evaluate", *words, "--data", "set", "--fake", "0")
    assert (refused.code, "one.safetensors) has one output, which is the fake's" in refused.err) == (2, True)
