"""Merges described in a file: what it says, what it may not say, and that a merge's own recipe repeats it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from r2m.recipe import ARRANGEMENT, OUTPUT, Expert
from r2m.recipe_file import dump, read_recipe, schema

from r2m_kernels import InvalidInput, MergeConfig
from r2m_kernels.config import METHODS, make_config

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

WHOLE = """
base_model: base.safetensors
merge_method: r2m_truncated
models:
  - model: fs.safetensors
  - model: sub/fr.safetensors
    name: reenactment
    weight: 2
parameters:
  rank: 0.2
  exclude: [head.*]
dtype: bfloat16
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str, name: str = "recipe.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def test_everything_a_recipe_can_say() -> None:
    recipe = read_recipe(written(WHOLE, "project/recipe.yaml"))
    assert recipe.base == "project/base.safetensors"
    assert recipe.experts == Expert.each(
        {"fs.safetensors": "project/fs.safetensors", "reenactment": "project/sub/fr.safetensors"}
    )
    assert recipe.config == make_config("r2m_truncated", {}).replace(rank=0.2, exclude=("head.*",), weights=(1.0, 2.0))
    assert (recipe.method, recipe.dtype) == ("r2m_truncated", "bfloat16")


def test_what_is_left_out_has_its_default() -> None:
    recipe = read_recipe(written("base_model: /b\nmodels: [{model: /e}]"))
    assert (recipe.base, recipe.experts) == ("/b", {"e": Expert("/e")})
    assert (recipe.method, recipe.config, recipe.dtype) == ("r2m", MergeConfig.r2m(), None)


def test_every_key_that_is_read_is_written(here: Path) -> None:
    preprocessing = {"size": 224, "mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]}
    first = {"model": "a=1", "name": "a", "rename": {"module.": "", "x.": None}}
    content = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [first, {"model": "b", "name": "b", "preprocessing": preprocessing, "fake": 0}],
        "parameters": MergeConfig.ties().replace(weights=(1, 2), keep=("k*",)).to_dict(),
        "dtype": "float16",
        "format": "adapters",
        "adapters": "one",
        "adapter_rank": 8,
        "adapter_size": 0.1,
        "detector": "clip:vit",
        "temperature": 2.0,
        "head_bias": -0.5,
        "statistics": "statistics",
        "rename": {"old.": "new."},
        "preset": "df40",
        "head": "refit:logistic",
        "head_tensors": ["x*"],
        "head_features": "features",
        "fake": 1,
        "key": "model_ema",
        "preprocessing": {**preprocessing, "size": 336},
    }
    for name, declared in {**OUTPUT, **ARRANGEMENT}.items():
        assert content[name] not in (declared.default, list(declared.default or ())), name
    assert schema()["properties"].keys() == content.keys()
    found = dump(read_recipe(written(json.dumps(content), "project/recipe.yaml")))
    assert list(found) == list(content)
    content["detector"] = f"clip:{here / 'project' / 'vit'}"
    for key, name in (("base_model", "base"), ("head_features", "features"), ("statistics", "statistics")):
        content[key] = str(here / "project" / name)
    for one in content["models"]:
        one["model"] = str(here / "project" / one["model"])
    assert found == content
    assert dump(read_recipe(written(json.dumps(found), "elsewhere.yaml"))) == found


def test_a_path_of_a_recipe_is_one_whatever_letters_it_has() -> None:
    """On the command line ``a=b`` without such a file is a name and a path."""
    recipe = read_recipe(written("base_model: b\nmodels: [{model: a=b}, {model: c, name: n}]"))
    assert recipe.experts == Expert.each({"a=b": "a=b", "n": "c"})
    Path("n=c").touch()
    assert read_recipe("recipe.yaml").experts == recipe.experts


def test_json_is_a_recipe() -> None:
    assert read_recipe(written('{"base_model": "b", "models": [{"model": "e"}]}')).experts == {"e": Expert("e")}


def test_changes_replace_what_it_says() -> None:
    recipe = read_recipe(written(WHOLE), ["parameters.rank=0.5", "dtype=null", "merge_method=cart", "parameters.eta=2"])
    assert recipe.config == MergeConfig.cart(0.5, 1.0).replace(exclude=("head.*",), weights=(1.0, 2.0), eta=2.0)
    assert recipe.dtype is None


WRONG = {
    "": "expected keys such as base_model and models, got NoneType",
    "- a\n- b": "expected keys such as base_model and models, got list",
    "base_model: [": "not valid YAML in line 1: ",
    "base_model: b": "models is missing",
    "models: [{model: e}]": "base_model is missing",
    "base_model: b\nmodels: []": "models: list should have at least 1 item",
    "base_model: b\nmodels: [e]": "models.0: expected keys and values ({model: PATH}), got 'e'",
    "base_model: b\nmodels: [{model: e}]\npreprocessing: 3": "preprocessing: expected keys and values ({size: …}), got",
    "base_model: 3\nmodels: [{model: e}]": "base_model: input should be a valid string, got '3'",
    "base_model: b\nmodels: [{model: e, weights: 2}]": "unknown key 'weights' in models.0; did you mean 'weight'?",
    "base_model: b\nmodels: [{model: e}]\nmerge_metod: ties": "unknown key 'merge_metod'; did you mean 'merge_method'?",
    "base_model: b\nmodels: [{model: e}]\nmerge_method: tias": "got 'tias'; did you mean 'ties'?",
    "base_model: b\nmodels: [{model: e}]\nparameters: {rnak: 3}": "parameters: unknown option 'rnak'; did you mean",
    "base_model: b\nmodels: [{model: e}]\nparameters: {rank: many}": "parameters: rank: expected",
    "base_model: b\nmodels: [{model: e, weight: -1}]": "parameters: weights[0]: expected a positive number, got -1",
    "base_model: b\nbase_model: c\nmodels: [{model: e}]": "in line 2: the key 'base_model' is given twice",
    "base_model: &b b\nmodels: [{model: *b}]": "aliases (*name) are not used in recipes",
    "base_model: !!python/object/apply:os.system [touch marker]": "could not determine a constructor",
    "base_model: b\nmodels: [{model: e, name: a=b}]": "models.0.name: expected a text without =, got 'a=b'",
    "base_model: b\nmodels: [{model: e, weight: 2}]\nparameters: {weights: [1]}": "weights: given both with the models",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_recipe_is_refused_in_one_sentence(text: str, command: Callable[..., Result]) -> None:
    path = written(text)
    with pytest.raises(InvalidInput) as caught:
        read_recipe(path)
    assert WRONG[text] in str(caught.value)
    assert str(caught.value).startswith("recipe (recipe.yaml): ")
    result = command("merge", path, "--out", "out")
    assert (result.code, result.err) == (2, f"Error: {caught.value}\n")
    assert not Path("marker").exists()


def test_places_without_a_recipe(here: Path) -> None:
    for path in ("nothing.yaml", "."):
        with pytest.raises(InvalidInput, match=rf"^recipe \({re.escape(path)}\): no such file$"):
            read_recipe(path)
    written("#" * 2**20 + "\n")
    with pytest.raises(InvalidInput, match="expected at most 1048576 bytes"):
        read_recipe("recipe.yaml")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("rank", "--set rank: expected KEY=VALUE"),
        ("a..b=1", "--set a..b=1: expected KEY=VALUE"),
        ("dtype.x=1", "--set dtype.x=1: dtype holds no keys"),
        ("dtype=[", "--set dtype=[: '[' is not a YAML value"),
        ("\udcff=1", "recipe (recipe.yaml): a key is not UTF-8"),
        ("parameters.rnak=1", "recipe (recipe.yaml): parameters: unknown option 'rnak'"),
    ],
)
def test_a_wrong_change_is_refused(change: str, sentence: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_recipe(written(WHOLE), [change])
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_s_own_recipe_repeats_it(method: str, checkpoints: Checkpoints, command: Callable[..., Result]) -> None:
    assert command("merge", *checkpoints.arguments, "--method", method, "--out", "first").code == 0
    assert command("merge", "first/r2m_config.yaml", "--out", "second").code == 0
    for name in ("model.safetensors", "r2m_config.yaml"):
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def test_names_are_changed_where_they_begin_otherwise(checkpoints: Checkpoints, command: Callable[..., Result]) -> None:
    """A training wrapper's prefix on every expert, and another one on one of them."""
    assert command("merge", *checkpoints.arguments, "--out", "plain").code == 0
    for name, prefix in (("fs", "module."), ("fr", "module.net."), ("efs", "module.")):
        torch.save({prefix + key: value for key, value in checkpoints.experts[name].items()}, f"{name}.pth")
    content = {
        "base_model": checkpoints.base_path,
        "models": [
            {"model": "fs.pth", "name": "fs"},
            {"model": "fr.pth", "name": "fr", "rename": {"module.net.": ""}},
            {"model": "efs.pth", "name": "efs"},
        ],
        "rename": {"module.": ""},
    }
    path = written(yaml.safe_dump(content))
    assert command("merge", path, "--out", "renamed").code == 0
    assert command("merge", "renamed/r2m_config.yaml", "--out", "again").code == 0
    wanted = Path("plain/model.safetensors").read_bytes()
    assert Path("renamed/model.safetensors").read_bytes() == wanted
    assert Path("again/model.safetensors").read_bytes() == wanted
    words = [f"--expert={name}={name}.pth" for name in ("fs", "efs")]
    command_line = ["merge", "--base", checkpoints.base_path, *words, "--out", "by_option"]
    assert "its names carry the prefix 'module.' that the base's lack" in command(*command_line).err
    assert command(*command_line, "--rename", "module.=").code == 0


def test_a_wrong_rule_is_refused(checkpoints: Checkpoints, command: Callable[..., Result]) -> None:
    arguments = [*checkpoints.arguments, "--out", "out"]
    for rule in ("module.", "=x"):
        result = command("merge", *arguments, "--rename", rule)
        assert (result.code, result.err) == (2, f"Error: --rename {rule}: expected OLD=NEW, such as 'module.='.\n")
    result = command("merge", *arguments, "--rename", "block.weight=block.bias")
    assert (
        result.err == "Error: base (base.safetensors): renamed, 'block.bias' and 'block.weight' are both 'block.bias'\n"
    )
    result = command("plan", *arguments, "--rename", "block.=stage.")
    assert result.code == 0


def test_paths_of_any_bytes_come_back(checkpoints: Checkpoints, command: Callable[..., Result]) -> None:
    odd = os.fsdecode(b"x\xe9\xff")
    Path(odd).mkdir()
    for name in ("base", "fs", "fr"):
        Path(f"{name}.safetensors").rename(f"{odd}/{name}\udce9.safetensors")
    words = ["--base", f"{odd}/base\udce9.safetensors"]
    words += [word for name in ("fs", "fr") for word in ("--expert", f"{odd}/{name}\udce9.safetensors")]
    assert command("merge", *words, "--out", f"{odd}/out").code == 0
    assert command("merge", f"{odd}/out/r2m_config.yaml", "--out", "again").code == 0
    assert Path("again/model.safetensors").read_bytes() == Path(odd, "out/model.safetensors").read_bytes()
    for more in (
        ("card", f"{odd}/out"),
        ("remove", f"{odd}/out", "--expert", "fs\udce9.safetensors"),
        ("inspect", f"{odd}/out"),
    ):
        result = command(*more)
        assert (result.code, "Traceback" in result.err) == (0, False)
    for path in ("out/r2m_config.yaml", "out/r2m_report.json", "out/README.md"):
        Path(odd, path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("merge_method: linear", "merge_method: linear of mergekit is weight_average here"),
        ("merge_method: dare_ties", "merge_method: dare_ties of mergekit is not here"),
        ("merge_method: ite", "did you mean"),
        ("parameters: {weight: 1}", "parameters: "),
    ],
)
def test_words_of_mergekit_are_answered(
    content: str, sentence: str, command: Callable[..., Result], here: Path
) -> None:
    models = "base_model: b\nmodels: [{model: a}]\n"
    path = written(models + content.replace("ite", "tiez"))
    assert sentence in command("merge", path, "--out", "out").err
    path = written("base_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    assert "models.0.parameters: of a model there is its weight alone" in command("merge", path, "--out", "out").err


def test_options_may_not_say_it_again(checkpoints: Checkpoints, command: Callable[..., Result]) -> None:
    path = written(
        yaml.safe_dump({"base_model": checkpoints.base_path, "models": [{"model": checkpoints.paths["fs"]}]})
    )
    for words, instead in (
        (["--base", "b"], "--set base_model=VALUE changes it"),
        (["--expert", "b"], "change its models"),
        (["--drop", "b"], "change its rename"),
        (["--method", "ties"], "--set merge_method=VALUE changes it"),
        (["--rank", "3"], "--set parameters.rank=VALUE changes it"),
        (["--no-norm-match"], "--set parameters.norm_match=VALUE changes it"),
        (["--preset", "df40"], "--set preset=VALUE changes it"),
        (["--head-tensor", "x"], "--set head_tensors=VALUE changes it"),
    ):
        result = command("merge", path, *words, "--out", "out")
        given = words[0].replace("--no-", "--")
        assert (result.code, result.err) == (2, f"Error: {given}: the recipe says that; {instead}.\n")
    for more in ((), ("c",)):
        result = command("merge", "--base", "base.safetensors", "--expert", "a", "b", *more, "--out", "out")
        assert result.code == 2
        assert "each checkpoint has an --expert of its own: --expert A --expert B" in result.err
    assert command("merge", "--out", "out").err == "Error: Missing option '--base', or a recipe.\n"
    assert command("merge", "--base", "b", "--out", "out").err == "Error: Missing option '--expert', or a recipe.\n"
    result = command("merge", *checkpoints.arguments, "--set", "a=1", "--out", "out")
    assert result.err == "Error: --set: changes a recipe, and none is given.\n"
    assert command("plan", path, "--out", "out").code == 0
    assert command("merge", path, "--set", "parameters.eta=0", "--dtype", "float16", "--out", "out").code == 0


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 9), st.text(max_size=4)), max_size=4))
def test_a_mutated_recipe_is_read_or_refused(tmp_path: Path, edits: list[tuple[int, int, str]]) -> None:
    text = WHOLE
    for at, cut, new in edits:
        text = text[:at] + new + text[at + cut :]
    path = tmp_path / "mutated.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    refusal = None
    try:
        read_recipe(path)
    except InvalidInput as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith("recipe (") and refusal.isprintable()), refusal


ROWS = MergeConfig.r2m(rank=1.0, row_power=3.0, whole_up_to=0, head="merge")
YOUNGER = ("head", "truncate", "rank_rounding", "whole_up_to")


def of_01(method: str, config: MergeConfig) -> dict[str, Any]:
    """A recipe as a merge of 0.1.0 left it: all its options, and none of a later time."""
    parameters = {name: value for name, value in config.to_dict().items() if name not in YOUNGER}
    return {"base_model": "b", "merge_method": method, "models": [{"model": "e"}], "parameters": parameters}


def test_a_recipe_that_a_former_merge_wrote_means_what_it_meant() -> None:
    centred = MergeConfig.r2m_centred(head="merge")
    for method, config in (("r2m", ROWS), ("r2m_paper", centred), ("r2m_truncated", make_config("r2m_truncated", {}))):
        Path("recipe.yaml").write_text(json.dumps(of_01(method, config)))
        recipe = read_recipe("recipe.yaml")
        assert recipe.config == config
        assert recipe.notes == ()
        again = dump(recipe)
        assert again["parameters"]["head"] == "merge"
        Path("again.yaml").write_text(json.dumps(again))
        assert read_recipe("again.yaml").config == recipe.config


@pytest.mark.parametrize("method", ["r2m", "r2m_paper"])
def test_a_recipe_by_hand_follows_the_new_meaning_and_says_so(method: str) -> None:
    Path("recipe.yaml").write_text(f"base_model: b\nmerge_method: {method}\nmodels: [{{model: e}}]")
    recipe = read_recipe("recipe.yaml")
    assert recipe.config == make_config(method, {})
    assert recipe.config.head == "mean"
    (note,) = recipe.notes
    assert note.startswith(f"merge_method: {method} is another than in 0.1.0: ")
    Path("recipe.yaml").write_text(json.dumps(dump(recipe)))
    assert read_recipe("recipe.yaml").notes == ()


def test_a_former_method_is_understood_and_says_what_to_write() -> None:
    Path("recipe.yaml").write_text("base_model: b\nmerge_method: r2m_truncated\nmodels: [{model: e}]")
    recipe = read_recipe("recipe.yaml")
    strength = {"eta_mode": "relative", "eta": 0.6, "core_mode": "mean"}
    assert recipe.config == MergeConfig.r2m(**strength, head="merge", rank=0.1, row_power=0.0, whole_up_to=0)
    (note,) = recipe.notes
    assert note.startswith("the method r2m_truncated goes: write r2m with eta_mode=relative, eta=0.6, core_mode=mean")
    with pytest.warns(FutureWarning, match="r2m_truncated goes: write r2m with"):
        assert MergeConfig.r2m_truncated(0.1) == recipe.config
