"""``r2m init``, the recipes' schema, and the preprocessing that goes with a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from r2m.places import FileSystemWarning
from r2m.preprocessing import Preprocessing
from r2m.preprocessing_files import beside
from r2m.recipe import Expert
from r2m.recipe_file import read_recipe, schema
from safetensors.torch import load_file, save_file

from r2m_kernels import InvalidInput, MergeConfig

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
HALF = Preprocessing.of(224, [0.5] * 3, [0.5] * 3)
CLIP = Preprocessing.of(224, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def test_a_starter_recipe_merges_as_the_options_do(checkpoints: Checkpoints, command: Command) -> None:
    Path("project").mkdir()
    words = [f"{name}={path}" for name, path in checkpoints.paths.items()]
    result = command("init", "base.safetensors", *words, "--to", "project/recipe.yaml")
    said = "project/recipe.yaml: a recipe for a base and 3 experts, which fit\n"
    assert (result.code, result.out) == (0, f"{said}Next: r2m merge project/recipe.yaml --out merged\n")
    text = Path("project/recipe.yaml").read_text()
    assert 'base_model: "../base.safetensors"  # unknown family, 6 tensors' in text
    assert read_recipe("project/recipe.yaml").notes == ()  # it is of this version
    assert command("merge", "project/recipe.yaml", "--out", "a").code == 0
    assert command("merge", *checkpoints.arguments, "--out", "b").code == 0
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    again = command("init", "base.safetensors", *words, "--to", "project/recipe.yaml")
    assert (again.code, again.err) == (2, "Error: project/recipe.yaml: exists already; --to names another file.\n")
    for directory in ("/", "."):
        again = command("init", "base.safetensors", *words, "--to", directory)
        assert (again.code, again.err) == (2, f"Error: {directory}: expected a file's name, got a directory's\n")


def test_every_line_that_is_commented_out_can_be_used(checkpoints: Checkpoints, command: Command) -> None:
    words = [f"{name}={path}" for name, path in checkpoints.paths.items()]
    assert command("init", "base.safetensors", *words).code == 0
    lines = Path("recipe.yaml").read_text().splitlines()
    keys = ("dtype", "format", "weight", "preprocessing", "rank", "exclude")
    used = [
        re.sub(r"^( *)#( ?)( *)", r"\1\3", line) if line.lstrip("# ").partition(":")[0] in keys else line
        for line in lines
    ]
    Path("recipe.yaml").write_text("\n".join(used).replace("parameters: {}", "parameters:") + "\n")
    recipe = read_recipe("recipe.yaml")
    assert recipe.config.weights == (2.0, 2.0, 2.0)
    assert (recipe.dtype, recipe.format) == ("bfloat16", "pth")
    assert recipe.config.exclude == ("*.embeddings.*",)
    assert recipe.preprocessing == HALF


def test_a_starter_names_the_preset_that_is_needed(checkpoints: Checkpoints, command: Command) -> None:
    for name, path in checkpoints.paths.items():
        save_file({f"module.{key}": value for key, value in checkpoints.experts[name].items()}, path)
    assert command("init", "base.safetensors", *checkpoints.paths.values()).code == 0
    assert read_recipe("recipe.yaml").arrangement.preset == "wrapped"
    assert command("merge", "recipe.yaml", "--out", "merged").code == 0
    save_file({"other": torch.zeros(3)}, "other.safetensors")
    result = command("init", "base.safetensors", "other.safetensors", "--to", "no.yaml")
    assert result.code == 2
    assert "does not fit" in result.err
    assert not Path("no.yaml").exists()


def test_names_that_yaml_would_take_for_something_else(checkpoints: Checkpoints, command: Command) -> None:
    odd = "yes: [no] # \u2028 é.safetensors"
    save_file(checkpoints.experts["fs"], odd)
    assert command("init", "base.safetensors", odd).code == 0
    assert list(read_recipe("recipe.yaml").experts.values()) == [Expert(odd)]


def test_the_schema_knows_what_recipes_know(command: Command) -> None:
    found = json.loads(command("schema").out)
    assert found == json.loads(json.dumps(schema()))
    parameters = found["properties"]["parameters"]["properties"]
    assert parameters.keys() == MergeConfig().to_dict().keys()
    assert all(one["description"] for one in parameters.values())
    assert parameters["eta"]["default"] == 1.0
    assert found["properties"]["merge_method"]["enum"][:2] == ["r2m", "r2m_paper"]
    assert "r2m_truncated" not in found["properties"]["merge_method"]["enum"]  # read, not offered
    assert all("description" in one for one in found["properties"].values())


def test_a_rank_by_name_as_mergekit_writes_it() -> None:
    text = "base_model: b\nmodels: [{model: e}]\nparameters: {rank: [{filter: '*attn*', value: 4}, {value: 0.5}]}"
    Path("recipe.yaml").write_text(text)
    config = read_recipe("recipe.yaml").config
    assert (config.ranks, config.rank) == ((("*attn*", 4),), 0.5)
    Path("recipe.yaml").write_text(text.replace("value: 4", "values: 4"))
    with pytest.raises(InvalidInput, match="rank: expected a value with or without a filter, got"):
        read_recipe("recipe.yaml")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(**more: Any) -> dict[str, Any]:
    models = [{"model": f"{name}.safetensors", "name": name} for name in ("fs", "fr")]
    return {"base_model": "base.safetensors", "models": models, **more}


def written(content: dict[str, Any]) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    return "recipe.yaml"


def test_preprocessing_goes_with_the_model(checkpoints: Checkpoints, command: Command) -> None:
    content = recipe()
    for model in content["models"]:
        model["preprocessing"] = HALF.plain()
    assert command("merge", written(content), "--out", "merged").code == 0
    assert beside("merged") == beside("merged/model.safetensors") == HALF
    assert json.loads(Path("merged/r2m_report.json").read_text())["preprocessing"] == HALF.plain()
    assert command("merge", "merged/r2m_config.yaml", "--out", "again").code == 0
    assert beside("again") == HALF
    # It is found where a merge is an expert.
    assert command("merge", "--base", "base.safetensors", "--expert", "merged", "--out", "twice").code == 0
    assert beside("twice") == HALF


def test_two_preprocessings_are_not_mixed_silently(checkpoints: Checkpoints, command: Command) -> None:
    content = recipe()
    for model, own in zip(content["models"], (HALF, CLIP), strict=True):
        model["preprocessing"] = own.plain()
    result = command("merge", written(content), "--out", "merged")
    assert result.code == 2
    assert result.err.startswith(
        "Error: preprocessing: expert 'fs' has 224 px, mean 0.5 0.5 0.5, std 0.5 0.5 0.5, expert 'fr' has 224 px, "
        "mean 0.481455 "
    )
    assert not Path("merged").exists()
    assert command("merge", written({**content, "preprocessing": CLIP.plain()}), "--out", "merged").code == 0
    assert beside("merged") == CLIP
    # Said of the whole it stays when experts come and go.
    assert command("remove", "merged", "--expert", "fs").code == 0
    assert beside("merged") == CLIP


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": 0}, "preprocessing: size: expected pixels of a side, got 0"),
        ({"mean": [0.5]}, "preprocessing: mean: expected 3 numbers, got [0.5]"),
        ({"std": [1, 1, 0]}, "preprocessing: std: expected positive numbers, got [1.0, 1.0, 0.0]"),
        ({"sizee": 3}, "unknown key 'sizee' in preprocessing; did you mean 'size'?"),
    ],
)
def test_a_preprocessing_that_is_none(
    change: dict[str, Any], sentence: str, checkpoints: Checkpoints, command: Command
) -> None:
    result = command("merge", written(recipe(preprocessing={**HALF.plain(), **change})), "--out", "merged")
    assert (result.code, result.err) == (2, f"Error: recipe (recipe.yaml): {sentence}\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, 224),
        ({"size": {"height": 299, "width": 299}}, 299),
        ({"size": 192}, 192),
        ({"size": {}}, None),
        ({}, None),
    ],
)
def test_transformers_files_are_understood(content: dict[str, Any], expected: int | None) -> None:
    text = json.dumps({**content, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    Path("preprocessor_config.json").write_text(text)
    own = beside(".")
    assert (own.size if own else None) == expected


def test_a_file_beside_that_is_no_json_says_nothing_and_is_told(checkpoints: Checkpoints, command: Command) -> None:
    Path("preprocessor_config.json").write_text("[1, 2")
    with pytest.warns(
        FileSystemWarning, match=r"^preprocessor_config.json: not valid JSON .*; nothing is taken from it$"
    ):
        assert beside(".") is None
    result = command("merge", *checkpoints.arguments, "--out", "merged")
    assert (result.code, result.err.count("Warning: preprocessor_config.json: not valid JSON")) == (0, 1)
    assert load_file("merged/model.safetensors")
