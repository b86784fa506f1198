"""Nothing that a stranger wrote moves the cursor, turns text, begins a line, or is markup, wherever it is shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from r2m.templating import markdown_text

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
EVIL = "a\x1b[2J\u202e\nError: all is well\x07"


def clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n")) and not re.search("^Error: all is well", text, re.M)


@pytest.fixture
def odd(checkpoints: Checkpoints) -> list[str]:
    Path(EVIL).mkdir()
    for name in ("base", "fs", "fr"):
        shutil.copy(f"{name}.safetensors", Path(EVIL, name))
    return ["--base", f"{EVIL}/base", "--expert", f"{EVIL}={EVIL}/fs", "--expert", f"{EVIL}/fr"]


def test_what_a_merge_says(odd: list[str], command: Command) -> None:
    result = command("merge", *odd, "--out", f"{EVIL}/out")
    assert result.code == 0
    for text in (result.out, result.err):
        assert clean(text)
    for name in ("README.md", "r2m_config.yaml"):
        assert clean(Path(EVIL, "out", name).read_text())
    assert json.loads(Path(EVIL, "out/r2m_report.json").read_text())["specialists"] == {EVIL: 1, "fr": 1}
    assert yaml.safe_load(Path(EVIL, "out/r2m_config.yaml").read_text())["models"][0]["name"] == EVIL
    for words in (
        ("plan", *odd, "--out", "p"),
        ("inspect", f"{EVIL}/base", f"{EVIL}/fs", "--norms"),
        ("init", f"{EVIL}/base", f"{EVIL}/fs", "--to", "recipe.yaml"),
        ("convert", f"{EVIL}/fs", f"{EVIL}/fs.pth"),
        ("card", f"{EVIL}/out"),
        ("remove", f"{EVIL}/out", "--expert", "fr"),
    ):
        result = command(*words)
        assert (result.code, clean(result.out), clean(result.err)) == (0, True, True), words
    assert clean(Path("recipe.yaml").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "--base", EVIL, "--expert", "fs.safetensors", "--out", "o"),
        ("merge", "--base", "base.safetensors", "--expert", EVIL, "--out", "o"),
        ("merge", EVIL, "--out", "o"),
        ("merge", "--method", EVIL),
        ("merge", f"--{EVIL}"),
        (EVIL,),
        ("merge", "--base", "base.safetensors", "--expert", "fs.safetensors", "--rename", EVIL, "--out", "o"),
        (
            "merge",
            "--base",
            "base.safetensors",
            "--expert",
            "fs.safetensors",
            "--rename",
            f"block={EVIL}",
            "--out",
            "o",
        ),
        ("merge", "--base", "base.safetensors", "--expert", "fs.safetensors", "--head", EVIL, "--out", "o"),
        ("merge", "--base", "base.safetensors", "--expert", "fs.safetensors", "--key", EVIL, "--out", "o"),
        ("inspect", EVIL),
        ("init", EVIL, EVIL),
        ("convert", EVIL, EVIL),
        ("add", EVIL, "--expert", EVIL),
        ("card", EVIL),
        ("sweep", EVIL, "--to", EVIL, "--rank", EVIL),
    ],
)
def test_what_is_refused(words: tuple[str, ...], checkpoints: Checkpoints, command: Command) -> None:
    result = command(*words)
    assert clean(result.out)
    assert clean(result.err)


@pytest.mark.parametrize(
    "licence", ["<script>alert(1)</script>", "[mit](javascript:x)", "mit\n# Heading", "mit | x", "`", "a b", "m" * 100]
)
def test_a_licence_of_an_input_is_a_word(licence: str, checkpoints: Checkpoints, command: Command) -> None:
    Path("expert").mkdir()
    shutil.copy("fs.safetensors", "expert/model.safetensors")
    Path("expert/README.md").write_text("---\n" + yaml.safe_dump({"license": licence}) + "---\n")
    assert command("merge", "--base", checkpoints.base_path, "--expert", "expert", "--out", "out").code == 0
    text = Path("out/README.md").read_text()
    assert f"| {licence}" not in text
    assert "# Heading" not in text
    assert "| unknown |" in text
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---"))["license"] == "unknown"


def test_markdown_shows_a_text_as_it_is() -> None:
    assert markdown_text("<b>[x](y)|`*\\") == r"\<b\>\[x\](y)\|\`\*\\"
    assert markdown_text("train_on_fs\n# a") == r"train_on_fs\\n# a"
