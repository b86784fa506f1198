"""What strangers put beside their weights: read within bounds, refused or left alone, and never a reason to hang."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from r2m import plain_yaml

from r2m_kernels.errors import BadFile

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
NAMES = ("config.json", "preprocessor_config.json", "README.md", "r2m_report.json")
# Or what makes something else in its place.
CONTENTS: dict[str, str | Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "link to itself": lambda path: path.symlink_to(path.name),
    "deep": "[" * 100_000,
    "inf": '{"size": 1e999, "image_mean": [0, 0, 0], "image_std": [1, 1, 1], "specialists": {"a": 1e999}}',
    "digits": '{"size": ' + "9" * 5000 + "}",
    "yaml": "---\nlicense: " + "[" * 3000 + "\n---\n",
    "date": "---\nlicense: 2001-13-45\ndatasets: [2001-02-03]\n---\n",
}


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::r2m.places.FileSystemWarning")
@pytest.mark.parametrize("kind", CONTENTS)
def test_files_beside_an_expert_neither_hang_nor_end_in_a_traceback(
    kind: str, checkpoints: Checkpoints, command: Command
) -> None:
    Path("expert").mkdir()
    shutil.copy("fs.safetensors", "expert/model.safetensors")
    content = CONTENTS[kind]
    for name in NAMES:
        path = Path("expert", name)
        path.write_text(content) if isinstance(content, str) else content(path)
    done = command("merge", "--base", checkpoints.base_path, "--expert", "expert", "--out", "out")
    assert (done.code, done.err.count("Error")) == (0, 0)
    assert json.loads(Path("out/r2m_report.json").read_text())["specialists"] == {"expert": 1}


def test_a_file_that_cannot_be_read_is_told_once(checkpoints: Checkpoints, command: Command) -> None:
    Path("expert").mkdir()
    shutil.copy("fs.safetensors", "expert/model.safetensors")
    Path("expert/config.json").write_text("{")
    done = command("merge", "--base", checkpoints.base_path, "--expert", "expert", "--out", "out")
    assert (done.code, done.err.count("Warning: expert/config.json: not valid JSON")) == (0, 1)


@pytest.mark.parametrize("count", [10**6, -1, 0, "1", 1.5, None, [1]])
def test_a_report_cannot_give_itself_any_weight(count: object, checkpoints: Checkpoints, command: Command) -> None:
    Path("expert").mkdir()
    shutil.copy("fs.safetensors", "expert/model.safetensors")
    Path("expert/r2m_report.json").write_text(json.dumps({"specialists": {"a": count}}))
    words = ("--base", checkpoints.base_path, "--expert", "expert", "--expert", "fr=fr.safetensors")
    assert command("merge", *words, "--out", "out").code == 0
    assert json.loads(Path("out/r2m_report.json").read_text())["specialists"] == {"expert": 1, "fr": 1}


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_link_beside_the_base_does_not_bring_its_target_into_the_output(
    name: str, checkpoints: Checkpoints, command: Command
) -> None:
    Path("secret").write_text('{"key": "SECRET"}')
    Path("base").mkdir()
    shutil.copy(checkpoints.base_path, "base/model.safetensors")
    Path("base", name).symlink_to("../secret")
    result = command("merge", "--base", "base", "--expert", "fs.safetensors", "--out", "out")
    assert (result.code, result.err) == (2, f"Error: base (base): {name}: is a link that leads out of its directory\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")], ids=["dir", "pipe", "link"]
)
def test_what_is_no_file_beside_the_base_is_not_passed_over(
    make: Callable[[Path], None], checkpoints: Checkpoints, command: Command
) -> None:
    Path("base").mkdir()
    shutil.copy(checkpoints.base_path, "base/model.safetensors")
    make(Path("base/preprocessor_config.json"))
    result = command("merge", "--base", "base", "--expert", "fs.safetensors", "--out", "out")
    assert result.code in (1, 2)
    assert "preprocessor_config.json: " in result.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "change",
    [
        "a=2001-13-45",
        "a=" + "[" * 3000,
        "a=" + "9" * 5000,
        "a=[&x 1, *x]",
        "a={b: 1, b: 2}",
        "a=!!python/name:os.system",
    ],
)
def test_what_is_set_is_a_value_or_refused_in_one_sentence(
    change: str, checkpoints: Checkpoints, command: Command
) -> None:
    Path("recipe.yaml").write_text("base_model: base.safetensors\nmodels: [{model: fs.safetensors}]\n")
    result = command("merge", "recipe.yaml", "--set", change, "--out", "out")
    assert result.code == 2
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1


def test_yaml_is_values_and_comes_back() -> None:
    hidden = "a\u202eb\x1b[31m\nc: d"
    for value in ({"k": hidden, "x\udce9": ["é", "`" * 3, " - x", "2001-02-03", "1e3", "null", "~", "", 1.5, None]},):
        text = plain_yaml.dump(value)
        assert all(c == "\n" or c.isprintable() for c in text)
        assert text.count("\n") == 12
        assert plain_yaml.load(text.encode(), "x") == value
    for text, sentence in (
        ("[" * 33 + "]" * 33, "x: not valid YAML in line 1: nested more than 32 deep"),
        ("a: &b 1\nc: *b", "x: not valid YAML in line 2: aliases (*name) are not used in recipes"),
        ("a: 1\na: 2", "x: not valid YAML in line 2: the key 'a' is given twice"),
    ):
        with pytest.raises(BadFile) as caught:
            plain_yaml.load(text, "x")
        assert str(caught.value) == sentence
