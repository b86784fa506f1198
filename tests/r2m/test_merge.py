"""A merge of files: the same tensors as a merge of dicts, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.writer import SafetensorsSink
from r2m.merge import merge_files
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import r2m_kernels
from r2m_kernels import InvalidInput, MergeConfig, ProgressEvent

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Fingerprint = Callable[[Path], dict[str, tuple[str, int]]]
CONFIG = MergeConfig.r2m(rank=0.3)


def recipe(base: str, paths: dict[str, str], **more: Any) -> Recipe:
    return Recipe(base, Expert.each(paths), CONFIG, **more)


def merged(
    checkpoints: Checkpoints, out: str, *, progress: Callable[[ProgressEvent], None] | None = None, **options: Any
) -> dict[str, Any]:
    report: dict[str, Any] = merge_files(
        recipe(checkpoints.base_path, checkpoints.paths), out, Options(**options), progress=progress
    )
    return report


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_files_are_merged_as_dicts_are(checkpoints: Checkpoints, dtype: str | None) -> None:
    merge_files(recipe(checkpoints.base_path, checkpoints.paths, dtype=dtype), "out")
    found = load_file("out/model.safetensors")
    expected = r2m_kernels.merge(checkpoints.base, checkpoints.experts, CONFIG, dtype=torch.bfloat16 if dtype else None)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_equal_merges_give_equal_bytes(checkpoints: Checkpoints) -> None:
    merged(checkpoints, "first")
    # Other paths, other names, another order of the tensors in the files and of the inputs' folders.
    Path("elsewhere").mkdir()
    for path, tensors in [("base", checkpoints.base), *checkpoints.experts.items()]:
        renamed = {key: tensors[key].clone() for key in reversed(tensors)}
        save_file(renamed, f"elsewhere/{path}", metadata={"order": "other"})
    paths = {f"other {name}": f"elsewhere/{name}" for name in checkpoints.experts}
    merge_files(recipe("elsewhere/base", paths), "second")
    assert Path("first/model.safetensors").read_bytes() == Path("second/model.safetensors").read_bytes()


def test_only_the_shard_size_decides_the_layout(checkpoints: Checkpoints) -> None:
    merged(checkpoints, "out", max_shard_size=1000)
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == [
        "README.md",
        *[f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)],
        "model.safetensors.index.json",
        "r2m_config.yaml",
        "r2m_report.json",
        "r2m_state.json",
    ]
    merged(checkpoints, "single")
    shards, single = open_checkpoint("out", "out"), load_file("single/model.safetensors")
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in single.items())
    # A sharded checkpoint as base: the layout of the output does not follow it.
    merge_files(recipe("out", checkpoints.paths), "again")
    merge_files(recipe("single", checkpoints.paths), "and again")
    assert Path("again/model.safetensors").read_bytes() == Path("and again/model.safetensors").read_bytes()


def test_the_header_says_how_and_not_where_or_when(checkpoints: Checkpoints, tmp_path: Path) -> None:
    merged(checkpoints, "out")
    with safe_open("out/model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "r2m_kernels_version": r2m_kernels.__version__,
        "r2m_config": json.dumps(CONFIG.to_dict(), sort_keys=True),
    }


def test_recipe_report_and_copies(checkpoints: Checkpoints, tmp_path: Path) -> None:
    Path("folder").mkdir()
    Path(checkpoints.base_path).rename("folder/model.safetensors")
    Path("folder/config.json").write_text('{"model_type": "clip"}')
    Path("folder/preprocessor_config.json").write_text("{}")
    Path("folder/training_args.bin").write_text("not copied")
    report = merge_files(recipe("folder", checkpoints.paths, dtype="float16"), "out")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "r2m_config.yaml",
        "r2m_report.json",
        "r2m_state.json",
    ]
    assert Path("out/config.json").read_text() == '{"model_type": "clip"}'
    assert yaml.safe_load(Path("out/r2m_config.yaml").read_text()) == {
        "merge_method": "r2m",
        "base_model": "../folder",
        "models": [{"model": f"../{path}", "name": name} for name, path in checkpoints.paths.items()],
        "parameters": CONFIG.to_dict(),
        "dtype": "float16",
    }
    written = json.loads(Path("out/r2m_report.json").read_text())
    assert written == report
    assert set(report["core"]["coefficients"]) == set(checkpoints.paths)
    assert [step["step"] for step in report["steps"]] == ["task Gram", "truncation", "combination"]
    assert report["output"]["files"] == {
        path.name: path.stat().st_size
        for path in sorted(Path("out").iterdir())
        if path.name not in ("r2m_report.json", "README.md")
    }
    assert report["output"]["seconds"] > 0


def test_a_configuration_that_is_none_is_refused_before_any_work(
    checkpoints: Checkpoints, command: Callable[..., Result]
) -> None:
    Path("folder").mkdir()
    Path("base.safetensors").rename("folder/model.safetensors")
    with open("folder/config.json", "wb") as file:
        file.truncate(2**40)
    arguments = ["--base", "folder", "--expert", "fs.safetensors", "--out", "out"]
    for words in (("merge", *arguments), ("plan", *arguments)):
        result = command(*words)
        assert result.code == 2
        assert result.err.startswith("Error: base (folder): config.json: has 1099511627776 bytes, expected at most ")
    assert not Path("out").exists()
    Path("folder/config.json").unlink()
    os.mkfifo("folder/config.json")  # nobody waits for who would write to it
    for words in (("merge", *arguments), ("plan", *arguments)):
        result = command(*words)
        assert (result.code, result.err) == (2, "Error: base (folder): config.json: not a regular file\n")
    assert not Path("out").exists()


def test_the_report_is_json_without_nan(checkpoints: Checkpoints) -> None:
    # No task vector at all: every ratio of norms is undefined.
    report = merge_files(recipe(checkpoints.base_path, {"a": checkpoints.base_path}), "out")
    assert report["core"]["norm_ratio_to_mean"] is None
    assert "NaN" not in Path("out/r2m_report.json").read_text()
    assert torch.equal(load_file("out/model.safetensors")["block.weight"], checkpoints.base["block.weight"])


def test_inputs_are_never_changed(checkpoints: Checkpoints, tmp_path: Path, fingerprint: Fingerprint) -> None:
    before = fingerprint(tmp_path)
    merged(checkpoints, "out")
    merged(checkpoints, "out", overwrite=True)
    after = fingerprint(tmp_path)
    assert {path: after[path] for path in before} == before


def test_a_merge_is_not_merged_into_itself(checkpoints: Checkpoints) -> None:
    merged(checkpoints, "out")
    content = Path("out/model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match=r"^out \(out\): is or holds the input \./out, and inputs are never"):
        merge_files(recipe(checkpoints.base_path, {"again": "./out"}), "out", Options(overwrite=True))
    assert Path("out/model.safetensors").read_bytes() == content


def test_a_link_into_the_output_is_an_input_in_it(checkpoints: Checkpoints) -> None:
    merged(checkpoints, "out")
    Path("links").mkdir()
    Path("links/model.safetensors").symlink_to(Path("out/model.safetensors").resolve())
    content = Path("out/model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match=r"^out \(out\): is or holds the input links/model.safetensors"):
        merge_files(recipe("links", checkpoints.paths), "out", Options(overwrite=True))
    assert Path("out/model.safetensors").read_bytes() == content


def stop_at(step: str, error: BaseException) -> Callable[[ProgressEvent], None]:
    def progress(event: ProgressEvent) -> None:
        if event.step == step:
            raise error

    return progress


@pytest.mark.parametrize("step", ["task Gram", "truncation", "combination"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_merge_leaves_its_work_and_nothing_else(
    checkpoints: Checkpoints,
    tmp_path: Path,
    fingerprint: Fingerprint,
    step: str,
    error: BaseException,
    overwrite: bool,
) -> None:
    if overwrite:
        merged(checkpoints, "a/out")
    before = fingerprint(tmp_path)
    with pytest.raises(type(error)) as caught:
        merged(checkpoints, "a/out", overwrite=overwrite, progress=stop_at(step, error))
    assert caught.value.__notes__[-1] == "The work so far is kept in a/out.partial; --resume goes on from there."
    now = fingerprint(tmp_path)
    work = {name for name in now if name.startswith("a/out.partial/")}
    assert {name: now[name] for name in now.keys() - work} == before
    merged(checkpoints, "a/out", overwrite=overwrite, resume=True)
    merged(checkpoints, "b")
    assert Path("a/out/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert os.listdir("a") == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_where_the_input_is_to_blame(
    checkpoints: Checkpoints, tmp_path: Path, fingerprint: Fingerprint, overwrite: bool
) -> None:
    if overwrite:
        merged(checkpoints, "a/out")
    tensors = load_file(checkpoints.paths["fr"])
    tensors["block.bias"][3] = torch.nan
    save_file(tensors, checkpoints.paths["fr"])
    before = fingerprint(tmp_path)
    with pytest.raises(InvalidInput, match=r"tensor 'block.bias' holds NaN or Inf in 1 of 24 elements"):
        merged(checkpoints, "a/out", overwrite=overwrite)
    assert fingerprint(tmp_path) == before
    assert Path("a").exists() == overwrite


def test_a_full_disk_is_told_with_the_file(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    write_at = SafetensorsSink._write_at

    def full(sink: SafetensorsSink, name: str, view: memoryview, offset: int) -> None:
        if offset > 2000:
            raise OSError(28, "No space left on device", str(sink._directory / name))
        write_at(sink, name, view, offset)

    monkeypatch.setattr(SafetensorsSink, "_write_at", full)
    with pytest.raises(OSError, match="No space") as caught:
        merged(checkpoints, "a/out")
    assert caught.value.filename == "a/out/model.safetensors"
    assert not Path("a/out").exists()


def test_bad_options_are_refused_before_anything_is_read() -> None:
    with pytest.raises(InvalidInput, match=r"^max_shard_size: expected a positive size"):
        Options(max_shard_size="big")
    with pytest.raises(InvalidInput, match=r"^dtype: expected one of 'float32'"):
        recipe("nothing", {"a": "nothing"}, dtype="int8")
    with pytest.raises(InvalidInput, match=r"^base \(nothing\): no such file or directory$"):
        merge_files(recipe("nothing", {"a": "nothing"}), "out")


def test_a_path_that_is_no_utf8_does_not_lose_the_merge(checkpoints: Checkpoints) -> None:
    odd = os.fsdecode(b"bad\xff.safetensors")
    shutil.copy(checkpoints.paths["fs"], odd)
    report = merge_files(recipe(checkpoints.base_path, {odd: odd}), "out")
    assert list(report["core"]["coefficients"]) == [odd]
    assert json.loads(Path("out/r2m_report.json").read_text())["experts"] == [odd]
    assert yaml.safe_load(Path("out/r2m_config.yaml").read_text())["models"]
