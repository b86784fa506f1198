"""``r2m plan`` and ``merge --dry-run`` say what a merge will do; here it is done, and compared."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from r2m import machine
from r2m.forecast import Forecast
from r2m.merge import merge_files, plan_merge
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from safetensors.torch import save_file

from r2m_kernels import MergeConfig

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

EXPERTS = {"a": "a.safetensors", "b": "b.safetensors"}
METHODS = {
    "r2m": MergeConfig.r2m(),
    "rows": MergeConfig.r2m(rank=1.0, row_power=3.0),
    "ties": MergeConfig.ties(),
    "weight_average": MergeConfig.weight_average(),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tall": (2000, 600),
        "wide": (500, 1500),
        "square": (700, 700),
        "vector": (300_001,),
        "bn.running_mean": (9,),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["ids"] = torch.arange(1000)
    save_file(base, "base.safetensors")
    for path in EXPERTS.values():
        noise = {key: torch.randn(value.shape, generator=generator) for key, value in base.items()}
        expert = {k: v + 0.1 * noise[k] if v.is_floating_point() else v for k, v in base.items()}
        save_file(expert, path)
    return tmp_path


def recipe(config: MergeConfig) -> Recipe:
    return Recipe("base.safetensors", Expert.each(EXPERTS), config)


def planned(config: MergeConfig, *, processes: int = 1, machines: int = 1, **options: Any) -> Forecast:
    return plan_merge(recipe(config), "out", Options(**options), processes=processes, machines=machines)[0]


def bytes_read(report: dict[str, Any]) -> int:
    return sum(step["bytes_read"] for step in report["steps"])


@pytest.mark.parametrize("budget", ["1MiB", "10MiB", "1GiB"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_written_and_spilled_is_what_was_said(method: str, budget: str) -> None:
    found = planned(METHODS[method], memory_budget=budget, max_shard_size="6MB")
    report = merge_files(recipe(METHODS[method]), "out", Options(memory_budget=budget, max_shard_size="6MB"))
    assert found.read == bytes_read(report)
    tensors = [path for path in Path("out").iterdir() if path.suffix == ".safetensors"]
    assert (found.output, found.files) == (sum(path.stat().st_size for path in tensors), len(tensors))
    if budget == "1GiB":
        # The experts' integers are not read, and their statistics twice.
        assert found.read == found.inputs - 2 * 8000 + 2 * 36
        assert found.enough
        assert (found.in_parts, found.shares[0].spill) == (0, 0)
    if budget == "1MiB":
        assert found.in_parts > 0
        assert (found.shares[0].spill > 0) == (method == "r2m")
        assert found.enough == (method != "r2m")


def test_what_a_descent_takes_beside_is_counted() -> None:
    flat, descent = (planned(config, memory_budget="1MiB") for config in (MergeConfig.iso_c(), MergeConfig.swudi()))
    # In float64 of "tall": two experts' task vectors twice and five matrices more, and six of its columns' size.
    beside = 8 * (9 * 2000 * 600 + 6 * 600**2)
    # And for equal singular values three of its size, and two of its columns'.
    of_flat = 8 * (3 * 2000 * 600 + 2 * 600**2)
    assert descent.shares[0].memory - flat.shares[0].memory == beside - of_flat


def test_processes_share_what_one_has() -> None:
    one = planned(METHODS["r2m"], memory_budget="1MiB")
    for count in (2, 3):
        several = planned(METHODS["r2m"], memory_budget="1MiB", processes=count)
        assert len(several.shares) == count
        assert several.read == one.read
        assert max(share.read for share in several.shares) < one.read
    # Nobody has less than nothing to do, however many they are.
    many = planned(METHODS["r2m"], memory_budget="1MiB", processes=64)
    assert sum(share.read > 0 for share in many.shares) == 6


def test_the_command_shows_it_and_does_nothing(command: Callable[..., Result]) -> None:
    words = ["--base", "base.safetensors", "--expert", "a.safetensors", "--expert", "b.safetensors", "--out", "x/out"]
    before = sorted(os.listdir())
    for form in (["plan", *words], ["merge", *words, "--dry-run"]):
        result = command(*form, "--memory-budget", "1GiB")
        assert (result.code, result.err) == (0, "")
        assert "inputs   3 checkpoints, 6 tensors, 32.9 MB" in result.out
        assert "reads    32.9 MB, everything once" in result.out
        assert "writes   11 MB in 1 file to x/out" in result.out
        assert re.search(r"time     about [0-9.]+ s, of which [0-9.]+ s to start\n", result.out)
    assert sorted(os.listdir()) == before


def test_the_list_is_the_work_that_is_done(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    from r2m_kernels._stream import run

    done: dict[str, list[tuple[str, int]]] = {}
    made = run.work_list

    def noted(over: Any, *rest: Any) -> Any:
        works = made(over, *rest)
        done[over.name] = [(work.tensors[0].name, len(work.parts)) for work in works]
        return works

    monkeypatch.setattr(run, "work_list", noted)
    words = ["--base", "base.safetensors", "--expert", "a.safetensors", "--expert", "b.safetensors", "--out", "out"]
    words += ["--memory-budget", "10MiB"]
    listed = command("plan", *words, "--list").out
    shown: dict[str, list[tuple[str, int]]] = {}
    for line in listed.splitlines():
        if heading := re.fullmatch(r"(.+): \d+ pieces? of work", line):
            works = shown[heading[1]] = []
        elif piece := re.fullmatch(
            r"  (\S+) \[[\d, ]+\], \w+, (?:in (\d+) parts|beside others|on all threads|from storage)", line
        ):
            works.append((piece[1], int(piece[2] or 0)))
    assert command("merge", *words, "--quiet").code == 0
    assert list(shown) == ["task Gram", "truncation", "combination"]
    assert shown == done
    assert any(parts for _, parts in shown["combination"])
    assert not any(parts for _, parts in shown["truncation"])


def test_what_does_not_suffice_is_said_with_code_1(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--base", "base.safetensors", "--expert", "a.safetensors", "--out", "out"]
    result = command("plan", *words, "--memory-budget", "1MiB")
    assert result.code == 1
    assert "over the budget: 'square' and 2 more need more at once; memory counts it" in result.out
    monkeypatch.setattr("r2m.machine.free_disk", lambda directory: 1000)
    result = command("plan", *words)
    assert result.code == 1
    assert "too little disk: 11 MB needed, 1 kB free" in result.out


def test_what_merge_refuses_plan_refuses(command: Callable[..., Result], checkpoints: Checkpoints) -> None:
    arguments = [*checkpoints.arguments, "--expert", "odd=nowhere.safetensors", "--out", "out"]
    sentences = {command(*form).err for form in (["plan", *arguments], ["merge", *arguments])}
    assert sentences == {"Error: expert 'odd' (nowhere.safetensors): no such file or directory\n"}
    Path("taken").mkdir()
    result = command("plan", *checkpoints.arguments, "--out", "taken")
    assert (result.code, result.err[:28]) == (2, "Error: out (taken): exists a")
    result = command("plan", *checkpoints.arguments, "--out", "out", "--memory-budget", "lots")
    assert result.err == "Error: memory_budget: expected a positive size such as 4GiB or 500MB, got 'lots'\n"


def test_the_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from r2m import machine

    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text(f"{2**30}\n")
    (group / "memory.current").write_text(f"{2**29}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {2**20}\n")
    monkeypatch.setattr(machine, "_CGROUP", group)
    assert machine.free_memory() == 2**30 - 2**29 + 2**20
    (group / "memory.max").write_text("max\n")
    assert machine.free_memory() > 2**30


def test_the_default_budget_is_shared_by_the_processes_of_a_machine(start: Callable[..., Any]) -> None:
    code = "from r2m import job, machine; machine.free_memory = lambda: 1000 * 2**20\n"
    code += "from r2m.recipe import Expert, Recipe\n"
    code += "print(job.open_job(Recipe('base.safetensors', {'a': Expert('a.safetensors')})).budget)"
    for processes in (1, 4):
        out, _ = start(script=code, environment={"LOCAL_WORLD_SIZE": str(processes)}).communicate(timeout=60)
        assert int(out) == 600 * 2**20 // processes


def test_a_matrix_that_leaves_no_room_for_another_has_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from r2m_kernels import merge
    from r2m_kernels._stream import run

    sizes = {"large": 512, "small": 128}
    state = {f"{name}.{i}": torch.zeros(size, size) for name, size in sizes.items() for i in range(3)}
    generator = torch.Generator().manual_seed(0)
    experts = [{name: torch.randn(one.shape, generator=generator) for name, one in state.items()} for _ in range(2)]
    shared: dict[str, dict[str, bool]] = {}
    made = run.work_list

    def noted(over: Any, *rest: Any) -> Any:
        works = made(over, *rest)
        shared[over.name] = {work.tensors[0].name: work.shared for work in works}
        return works

    monkeypatch.setattr(run, "work_list", noted)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge(state, experts, MergeConfig.r2m(svd="exact"), memory_budget=2**26)
        assert shared["truncation"] == {name: name.startswith("small") for name in state}
        # But while another thread has enough to do on smaller ones, it works beside them.
        few, more = {"large.0": state["large.0"]}, {f"small.{i}": state["small.0"].clone() for i in range(24)}
        some = [{name: one[name if name in few else "small.0"].clone() for name in few | more} for one in experts]
        beside = merge(few | more, some, MergeConfig.r2m(svd="exact"), memory_budget="90MiB")
        assert shared["truncation"] == dict.fromkeys(few | more, True)
        assert all(torch.equal(one, beside[name]) for name, one in merge(few | more, some, svd="exact").items())
        merge(state, experts, MergeConfig.r2m(svd="exact"), memory_budget=2**28)
        assert shared["truncation"] == dict.fromkeys(state, True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("budget", "least"), [(2**26, 2**16), (2**29, 2**22)])
def test_small_budgets_alone_have_small_buffers_given_back(
    budget: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    library = SimpleNamespace(mallopt=lambda _, value: told.append(value), malloc_trim=lambda _: None)
    monkeypatch.setattr("ctypes.CDLL", lambda _: library)
    machine.return_buffers(budget)
    assert told == [least, max(least, 2**20)]
