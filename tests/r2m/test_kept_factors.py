"""``OUT.factors``: a merge that goes on truncates new experts alone; its bytes are those of a merge from nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from r2m import kept_factors
from r2m.merge import merge_files
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from safetensors.torch import load_file, save_file

from r2m_kernels import MergeConfig, truncation
from r2m_kernels.streaming import Factors

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
OUTPUT, FACTORS = "out/model.safetensors", Path("out.factors")
STAR = ("--method", "star", "--keep-factors")
OTHERS = ("mono_soup", "r2m --real-rank 0")


@pytest.fixture
def truncated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts each truncation was asked for."""
    counts: list[int] = []
    truncate = truncation.truncate_several

    def counted(several: Any, *arguments: Any) -> Any:
        counts.extend(len(inputs.experts) for inputs in several)
        return truncate(several, *arguments)

    monkeypatch.setattr(truncation, "truncate_several", counted)
    return counts


def fourth(checkpoints: Checkpoints) -> dict[str, str]:
    """All experts, one more among them."""
    changed = {
        name: one + 0.2 * torch.randn(one.shape, generator=torch.Generator().manual_seed(9))
        if one.is_floating_point()
        else one
        for name, one in checkpoints.base.items()
    }
    save_file(changed, "new.safetensors")
    return {**checkpoints.paths, "new": "new.safetensors"}


def words(experts: dict[str, str]) -> list[str]:
    return [word for name, path in experts.items() for word in ("--expert", f"{name}={path}")]


def told(lines: str, taken: int, made: int, not_kept: int = 0) -> bool:
    """Whether the command's lines and the report say how many truncations were taken and made."""
    counts = {"taken": taken, "made": made, "not_kept": not_kept}
    more = f", {not_kept} not kept (too large for the budget, or too steep)" * bool(not_kept)
    line = f"Truncations of single experts: {taken} taken from out.factors, {made} made and kept{more}"
    return line in lines.splitlines() and json.loads(Path("out/r2m_report.json").read_text())["factors"] == counts


def scratch(experts: dict[str, str], config: MergeConfig | None = None) -> bytes:
    recipe = Recipe("base.safetensors", Expert.each(experts), config or MergeConfig.star())
    merge_files(recipe, "scratch", Options(overwrite=True))
    return Path("scratch/model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["star", *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)])
def test_only_a_new_expert_is_truncated(
    method: str, checkpoints: Checkpoints, command: Command, truncated: list[int]
) -> None:
    everyone = fourth(checkpoints)
    config = {"star": MergeConfig.star(), "mono_soup": MergeConfig.mono_soup()}
    given = ["--method", *method.split(), "--keep-factors", "--out", "out"]
    merged = command("merge", *checkpoints.arguments, *given)
    assert merged.code == 0
    each = len(truncated)
    assert (set(truncated), len(os.listdir(FACTORS))) == ({3}, 3 * each)
    assert told(merged.out, taken=0, made=3 * each)
    for way, expected, counts in (("add", {1}, (3 * each, each)), ("remove", set(), (3 * each, 0))):
        truncated.clear()
        what = ["--expert", f"new={everyone['new']}"] if way == "add" else ["--expert", "fs"]
        done = command(way, "out", *what)
        assert done.code == 0
        assert set(truncated) == expected
        assert told(done.out, *counts)
        left = {name: path for name, path in everyone.items() if way == "add" or name != "fs"}
        found = Path(OUTPUT).read_bytes()
        assert found == scratch(left, config.get(method, MergeConfig.r2m(real_rank=0)))
    keys = {name.partition("-")[0] for name in os.listdir(FACTORS)}
    assert len(keys) == 3  # of the one that went nothing is kept
    assert sorted(os.listdir()) == sorted(["base.safetensors", "out", "out.factors", "scratch", *everyone.values()])


@pytest.mark.slow
def test_added_one_by_one_in_every_order(checkpoints: Checkpoints, command: Command) -> None:
    for order in itertools.permutations(checkpoints.paths.items()):
        first, *others = order
        given = ["--base", "base.safetensors", *words(dict([first])), *STAR, "--out", "out", "--overwrite"]
        assert command("merge", *given).code == 0
        for name, path in others:
            assert command("add", "out", "--expert", f"{name}={path}", "--quiet").code == 0
        assert Path(OUTPUT).read_bytes() == scratch(dict(order))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def turned_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def something_else(path: Path) -> None:
    path.write_bytes(b"no safetensors file at all")


def without_about(path: Path) -> None:
    save_file(load_file(path), path)


def a_list(path: Path) -> None:
    save_file(load_file(path), path, {"about": "[1]"})


@pytest.mark.parametrize(
    "harm",
    [
        turned_bit,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (cut_off, something_else, without_about, a_list)),
    ],
)
def test_a_file_that_was_changed_is_told_and_made_again(
    harm: Callable[[Path], None], checkpoints: Checkpoints, command: Command
) -> None:
    everyone = fourth(checkpoints)
    assert command("merge", *checkpoints.arguments, *STAR, "--out", "out").code == 0
    path = sorted(FACTORS.iterdir())[0]
    before = path.read_bytes()
    harm(path)
    added = command("add", "out", "--expert", "new=new.safetensors")
    assert added.code == 0
    assert re.search(f"{path.name}: is not as a merge kept it .*; it is made again", added.err), added.err
    assert Path(OUTPUT).read_bytes() == scratch(everyone)
    assert path.read_bytes() == before


def test_what_is_of_another_input_or_option_is_not_taken(
    checkpoints: Checkpoints, command: Command, truncated: list[int]
) -> None:
    assert command("merge", *checkpoints.arguments, *STAR, "--out", "out").code == 0
    save_file({name: one * 2 for name, one in checkpoints.experts["fr"].items()}, "fr.safetensors")
    truncated.clear()
    assert command("remove", "out", "--expert", "fs", "--quiet").code == 0
    assert set(truncated) == {1}  # the file that is another one now
    left = {name: path for name, path in checkpoints.paths.items() if name != "fs"}
    assert Path(OUTPUT).read_bytes() == scratch(left)
    truncated.clear()
    given = [*checkpoints.arguments, *STAR, "--rank", "0.6", "--out", "out", "--overwrite"]
    assert command("merge", *given).code == 0
    assert set(truncated) == {3}
    assert Path(OUTPUT).read_bytes() == scratch(checkpoints.paths, MergeConfig.star(0.6))
    # Output types, and who is there under which name, decide nothing of it.
    truncated.clear()
    again = words({"x": "efs.safetensors", "y": "fs.safetensors"})
    given = ["--base", "base.safetensors", *again, "--method", "star", "--rank", "0.6", "--dtype", "bfloat16"]
    assert command("merge", *given, "--keep-factors", "--out", "out", "--overwrite").code == 0
    assert not truncated


@pytest.mark.slow
def test_what_is_of_another_base_or_version_is_not_taken(
    checkpoints: Checkpoints, command: Command, truncated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["merge", *checkpoints.arguments, *STAR, "--out", "out", "--overwrite"]
    assert command(*given).code == 0
    count, before = len(truncated), set(os.listdir(FACTORS))
    for what in ("base", "version"):
        if what == "base":
            save_file({name: one * 2 for name, one in checkpoints.base.items()}, "base.safetensors")
        else:
            monkeypatch.setattr("r2m_kernels.__version__", "0.0.1")
        truncated.clear()
        assert told(command(*given).out, taken=0, made=3 * count)
        assert truncated == [3] * count
        assert not before & set(os.listdir(FACTORS))
        before = set(os.listdir(FACTORS))


def test_a_run_that_was_cut_off_takes_what_it_kept(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["merge", *checkpoints.arguments, *STAR, "--out", "out"]
    put, left = kept_factors.FactorFiles.put, iter(range(5))

    def full(self: kept_factors.FactorFiles, tensor: str, expert: str, factors: Factors) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"out.factors/{tensor}")
        put(self, tensor, expert, factors)

    monkeypatch.setattr(kept_factors.FactorFiles, "put", full)
    cut = command(*given)
    assert (cut.code, "Error: out.factors/" in cut.err, "no space left on device" in cut.err) == (1, True, True)
    monkeypatch.setattr(kept_factors.FactorFiles, "put", put)
    resumed = command(*given, "--resume")
    assert told(resumed.out, taken=5, made=len(os.listdir(FACTORS)) - 5), resumed
    assert Path(OUTPUT).read_bytes() == scratch(checkpoints.paths)


def test_it_may_go_and_is_kept_when_asked_for_alone(
    checkpoints: Checkpoints, command: Command, truncated: list[int]
) -> None:
    everyone = fourth(checkpoints)
    assert command("merge", *checkpoints.arguments, *STAR, "--out", "out").code == 0
    Path(FACTORS, "notes.txt").write_text("mine")
    Path(FACTORS, ".r2m-0123456789abcdef.partial").mkdir()
    assert command("remove", "out", "--expert", "fs", "--quiet").code == 0
    assert "notes.txt" in os.listdir(FACTORS)
    assert ".r2m-0123456789abcdef.partial" not in os.listdir(FACTORS)
    shutil.rmtree(FACTORS)
    truncated.clear()
    assert command("add", "out", "--expert", "new=new.safetensors", "--quiet").code == 0
    assert set(truncated) == {3}
    assert not FACTORS.exists()
    assert command("add", "out", "--expert", "fs=fs.safetensors", "--keep-factors", "--quiet").code == 0
    assert len(os.listdir(FACTORS)) % 4 == 0 < len(os.listdir(FACTORS))
    order = {name: everyone[name] for name in ("fr", "efs", "new", "fs")}
    assert Path(OUTPUT).read_bytes() == scratch(order)


def test_a_project_that_moves_takes_it_along(
    checkpoints: Checkpoints, command: Command, truncated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fourth(checkpoints)
    assert command("merge", *checkpoints.arguments, *STAR, "--out", "out").code == 0
    here = Path.cwd()
    moved = here.rename(here.with_name("elsewhere"))
    monkeypatch.chdir(moved)
    truncated.clear()
    assert command("add", "out", "--expert", "new=new.safetensors", "--quiet").code == 0
    assert set(truncated) == {1}


REFUSED = "Error: keep_factors: expected a method and a backend that truncate each expert by itself; "


def test_what_cannot_be_kept_is_refused_and_what_can_is_planned(checkpoints: Checkpoints, command: Command) -> None:
    cases = {
        "--method r2m": "its residuals all change with every expert that comes",
        "--method tsv_m": "its ranks, and its bases, change with the number of experts",
        "--method star --backend torch": "only the native backend makes of an expert the same bits",
    }
    for given, clause in cases.items():
        for way in ("merge", "plan"):
            result = command(way, *checkpoints.arguments, *given.split(), "--keep-factors", "--out", "out")
            assert (result.code, result.err.startswith(REFUSED + clause)) == (2, True), result.err
    assert not FACTORS.exists()
    planned = command("plan", *checkpoints.arguments, *STAR, "--out", "out").out
    most = 3 * 4 * (17 * (24 + 17) + 6 * (6 + 36))
    assert f"{most / 1000:.1f} kB at most for what is kept of each expert" in planned, planned
    assert command("merge", *checkpoints.arguments, *STAR, "--out", "out").code == 0
    assert sum(path.stat().st_size for path in FACTORS.iterdir()) < most + 1000 * 6
    shutil.rmtree(FACTORS)
    FACTORS.write_text("a file")
    result = command("remove", "out", "--expert", "fs", "--keep-factors")
    assert (result.code, "expected a directory of truncations that merges keep" in result.err) == (2, True)
    assert FACTORS.read_text() == "a file"


def test_strides_come_back_as_they_were(tmp_path: Path) -> None:
    files = kept_factors.FactorFiles(tmp_path / "f", {"a": 1})
    for turned in (False, True):
        left, right = torch.rand(1, 7, 3), torch.rand(1, 3, 5)
        if turned:
            left, right = left.mT.contiguous().mT, right.mT.contiguous().mT
        files.put("w", "a", Factors(left, right, False, "left", torch.tensor([float("nan")]).double(), "shifted"))
        found = files.get("w", "a")
        assert found is not None
        assert (found.left.stride()[1:], found.right.stride()[1:]) == (left.stride()[1:], right.stride()[1:])
        assert torch.equal(found.left, left)
        assert torch.equal(found.right, right)
        assert (found.ordered, found.basis, found.method) == (False, "left", "shifted")
    assert files.get("v", "a") is None
    assert json.dumps(sorted(os.listdir(tmp_path / "f")))
