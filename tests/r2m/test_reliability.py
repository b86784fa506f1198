"""Processes that are killed, run out of disk, meet each other or share the work: docs/reliability.md's promises."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import r2m
import torch
from forked import Child
from heavy import Numbers
from r2m.merge import merge_files, plan_merge
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from safetensors.torch import load_file, save_file

from r2m_kernels import InvalidInput, ProgressEvent
from r2m_kernels.config import make_config
from r2m_kernels.streaming import sources_digest

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
Start = Callable[..., Child]

METHODS = {
    "r2m": [],
    "r2m_truncated": ["--method", "r2m_truncated"],
    "ties": ["--method", "ties"],
    "weight_average": ["--method", "weight_average"],
}
EXPERTS = ["--expert", "a=a.safetensors", "--expert", "b=b.safetensors"]
BASE_ARGUMENTS = ["--base", "base.safetensors", *EXPERTS, "--quiet"]


def write_checkpoints(matrices: int = 12, side: int = 400) -> None:
    """Base and two experts in the current directory: enough tensors for several journal records."""
    generator = torch.Generator().manual_seed(0)
    base = {f"block{i}.weight": torch.randn(side, side + i, generator=generator) for i in range(matrices)}
    base |= {f"block{i}.bias": torch.randn(side, generator=generator) for i in range(matrices)}
    base["bn.running_var"] = torch.rand(side, generator=generator)
    base["steps"] = torch.tensor(7)
    save_file(base, "base.safetensors")
    for name in ("a", "b"):
        expert = {
            key: value + 0.05 * torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
            for key, value in base.items()
        }
        save_file(expert, f"{name}.safetensors")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_checkpoints()
    return tmp_path


def files(directory: str) -> dict[str, bytes]:
    """What must be the same after any interruption: all but the report, which holds times."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != "r2m_report.json"}


def run(start: Start, *arguments: str, **options: object) -> tuple[int, str]:
    with start("merge", *BASE_ARGUMENTS, *arguments, **options) as process:
        _, err = process.communicate(timeout=200)
    return process.returncode, err


def same_merge(start: Start, out: str, *arguments: str) -> None:
    """What ``out`` holds is what an undisturbed run gives, and nothing lies beside it."""
    assert run(start, "--out", "undisturbed", *arguments) == (0, "") or Path("undisturbed").is_dir()
    first, second = files(out), files("undisturbed")
    recipe = "r2m_config.yaml"
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name != recipe)
    assert not Path(f"{out}.partial").exists()


# In the child: slow steps, so that a signal finds the merge at work.
SLOW = """
import os, sys, threading, time
import r2m.journal, r2m.merge
from r2m.checkpoints.writer import SafetensorsSink
store = SafetensorsSink._store
def slowly(self, *arguments):
    time.sleep(0.02)
    store(self, *arguments)
SafetensorsSink._store = slowly
init = r2m.journal.FileJournal.__init__
def often(self, *arguments, **keywords):
    init(self, *arguments, **{**keywords, "seconds": 0.0})
r2m.journal.FileJournal.__init__ = often
from r2m.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def killed(start: Start, seconds: float, *arguments: str) -> int:
    """A merge that is killed after so long, or has ended before; its exit code."""
    with start("merge", *BASE_ARGUMENTS, *arguments, script=SLOW) as child:
        try:
            _, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            _, err = child.communicate()
    assert child.returncode in (0, -signal.SIGKILL), err
    return child.returncode


def kill_and_resume(start: Start, kills: int, seed: int) -> None:
    generator = random.Random(seed)
    assert run(start, "--out", "undisturbed") == (0, "")
    started = time.perf_counter()
    assert killed(start, 600, "--out", "warm") == 0
    whole = time.perf_counter() - started
    wanted = {name: content for name, content in files("undisturbed").items() if name != "r2m_config.yaml"}
    done = 0
    while done < kills:
        code = killed(start, generator.uniform(0.3, 1.05) * whole, "--out", "out", "--resume")
        done += code != 0
        if Path("out").exists():
            found = files("out")
            assert {name: found[name] for name in wanted} == wanted
            # Without its state a merge is done, though it was killed while it cleared up: nothing is left to resume.
            if not Path("out.partial/state.json").exists():
                shutil.rmtree("out")
    if not Path("out").exists() or Path("out.partial/state.json").exists():
        assert run(start, "--out", "out", "--resume") == (0, "")
    found = files("out")
    assert {name: found[name] for name in wanted} == wanted
    assert not Path("out.partial").exists()


def test_five_kills(here: Path, start: Start) -> None:
    kill_and_resume(start, 5, seed=0)


@pytest.mark.slow
@pytest.mark.heavy
def test_many_kills(here: Path, start: Start, numbers: Numbers) -> None:
    kill_and_resume(start, numbers.kills, seed=1)


def stopped_in(step: str, done: int = 1) -> Callable[[ProgressEvent], None]:
    def progress(event: ProgressEvent) -> None:
        if event.step == step and event.tensors_done >= done:
            raise OSError(5, "Input/output error")

    return progress


def merged(out: str = "out", **options: Any) -> dict[str, Any]:
    experts = Expert.each({"a": "a.safetensors", "b": "b.safetensors"})
    described = {"config": make_config("r2m_truncated", {})}
    described |= {name: options.pop(name) for name in ("config", "dtype", "method") if name in options}
    progress = options.pop("progress", None)
    return merge_files(Recipe("base.safetensors", experts, **described), out, Options(**options), progress=progress)


def interrupted(step: str = "combination", done: int = 5, **options: object) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        merged(progress=stopped_in(step, done), **options)


@pytest.mark.parametrize("step", ["task Gram", "truncation", "combination"])
def test_what_was_done_is_not_done_again(here: Path, step: str) -> None:
    interrupted(step)
    seen: dict[str, int] = {}

    def progress(event: ProgressEvent) -> None:
        seen.setdefault(event.step, event.tensors_total)

    merged(resume=True, progress=progress)
    whole: dict[str, int] = {"task Gram": 25, "truncation": 12, "combination": 26}
    for name in list(whole)[: list(whole).index(step)]:
        # Factors are not kept: a tensor is truncated again unless it is merged already.
        assert seen.get(name, 0) <= (whole[name] - 5 if name == "truncation" and step == "combination" else 0) or (
            name == "truncation"
        )
    assert seen[step] <= whole[step] - 5 or step == "truncation"
    merged("undisturbed")
    names = {"model.safetensors"}
    assert {n: files("out")[n] for n in names} == {n: files("undisturbed")[n] for n in names}


def test_without_resume_the_work_is_not_lost(here: Path) -> None:
    interrupted()
    with pytest.raises(InvalidInput, match=r"^out \(out\): out.partial beside it holds the work of a merge that was"):
        merged()
    merged(resume=True)


def test_resume_without_earlier_work_starts(here: Path) -> None:
    merged(resume=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"config": make_config("r2m_truncated", {}).replace(eta=0.5)}, "parameters eta was 0.6 and is 0.5"),
        ({"dtype": "bfloat16"}, 'dtype was null and is "bfloat16"'),
        ({"max_shard_size": "1MB"}, "max_shard_size was 5000000000 and is 1000000"),
        ({"backend": "torch"}, "backend was "),
    ],
)
def test_another_merge_is_not_resumed(here: Path, options: dict, sentence: str) -> None:
    interrupted()
    before = {path: path.read_bytes() for path in Path("out.partial").rglob("*") if path.is_file()}
    with pytest.raises(InvalidInput) as caught:
        merged(resume=True, **options)
    assert f"--resume goes on with the same merge only, and {sentence}" in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_what_other_code_began_is_not_resumed(here: Path, command: Command) -> None:
    interrupted(method="r2m_truncated")
    path = Path("out.partial/state.json")
    state = json.loads(path.read_text())
    now = state["sources"]
    assert now == sources_digest(state["backend"].partition(" ")[0], Path(str(r2m.__file__)).parent)
    path.write_text(json.dumps({**state, "sources": "0123456789abcdef"}))
    words = ["merge", *BASE_ARGUMENTS, *METHODS["r2m_truncated"], "--out", "out", "--resume"]
    result = command(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "Error: out (out): --resume goes on with the same merge only, and the code that makes its bits has changed: "
        f"the digest of its sources was '0123456789abcdef' and is '{now}'; start anew without out.partial\n"
    )
    path.write_text(json.dumps(state))
    assert command(*words).code == 0


def test_a_changed_input_is_not_resumed(here: Path) -> None:
    interrupted()
    save_file({**load_file("b.safetensors")}, "b.safetensors")  # the same content, at another time
    os.utime("b.safetensors", ns=(1, 1))
    with pytest.raises(InvalidInput, match=r"the input .*/b.safetensors is another one or was changed"):
        merged(resume=True)


def test_a_strange_file_in_the_workplace_is_not_touched(here: Path) -> None:
    interrupted()
    Path("out.partial/thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(InvalidInput, match=r"holds 'thesis.tex', which no merge wrote"):
            merged(resume=resume)
    assert Path("out.partial/thesis.tex").read_text() == "years of work"


def test_a_state_that_cannot_be_read_is_refused(here: Path) -> None:
    interrupted()
    Path("out.partial/state.json").write_text('{"torn')
    with pytest.raises(InvalidInput, match=r"state.json cannot be read"):
        merged(resume=True)


def test_a_journal_cut_off_anywhere_is_resumed(here: Path) -> None:
    merged("undisturbed")
    interrupted()
    journal = Path("out.partial/journal-0")
    whole = journal.read_bytes()
    for cut in (1, 7, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        kept = {path: path.read_bytes() for path in Path("out.partial").rglob("*") if path.is_file()}
        journal.write_bytes(whole[:cut])
        merged(resume=True)
        assert files("out")["model.safetensors"] == files("undisturbed")["model.safetensors"]
        for path in Path("out").iterdir():
            path.unlink()
        Path("out").rmdir()
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def test_a_file_that_is_gone_from_the_workplace_is_noticed(here: Path) -> None:
    interrupted()
    Path("out.partial/output/model.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"output/model.safetensors: expected tensor '.*' in it, as the journal"):
        merged(resume=True)
    assert not Path("out").exists()


def test_a_second_process_is_refused(here: Path, start: Start) -> None:
    # It says when it comes to its first tensor, and waits there for the end.
    script = SLOW.replace("time.sleep(0.02)", "print('at work', flush=True), threading.Event().wait()")
    with start("merge", *BASE_ARGUMENTS, "--out", "out", script=script) as child:
        assert child.stdout.readline() == "at work\n"
        code, err = run(start, "--out", "out", "--resume")
        child.kill()
    assert (code, err) == (2, f"Error: out (out): another merge is writing it, process {child.pid}\n")
    assert run(start, "--out", "out", "--resume") == (0, "")
    same_merge(start, "out")


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_around_the_renames(here: Path, start: Start, moment: str) -> None:
    """With --overwrite: the former output, or the new one, or the former one at the next run."""
    assert run(start, "--out", "out", "--method", "weight_average") == (0, "")
    former = files("out")
    script = f"""
import os, sys, signal
import r2m.output
real, count = os.rename, 0
def rename(source, target):
    global count
    names = (os.path.basename(source), os.path.basename(target))
    moving = names in (("out", "former"), ("output", "out"))
    if moving and {moment!r} == "before" and names[1] == "former": os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if moving and {moment!r} == "between" and names[1] == "former": os.kill(os.getpid(), signal.SIGKILL)
    if moving and {moment!r} == "after" and names[1] == "out": os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
from r2m.commands.main import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = [*BASE_ARGUMENTS, "--out", "out", "--overwrite"]
    with start("merge", *arguments, script=script) as child:
        assert child.wait() == -signal.SIGKILL
    if moment == "before":
        assert files("out") == former
    assert Path("out").exists() == (moment != "between")
    assert run(start, "--out", "out", "--overwrite", "--resume") == (0, "")
    same_merge(start, "out")
    assert files("out")["model.safetensors"] != former["model.safetensors"]


UNRESERVED = """
import r2m.checkpoints.writer as w
del os.posix_fallocate
w.reserve = lambda descriptor, size: None
"""


def disk_full(start: Start, points: int) -> None:
    """A limit on a file's size stands for a full disk: reserved space fails at once, so it is not reserved here."""
    inputs = {name: Path(name).read_bytes() for name in ("base.safetensors", "a.safetensors", "b.safetensors")}
    script = SLOW.replace("0.02", "0").replace("\nstore = ", f"{UNRESERVED}store = ")
    size = Path("base.safetensors").stat().st_size
    for point in range(points):
        limits = {resource.RLIMIT_FSIZE: 4096 + size * point // points}
        with start("merge", *BASE_ARGUMENTS, "--out", "out", "--resume", script=script, limits=limits) as child:
            _, err = child.communicate(timeout=200)
        first = err.splitlines()[0] if err else ""
        assert (child.returncode, first.startswith("Error: "), "file too large" in first) == (1, True, True), first
        assert "Traceback" not in err
        assert not Path("out").exists()
        assert {name: Path(name).read_bytes() for name in inputs} == inputs
    assert run(start, "--out", "out", "--resume") == (0, "")
    same_merge(start, "out")


def test_disk_full_at_five_points(here: Path, start: Start) -> None:
    disk_full(start, 5)


@pytest.mark.slow
def test_disk_full_at_twenty_points(here: Path, start: Start) -> None:
    disk_full(start, 20)


def torchrun(
    processes: int, *arguments: str, script: str | None = None, inputs: Sequence[str] = BASE_ARGUMENTS
) -> subprocess.Popen[str]:
    program = [script] if script else ["-m", "r2m"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, *program, "merge", *inputs, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MASTER_PORT": "0"},
    )


@pytest.mark.parametrize(
    "method", [name if name == "r2m" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_processes_touch_no_bit(here: Path, start: Start, method: str) -> None:
    options = [*METHODS[method], "--max-shard-size", "3MB"]
    with torchrun(2, "--out", "out", *options) as job:
        _, err = job.communicate(timeout=280)
    assert job.returncode == 0, err
    same_merge(start, "out", *options)
    assert len(files("out")) > 3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_more_processes_touch_no_bit(here: Path, start: Start, processes: int) -> None:
    with torchrun(processes, "--out", "out", "--max-shard-size", "3MB") as job:
        _, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    same_merge(start, "out", "--max-shard-size", "3MB")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3])
def test_processes_touch_no_bit_where_task_vectors_are_factors(here: Path, start: Start, processes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        factors = {
            f"base_model.model.block{i}.lora_{side}.weight": 0.1 * torch.randn(shape, generator=generator)
            for i in range(12)
            for side, shape in (("A", (5, 400 + i)), ("B", (400, 5)))
        }
        Path(name).mkdir()
        save_file(factors, f"{name}/adapter_model.safetensors")
        Path(name, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 5, "lora_alpha": 10}))
    inputs = ["--base", "base.safetensors", "--expert", "a=a", "--expert", "b=b", "--quiet"]
    with torchrun(processes, "--out", "out", "--max-shard-size", "3MB", inputs=inputs) as job:
        _, err = job.communicate(timeout=280)
    assert job.returncode == 0, err
    with start("merge", *inputs, "--out", "undisturbed", "--max-shard-size", "3MB") as child:
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    grams = json.loads(Path("out", "r2m_state.json").read_text())["grams"]
    factored = {name for name, one in grams.items() if one and one["factored"]}
    # Biases are the base's in both, which is a change without factors.
    assert factored == {f"block{i}.{kind}" for i in range(12) for kind in ("weight", "bias")}
    assert {**files("out"), "r2m_config.yaml": b""} == {**files("undisturbed"), "r2m_config.yaml": b""}
    assert len(files("out")) > 3


@pytest.mark.slow
def test_bad_input_is_told_once(here: Path, start: Start) -> None:
    tensors = load_file("b.safetensors")
    tensors["block7.bias"][3] = torch.nan
    save_file(tensors, "b.safetensors")
    with torchrun(2, "--out", "out") as job:
        _, err = job.communicate(timeout=280)
    assert job.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert told == ["Error: expert 'b' (b.safetensors): tensor 'block7.bias' holds NaN or Inf in 1 of 400 elements"]
    assert "r2m/commands" not in err  # torchrun shows a traceback of its own
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_job_and_another_number_resumes(here: Path, start: Start, number: int) -> None:
    script = SLOW.replace("0.02", "0.2 if os.environ['RANK'] == '0' else (os.kill(os.getpid(), 9) or 0)")
    Path("dying.py").write_text(script)
    with torchrun(2, "--out", "out", script="dying.py") as job:
        _, err = job.communicate(timeout=280)
    assert job.returncode != 0
    assert not Path("out").exists()
    assert Path("out.partial").exists()
    if number == 1:
        assert run(start, "--out", "out", "--resume") == (0, "")
    else:
        with torchrun(number, "--out", "out", "--resume") as job:
            _, err = job.communicate(timeout=280)
        assert job.returncode == 0, err
    same_merge(start, "out")


MEASURE = """
import sys, threading, time
import psutil, torch
from r2m.commands.process import settle_memory
settle_memory()
from r2m.merge import merge_files
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from r2m_kernels import MergeConfig
process, most, done = psutil.Process(), 0, False
def watch():
    global most
    while not done:
        most = max(most, process.memory_info().rss)
        time.sleep(0.002)
before = process.memory_info().rss
watcher = threading.Thread(target=watch)
watcher.start()
options = {
    "rows": {"rank": 1.0, "row_power": 3.0, "head": "merge"},
    "tenth": {"rank": 0.1, "row_power": 0.0, "whole_up_to": 0},
}.get(sys.argv[3])
config = getattr(MergeConfig, sys.argv[3])() if options is None else MergeConfig.r2m(**options)
experts = Expert.each({name: f"{name}.safetensors" for name in ("a", "b", "c")})
merge_files(Recipe("base.safetensors", experts, config), sys.argv[1], Options(memory_budget=int(sys.argv[2])))
done = True
watcher.join()
print(most - before)
"""


def peak(out: str, budget: int, method: str, threads: int) -> int:
    """Bytes that a merge in a process of its own took at most, beyond what it had before."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, out, str(budget), method],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


def huge_checkpoints(shape: tuple[int, int], *, steep: bool) -> None:
    """Base and three experts of one large matrix and a small one; two of the residuals may have a steep spectrum."""
    generator = torch.Generator().manual_seed(0)
    base, small = (torch.randn(size, generator=generator) for size in (shape, (300, 300)))
    save_file({"large": base, "small": small}, "base.safetensors")
    for name in ("a", "b", "c"):
        noise = torch.randn((shape[0], 1) if steep and name == "a" else shape, generator=generator)
        save_file({"large": base + 0.05 * noise, "small": small + 0.01}, f"{name}.safetensors")


def bounded(start: Start, budget: int, method: str, threads: int, share: float = 1.2) -> None:
    """A merge of a matrix larger than the budget, in MiB, alone, and of base and experts, takes little beyond it."""
    taken = peak("bounded", budget << 20, method, threads) / 2**20
    assert taken <= share * budget, f"{taken:.0f} MiB"
    script = "import torch; torch.set_num_threads(2)\n" + MEASURE
    with start("unbounded", str(2**40), method, script=script) as child:
        _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert files("bounded")["model.safetensors"] == files("unbounded")["model.safetensors"]


# But for truncations half of the budget is for what is in flight, and the rest for nothing here but 1 MiB of inputs
# that are kept. Without buffers that go back to the system at once, holes between them took .6 to 2.9 of the budget
# with two threads.
@pytest.mark.parametrize(
    ("method", "threads", "shape", "share"),
    [
        ("r2m", 2, (8192, 1024), 1.2),
        ("rows", 2, (32768, 512), 0.55),
        pytest.param("r2m", 1, (32768, 512), 1.2, marks=pytest.mark.slow),
        *(
            pytest.param(*case, (32768, 512), 0.55, marks=pytest.mark.slow)
            for case in (("weight_average", 1), ("ties", 2))
        ),
    ],
)
def test_memory_stays_within_the_budget(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Start,
    method: str,
    threads: int,
    shape: tuple[int, int],
    share: float,
) -> None:
    monkeypatch.chdir(tmp_path)
    huge_checkpoints(shape, steep=True)
    bounded(start, 64, method, threads, share)


@pytest.mark.slow
@pytest.mark.parametrize(
    # Needed whole, such a matrix has the process for itself: threads change little. A steep residual at the default's
    # rank is truncated by its own factors alone, which exceed the budget.
    ("method", "threads", "shape", "steep"),
    [
        ("star", 2, (4096, 768), False),
        ("score", 1, (4096, 768), False),
        ("mono_soup", 1, (4096, 768), False),
        ("tsv_m", 1, (4096, 768), False),
        ("iso_c", 2, (4096, 768), False),
        ("r2m", 1, (2048, 8192), True),
    ],
    ids=str,
)
def test_matrices_that_exceed_the_budget_take_what_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, threads: int, shape: tuple[int, int], steep: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    huge_checkpoints(shape, steep=steep)
    recipe = Recipe("base.safetensors", Expert.each({n: f"{n}.safetensors" for n in "abc"}), make_config(method, {}))
    monkeypatch.setattr("r2m.machine.threads", lambda: threads)
    planned, _ = plan_merge(recipe, "out", Options(memory_budget="64MiB"))
    taken = peak("out", 64 << 20, method, threads)
    assert not planned.enough
    assert 0.9 <= taken / planned.shares[0].memory <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize(
    # With two threads, which take more than one; a steep residual is read thirty times from storage.
    ("shape", "budget", "method", "steep", "share", "threads"),
    [
        ((8192, 2048), 64, "tenth", True, 1.2, 2),
        ((2048, 8192), 64, "r2m", False, 1.2, 2),
    ],
    ids=str,
)
def test_truncations_stay_within_other_budgets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Start,
    shape: tuple[int, int],
    budget: int,
    method: str,
    steep: bool,
    share: float,
    threads: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    huge_checkpoints(shape, steep=steep)
    bounded(start, budget, method, threads, share)


LEFT = {
    "no rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 and MASTER_ADDR is not set"),
    "of another launcher": (
        {"WORLD_SIZE": "8", "RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "WORLD_SIZE is 8 and TORCHELASTIC_RUN_ID is not set",
    ),
    "a rank beyond": (
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"},
        "WORLD_SIZE is 2 and RANK is '2'",
    ),
    "no numbers": ({"WORLD_SIZE": "two", "LOCAL_WORLD_SIZE": "0", "LOCAL_RANK": ""}, None),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_another_job_left_in_the_environment_is_told_and_not_followed(
    case: str, checkpoints: Checkpoints, start: Start
) -> None:
    variables, told = LEFT[case]
    with start("merge", *checkpoints.arguments, "--out", "out", environment=variables) as job:
        _, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert "Traceback" not in err
    assert told is None or f"Warning: {told}: not started by torchrun, this process goes on alone" in err


def test_a_process_that_waits_says_for_whom(start: Start, tmp_path: Path) -> None:
    script = """
import os, threading
from r2m import distributed
distributed._SILENCE = 0.1
threading.Timer(1.5, lambda: os._exit(7)).start()
with distributed.processes():
    pass
"""
    left = {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    with start(script=script, environment=left) as job:
        _, err = job.communicate(timeout=60)
    assert job.returncode == 7
    assert "Warning: process 1 of 4 waits for the others at localhost:1; alone? unset WORLD_SIZE" in err


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    for variable in ("RANK", "WORLD_SIZE"):
        assert variable not in os.environ
