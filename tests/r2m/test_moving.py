"""A project that is moved goes on: what lies in it is found by relative paths, and what does not is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
OUTPUT = "merged/model.safetensors"


@pytest.fixture
def outside(checkpoints: Checkpoints, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose experts lie elsewhere; the current directory is in it."""
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(checkpoints.base_path, tmp_path / "project")
    for path in checkpoints.paths.values():
        shutil.move(path, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "project")
    experts = [f"{name}=../elsewhere/{path}" for name, path in checkpoints.paths.items()]
    words = ["--base", checkpoints.base_path, *(word for one in experts for word in ("--expert", one))]
    assert command("merge", *words, "--out", "merged").code == 0
    return tmp_path


def bytes_of_the_gram() -> int:
    steps = json.loads(Path("merged/r2m_report.json").read_text())["steps"]
    return int(next(step["bytes_read"] for step in steps if step["step"] == "task Gram"))


def test_a_moved_project_goes_on(
    checkpoints: Checkpoints, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [word for name, path in checkpoints.paths.items() for word in ("--expert", f"{name}={path}")]
    arguments = ["--base", checkpoints.base_path, *arguments]
    Path("project").mkdir()
    for path in (checkpoints.base_path, *checkpoints.paths.values()):
        shutil.move(path, "project")
    monkeypatch.chdir("project")
    assert command("merge", *arguments, "--out", "merged").code == 0
    whole = Path(OUTPUT).read_bytes()
    # Nothing that is published says where it was made.
    texts = [path for path in Path("merged").iterdir() if path.suffix != ".safetensors"]
    assert len(texts) >= 4
    assert not [path.name for path in texts if str(tmp_path) in path.read_text()]
    monkeypatch.chdir(tmp_path)
    shutil.move("project", "other")
    monkeypatch.chdir("other")
    assert command("relink", "merged").code == 0
    assert command("remove", "merged", "--expert", "efs").code == 0
    assert bytes_of_the_gram() == 0  # the same files: nothing is looked for again
    assert command("add", "merged", "--expert", f"efs={checkpoints.paths['efs']}").code == 0
    assert Path(OUTPUT).read_bytes() == whole
    assert command("merge", "merged/r2m_config.yaml", "--out", "again").code == 0
    assert Path("again/model.safetensors").read_bytes() == whole


def test_inputs_that_are_elsewhere_by_now_are_told_and_linked_again(outside: Path, command: Command) -> None:
    whole = Path(OUTPUT).read_bytes()
    gone = outside / "elsewhere"
    gone.rename(outside / "archive")
    for words in (
        ["remove", "merged", "--expert", "efs"],
        ["sweep", "merged", "--rank", "0.5", "--to", "swept"],
        ["add", "merged", "--expert", "new=../archive/fs.safetensors"],
    ):
        result = command(*words)
        assert result.code == 2
        assert result.err.startswith(f"Error: merged: expert 'fs' is not at {gone}/fs.safetensors, and ")
        assert result.err.endswith("where it is now: r2m relink merged fs=PATH\n")
    result = command("relink", "merged")
    assert (result.code, result.out.splitlines()[0]) == (1, f"fs is not at {gone}/fs.safetensors")
    names = ("fs", "fr", "efs")
    result = command("relink", "merged", *(f"{name}=../archive/{name}.safetensors" for name in names))
    assert (result.code, result.err) == (0, "")
    assert command("relink", "merged").code == 0
    assert command("card", "merged").code == 0  # what relink wrote is known as ours
    assert command("remove", "merged", "--expert", "efs").code == 0
    assert bytes_of_the_gram() == 0
    assert command("add", "merged", "--expert", "efs=../archive/efs.safetensors").code == 0
    assert Path(OUTPUT).read_bytes() == whole


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        (
            ["fs=../archive/fr.safetensors"],
            "expert 'fs' (../archive/fr.safetensors): is not what was merged: the change of",
        ),
        (["base=../archive/fr.safetensors"], "base (../archive/fr.safetensors): is not what was merged: the change of"),
        (["gone=x"], "gone: expected one of base, fs, fr, efs"),
        (["fs"], "fs: expected NAME=PATH, where NAME is base or an expert's"),
        (["fs=nowhere"], "merged: expert 'fs' is not at nowhere; where it is now"),
    ],
)
def test_another_checkpoint_is_no_place(places: list[str], sentence: str, outside: Path, command: Command) -> None:
    shutil.copytree(outside / "elsewhere", outside / "archive")
    before = {path.name: path.read_bytes() for path in Path("merged").iterdir()}
    result = command("relink", "merged", *places)
    assert (result.code, result.err.startswith(f"Error: {sentence}")) == (2, True), result.err
    assert {path.name: path.read_bytes() for path in Path("merged").iterdir()} == before


def test_a_recipe_that_somebody_has_changed_is_not_written_anew(outside: Path, command: Command) -> None:
    shutil.copytree(outside / "elsewhere", outside / "archive")
    recipe = Path("merged/r2m_config.yaml")
    recipe.write_text(f"# why fs counts twice\n{recipe.read_text()}")
    before = {path.name: path.read_bytes() for path in Path("merged").iterdir()}
    names = ("fs", "fr", "efs")
    result = command("relink", "merged", *(f"{name}=../archive/{name}.safetensors" for name in names))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "merged/r2m_config.yaml: was changed since a merge wrote it, and would be written anew" in result.err
    assert {path.name: path.read_bytes() for path in Path("merged").iterdir()} == before
