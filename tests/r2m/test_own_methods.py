"""Methods that other packages bring: docs/methods.md's example installed and used, and packages that are broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from r2m.sweep import SWEEP_FILE

from r2m_kernels import InvalidInput, MergeConfig, plugins
from r2m_kernels.config import METHODS, OFFERED, make_config

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

    Command = Callable[..., Result]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
GENTLE = MergeConfig.r2m(rank=0.1, eta=0.3)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package as a build leaves it: modules beside metadata."""

    def install(name: str, points: dict[str, str], **modules: str) -> None:
        metadata = tmp_path / "site" / f"{name.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {value}" for key, value in points.items()]
        (metadata / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines, ""]))
        for module, text in modules.items():
            (tmp_path / "site" / f"{module}.py").write_text(text)
        plugins.offered.cache_clear()

    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins.offered.cache_clear()
    yield install
    monkeypatch.undo()
    plugins.offered.cache_clear()
    for module in set(sys.modules) - before:
        if module.startswith("mine_"):
            del sys.modules[module]


def files_of_the_page() -> dict[str, str]:
    return dict(re.findall(r"```\w+ (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL))


def test_a_method_of_the_page_is_known_everywhere(
    installed: Callable[..., None], checkpoints: Checkpoints, command: Command
) -> None:
    files = files_of_the_page()
    installed("gentle-merge", {"gentle": "mine_gentle:gentle"}, mine_gentle=files["gentle_merge.py"])
    assert command("merge", *checkpoints.arguments, "--method", "gentle", "--eta", "0.3", "--out", "a").code == 0
    report = json.loads(Path("a/r2m_report.json").read_text())
    assert (report["method"], report["config"]) == ("gentle", GENTLE.to_dict())
    assert make_config("gentle", {"eta": 0.3}) == GENTLE
    assert make_config("gentle", {}) == MergeConfig.r2m(rank=0.1, eta=0.5)
    used = "--average, --eta, --exclude, --extra, --keep, --rank, --seed"
    with pytest.raises(InvalidInput, match=f"^--center: not used by the method 'gentle', which uses {used}$"):
        make_config("gentle", {"center": True})
    # A recipe, a starter, a sweep, the list.
    Path("r.yaml").write_text("base_model: base.safetensors\nmodels: [{model: fs.safetensors}]\nmerge_method: gentle\n")
    assert command("merge", "r.yaml", "--set", "parameters.eta=0.3", "--out", "b").code == 0
    assert json.loads(Path("b/r2m_report.json").read_text())["config"] == GENTLE.to_dict()
    assert command("init", "base.safetensors", "fs.safetensors").code == 0
    assert "#   gentle: R²M with weak residuals of low rank (our lab, 2026)" in Path("recipe.yaml").read_text()
    assert command("sweep", "a", "--to", "swept", "--method", "gentle:rank=0.2,ties").code == 0
    assert "method=gentle,rank=0.2" in os.listdir("swept")
    assert "gentle" in Path("swept", SWEEP_FILE).read_text()
    listed = command("methods").out
    assert "of the package gentle-merge" in listed
    entry = json.loads(command("methods", "--json").out)[-1]
    assert (entry["name"], entry["package"], entry["source"]) == ("gentle", "gentle-merge", "our lab, 2026")
    assert entry["options"]["eta"]["default"] == 0.5
    # The others are as they are without it.
    assert list(OFFERED) == [name for name in METHODS if name not in ("gentle", "r2m_truncated")]


def test_what_was_merged_is_read_where_the_package_is_gone(
    installed: Callable[..., None], checkpoints: Checkpoints, command: Command, tmp_path: Path
) -> None:
    installed("gentle-merge", {"gentle": "mine_gone:gentle"}, mine_gone=files_of_the_page()["gentle_merge.py"])
    assert command("merge", *checkpoints.arguments, "--method", "gentle", "--out", "a").code == 0
    for path in (tmp_path / "site").rglob("entry_points.txt"):
        path.unlink()
    plugins.offered.cache_clear()
    result = command("remove", "a", "--expert", "fs")
    assert result.code == 0
    note = "Note: merge_method: gentle is of a package that is not installed; the parameters say all that it decided"
    assert note in result.err.splitlines()
    assert json.loads(Path("a/r2m_report.json").read_text())["config"]["rank"] == 0.1
    # But who asks for it by name alone is told.
    result = command("merge", *checkpoints.arguments, "--method", "gentle", "--out", "b")
    assert (result.code, "'gentle' is not one of" in result.err) == (2, True)
    recipe = yaml.safe_load(Path("a/r2m_config.yaml").read_text()) | {"merge_method": "gen tle"}
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    assert "merge_method: expected one of 'r2m'" in command("merge", "r.yaml", "--out", "c").err


BROKEN = {
    "no_module": ("mine_missing:method", "cannot be used: ModuleNotFoundError: No module named 'mine_missing'"),
    "no_function": ("mine_broken:absent", "cannot be used: AttributeError: module 'mine_broken' has no attribute"),
    "a_number": ("mine_broken:number", "expected a function that returns a MergeConfig, got int"),
    "other_result": ("mine_broken:other", "expected a MergeConfig of it, got dict"),
    "raises": ("mine_broken:raises", "cannot be used: ZeroDivisionError: division by zero"),
    "leaves": ("mine_leaving:method", "cannot be used: SystemExit: 3"),
    "wrong_syntax": ("mine_syntax:method", "cannot be used: SyntaxError: "),
    "no_option": ("mine_broken:no_option", "its parameter 'push' is no option of the command"),
    "no_default": ("mine_broken:no_default", "its parameter 'rank' has no default"),
    "wrong_use": ("mine_broken:wrong_use", "it uses 'rnak', which is no option; did you mean 'rank'?"),
    "bad_value": ("mine_broken:bad_value", "eta: expected a finite number of at least 0, got -1"),
}
MODULE = """
from r2m_kernels import MergeConfig
from r2m_kernels.options import method
number = 3
def other(): return {}
def raises(): return 1 / 0
def no_option(push=1.0): return MergeConfig()
def no_default(rank): return MergeConfig(rank=rank)
@method("x", uses=("rnak",))
def wrong_use(): return MergeConfig()
def bad_value(eta=-1): return MergeConfig(eta=eta)
"""


def test_broken_packages_are_a_sentence_each_and_in_nobody_s_way(
    installed: Callable[..., None], checkpoints: Checkpoints, command: Command
) -> None:
    installed(
        "broken",
        {name: place for name, (place, _) in BROKEN.items()}
        | {"ties": "mine_broken:other", "a b": "mine_broken:other"},
        mine_broken=MODULE,
        mine_leaving="import sys; sys.exit(3)",
        mine_syntax="def method(:",
    )
    installed("twice-a", {"twice": "mine_broken:other"})
    installed("twice-b", {"twice": "mine_broken:other"})
    for name, (_, said) in BROKEN.items():
        result = command("merge", *checkpoints.arguments, "--method", name, "--out", "a")
        assert result.code == 2, name
        assert result.err.startswith(f"Error: method '{name}' of the package broken: {said}"), result.err
        assert len(result.err.splitlines()) == 1
    result = command("merge", *checkpoints.arguments, "--method", "twice", "--out", "a")
    what = "method 'twice' of the package twice-a: the package twice-b offers it too; expected one of them"
    assert result.err == f"Error: {what}\n"
    # Others do their work, and the list tells all that is wrong.
    assert command("merge", *checkpoints.arguments, "--method", "ties", "--out", "a", "--quiet").code == 0
    assert json.loads(Path("a/r2m_report.json").read_text())["config"] == make_config("ties", {}).to_dict()
    assert command("init", "base.safetensors", "fs.safetensors").code == 0
    result = command("methods")
    assert result.code == 0
    assert {*OFFERED} <= {*result.out.split()}
    wrong = [line for line in result.err.splitlines() if line.startswith("Warning: method ")]
    assert len(wrong) == len(BROKEN) + 3
    assert any("'ties' of the package broken: there is one of that name here" in line for line in wrong)
    assert any("'a b' of the package broken: expected a name of letters" in line for line in wrong)
    assert "Traceback" not in result.err


def test_metadata_that_cannot_be_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(**_: str) -> None:
        raise PermissionError

    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", unreadable)
    plugins.offered.cache_clear()
    assert METHODS.others == []
    monkeypatch.undo()
    plugins.offered.cache_clear()


@pytest.mark.slow
def test_the_page_s_package_can_be_built_and_used(tmp_path: Path, checkpoints: Checkpoints) -> None:
    for name, text in files_of_the_page().items():
        (tmp_path / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path / "target"), str(tmp_path)], check=True)
    where = os.pathsep.join(filter(None, [str(tmp_path / "target"), os.environ.get("PYTHONPATH")]))
    lines = PAGE.read_text().partition("$ pip install .\n")[2].partition("```")[0].splitlines()
    for line in lines:
        words = [sys.executable, "-m", *line.removeprefix("$ ").split()]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": where}
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "merged/r2m_report.json").read_text())["config"] == GENTLE.to_dict()
