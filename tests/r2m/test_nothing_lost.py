"""What people have is there after kills, full disks and second processes, whatever command comes next."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faults import SCRIPT
from forked import Child
from heavy import Numbers
from r2m.ownership import digest

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
Start = Callable[..., Child]
Files = dict[str, dict[str, bytes]]  # when → name → content
OUTPUT = "model.safetensors"
TWO = ["--base", "base.safetensors", "--expert", "fs=fs.safetensors", "--expert", "fr=fr.safetensors"]
ADD = ["add", "out", "--expert", "efs=efs.safetensors", "--quiet"]


def content(out: str) -> bytes:
    return Path(out, OUTPUT).read_bytes()


def everything(out: str) -> dict[str, bytes]:
    """But for the report, which has times."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != "r2m_report.json"}


@pytest.fixture
def project(checkpoints: Checkpoints, command: Command) -> Files:
    """``out``, a merge of two, with a copy of it in ``kept``; what it is before and after :data:`ADD`."""
    assert command("merge", *TWO, "--out", "out", "--quiet").code == 0
    shutil.copytree("out", "kept")
    shutil.copytree("out", "added")
    assert command("add", "added", *ADD[2:]).code == 0
    return {"before": everything("kept"), "after": everything("added")}


def cut_off(start: Start, at: int, what: str, *arguments: str) -> tuple[int, str]:
    """A command that meets something at one of its calls; its exit code and what it said."""
    with start(str(at), what, *arguments, script=SCRIPT) as child:
        out, err = child.communicate(timeout=120)
    assert "Traceback" not in err, err
    return child.returncode, out if what == "count" else err


def calls(start: Start, *arguments: str) -> int:
    code, out = cut_off(start, 0, "count", *arguments)
    assert code == 0
    return int(out.split()[-1])


def restore() -> None:
    for name in ("out", "out.partial"):
        shutil.rmtree(name, ignore_errors=True)
    shutil.copytree("kept", "out")


NEXT = (
    ("inspect", "out"),
    ("card", "out", "--license", "mit"),
    ("convert", "out", "converted.pth", "--overwrite"),
    ("merge", "--base", "base.safetensors", "--expert", "out", "--out", "of-one", "--overwrite", "--quiet"),
    ("sweep", "out", "--to", "swept", "--eta", "1", "--quiet"),
    ("plan", "--base", "out", "--expert", "fs.safetensors", "--out", "planned"),
)


def add_met(start: Start, command: Command, known: Files, moments: list[tuple[int, str]]) -> None:
    """At each of these calls of ``add`` something happens; then any command finds OUT, and ``add`` comes to its end."""
    for number, (at, what) in enumerate(moments):
        restore()
        code, err = cut_off(start, at, what, *ADD)
        assert code == -signal.SIGKILL if what == "kill" else code in (0, 1), (at, what, err)
        shutil.rmtree("swept", ignore_errors=True)
        after = command(*NEXT[number % len(NEXT)])
        assert after.code == 0, (at, what, NEXT[number % len(NEXT)], after.err)
        card = {"README.md"} if NEXT[number % len(NEXT)][0] == "card" else set()
        there = {name: one for name, one in everything("out").items() if name not in card}
        found = [when for when, files in known.items() if there == {k: v for k, v in files.items() if k not in card}]
        assert found, (at, what, sorted(there))
        if found == ["before"]:
            assert command(*ADD, "--resume").code == 0, (at, what)
        assert content("out") == known["after"][OUTPUT], (at, what)
        assert not Path("out.partial").exists() or found == ["after"], (at, what)


def test_add_is_killed_around_its_renames(project: Files, start: Start, command: Command) -> None:
    whole = calls(start, *ADD)
    # Its last calls: the two renames, and the tidying up. The first ones: locks, and what is made ready.
    add_met(start, command, project, [(at, "kill") for at in (*range(2, 9, 3), *range(whole - 16, whole + 1))])


# Command → what makes it come to its end after whatever happened, and what it writes.
COMMANDS = {
    "add": (ADD, ["--resume"], "out"),
    "remove": (["remove", "out", "--expert", "fs", "--quiet"], ["--resume"], "out"),
    "merge": (["merge", *TWO, "--rank", "0.5", "--out", "out", "--overwrite", "--quiet"], ["--resume"], "out"),
    "card": (["card", "out", "--license", "mit"], [], "out"),
    "sweep": (["sweep", "out", "--to", "swept", "--eta", "0.5,1", "--quiet"], [], "swept"),
    "convert": (["convert", "fs.safetensors", "converted/new.pth"], [], "converted"),
}


def below(directory: str) -> dict[str, bytes]:
    """Every file but reports, which have times, and what is not whole."""
    return {
        str(path): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file() and path.name != "r2m_report.json" and ".r2m-" not in str(path)
    }


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("card", "remove") else pytest.mark.slow) for name in COMMANDS]
)
def test_any_command_meets_anything_anywhere(
    name: str, project: Files, start: Start, command: Command, numbers: Numbers
) -> None:
    words, again, place = COMMANDS[name]
    dice = random.Random(name)

    def prepare() -> None:
        restore()
        for left in ("swept", "converted", "of-one"):
            shutil.rmtree(left, ignore_errors=True)
        Path("converted").mkdir()

    prepare()
    inputs, before = (
        {path: Path(path).read_bytes() for path in os.listdir() if path.endswith(".safetensors")},
        below(place),
    )
    whole = calls(start, *words)
    after = below(place)
    kills = [(dice.randint(1, whole), "kill") for _ in range(4 * numbers.kills)]
    errors = [(dice.randint(1, whole), dice.choice(("EIO", "ENOSPC"))) for _ in range(2 * numbers.kills)]
    for at, what in kills + errors:
        prepare()
        code, err = cut_off(start, at, what, *words)
        assert code == -signal.SIGKILL if what == "kill" else code in (0, 1), (at, what, err)
        follows = dice.choice([one for one in NEXT if one[0] not in (name, "card")])
        assert command(*follows).code == 0, (at, what, follows)
        shutil.rmtree("swept") if name != "sweep" and Path("swept").exists() else None
        found = below(place)
        assert found in (before, after) or place != "out", (at, what, follows)
        assert found.items() <= after.items() or found == before, (at, what)
        result = command(*words, *again)
        assert result.code == 0 or below(place) == after, (at, what, result.err)
        assert below(place) == after, (at, what)
        assert {path: Path(path).read_bytes() for path in inputs} == inputs


# In the child: it has read what it goes on with, and waits until it may begin.
WAITS = """
import sys, time
from pathlib import Path
import r2m.merge, r2m.sweep
real = r2m.merge.open_job
def slowly(*arguments):
    print("has read", flush=True)
    while not Path("go").exists():
        time.sleep(0.01)
    return real(*arguments)
r2m.merge.open_job = slowly
from r2m.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("second", [ADD, ["remove", "out", "--expert", "fs"], ["card", "out"]], ids=lambda one: one[0])
def test_of_two_commands_on_one_output_the_second_is_refused(
    second: list[str], project: Files, start: Start, command: Command
) -> None:
    with start(*ADD, script=WAITS) as child:
        assert child.stdout.readline() == "has read\n"
        result = command(*second)
        Path("go").touch()
        assert child.wait() == 0
    assert (result.code, result.err) == (2, f"Error: out (out): another merge is writing it, process {child.pid}\n")
    assert everything("out") == project["after"]


OWN = {
    "README.md": b"years of notes",
    "model.safetensors": b"trained further",
    "config.json": b"{}",
    "r2m_config.yaml": b"# the only copy",
    "r2m_report.json": b"{}",
}


@pytest.mark.parametrize("name", OWN)
def test_what_a_merge_did_not_write_is_not_replaced(name: str, project: Files, command: Command) -> None:
    recipe = Path("out/r2m_config.yaml").read_bytes()
    Path("out", name).write_bytes(OWN[name])
    before = everything("out")
    commands = [
        ["merge", *TWO, "--out", "out", "--overwrite", "--quiet"],
        *([ADD, ["remove", "out", "--expert", "fs"]] if name != "r2m_config.yaml" else []),
    ]
    for words in commands:
        result = command(*words)
        assert result.code == 2
        reason = "and nothing says that a merge wrote it" if name == "config.json" else "which was changed since"
        assert result.err.startswith(f"Error: out (out): holds '{name}', {reason}"), result.err
        assert everything("out") == before
        assert not Path("out.partial").exists()
    if name == "config.json":
        Path("out/config.json").unlink()
    else:
        shutil.copy(f"kept/{name}", f"out/{name}")
    assert Path("out/r2m_config.yaml").read_bytes() == recipe
    assert command(*ADD).code == 0


def test_an_output_that_was_copied_is_one_all_the_same(project: Files, command: Command) -> None:
    assert command("add", "kept", *ADD[2:]).code == 0
    assert everything("kept") == project["after"]
    Path("kept/README.md").unlink()  # what is gone is in nobody's way
    assert command("remove", "kept", "--expert", "efs", "--quiet").code == 0
    assert everything("kept") == project["before"]


def test_a_recipe_is_an_input(project: Files, command: Command) -> None:
    for words in (["out/r2m_config.yaml", "--overwrite"], ["out/r2m_config.yaml"]):
        result = command("merge", *words, "--out", "out")
        assert result.code == 2
        assert "is or holds the input out/r2m_config.yaml, and inputs are never written to" in result.err
    assert everything("out") == project["before"]


def test_an_input_where_work_is_done_is_not_written_to(checkpoints: Checkpoints, command: Command) -> None:
    Path("out.partial/output").mkdir(parents=True)
    Path("fs.safetensors").rename("out.partial/output/model.safetensors")
    before = Path("out.partial/output/model.safetensors").read_bytes()
    words = ["--base", "base.safetensors", "--expert", "out.partial/output/model.safetensors"]
    result = command("merge", *words, "--out", "out")
    assert result.code == 2
    assert ".partial beside it is or holds the input out.partial/output/model.safetensors" in result.err
    assert Path("out.partial/output/model.safetensors").read_bytes() == before


def test_large_files_are_told_apart_by_blocks_all_over_them(tmp_path: Path) -> None:
    size, path = 2**28, tmp_path / "large"  # sparse
    with open(path, "wb") as file:
        file.truncate(size)
    found = {digest(path)}
    for start in range(0, size, size // 8):
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(b"x" * (size // 2**10))  # as wide as from one block to the next
        found.add(digest(path))
    with open(path, "r+b") as file:
        file.truncate(size + 1)
    found.add(digest(path))
    assert len(found) == 10


def test_a_card_that_somebody_has_changed_stays(project: Files, command: Command) -> None:
    assert command("card", "out").code == 0
    assert command("card", "out", "--license", "mit").code == 0
    Path("out/README.md").write_text("years of notes")
    result = command("card", "out")
    assert (result.code, result.err) == (
        2,
        "Error: out/README.md: was changed since a merge wrote it; --overwrite replaces it\n",
    )
    assert Path("out/README.md").read_text() == "years of notes"
    assert command("card", "out", "--overwrite").code == 0
    assert command(*ADD).code == 0


def test_a_card_that_is_cut_off_blocks_nothing(project: Files, start: Start, command: Command) -> None:
    words = ["card", "out", "--license", "mit"]
    whole = calls(start, *words)
    cards = {Path(where, "README.md").read_bytes() for where in ("out", "kept")}
    for at in range(1, whole + 1):
        restore()
        code, err = cut_off(start, at, "kill" if at % 2 else "ENOSPC", *words)
        assert code in (-signal.SIGKILL, 0, 1), err
        assert Path("out/README.md").read_bytes() in cards
        assert command("remove", "out", "--expert", "fr", "--quiet").code == 0, at
        assert sorted(os.listdir("out")) == sorted(os.listdir("kept"))
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_what_ended_badly_is_not_called_done(checkpoints: Checkpoints, start: Start, command: Command) -> None:
    """A merge over a former output ends with its input refused, and is killed while it tidies up."""
    from safetensors.torch import load_file, save_file

    assert command("merge", *TWO, "--method", "weight_average", "--out", "kept", "--quiet").code == 0
    assert command("merge", *TWO, "--out", "wanted", "--quiet").code == 0
    tensors = load_file("fr.safetensors")
    whole = Path("fr.safetensors").read_bytes()
    words = ["merge", *TWO, "--out", "out", "--overwrite", "--quiet"]
    script = SCRIPT.replace(
        "def watched",
        "import r2m.output\nreal_clear = r2m.output.Workplace.clear\n"
        "def clear(self):\n    global seen\n    seen = 0\n    real_clear(self)\n"
        "r2m.output.Workplace.clear = clear\ndef watched",
    ).replace("if seen == at and", "if seen == at and len(os.listdir('out.partial')) > 1 and")
    ends = set()
    for at in range(1, 7):
        restore()
        tensors["scale"] = tensors["scale"] * float("nan")
        save_file(tensors, "fr.safetensors")
        with start(str(at), "kill", *words, script=script) as child:
            _, err = child.communicate(timeout=60)
        ends.add(child.returncode)
        Path("fr.safetensors").write_bytes(whole)
        result = command(*words, "--resume")
        assert result.code == 0, result.err
        assert content("out") == content("wanted"), (at, err)
    assert -signal.SIGKILL in ends


def test_what_was_never_made_is_not_called_done(project: Files, command: Command) -> None:
    words = ["merge", *TWO, "--method", "ties", "--quiet", "--out"]
    assert command(*words, "wanted").code == 0
    Path("out.partial").mkdir()
    Path("out.partial/state.json").write_text(
        json.dumps(json.loads(Path("wanted/r2m_state.json").read_text())["state"])
    )
    assert command(*words, "out", "--overwrite", "--resume").code == 0
    assert everything("out") == everything("wanted")


def test_a_workplace_that_was_taken_over_is_left_alone(
    checkpoints: Checkpoints, start: Start, command: Command
) -> None:
    script = """
import sys, time
from pathlib import Path
from r2m.checkpoints.writer import SafetensorsSink
store = SafetensorsSink._store
def slowly(*arguments):
    if not Path("go").exists():
        print("at work", flush=True)
    while not Path("go").exists():
        time.sleep(0.01)
    store(*arguments)
SafetensorsSink._store = slowly
from r2m.commands.main import main
sys.exit(main(sys.argv[1:]))
"""
    with start("merge", *TWO, "--out", "out", "--quiet", "--method", "ties", script=script) as child:
        assert child.stdout.readline() == "at work\n"
        shutil.rmtree("out.partial")
        with start(
            "merge", *TWO, "--out", "out", "--quiet", script=script.replace("at work", "at work, too")
        ) as second:
            assert second.stdout.readline() == "at work, too\n"
            Path("go").touch()
            assert child.wait() in (1, 2)
            assert second.wait() == 0
        assert "Traceback" not in child.stderr.read()
    assert command("merge", *TWO, "--out", "wanted", "--quiet").code == 0
    assert everything("out") == everything("wanted")
    assert not Path("out.partial").exists()


def test_a_mount_point_is_found_before_the_work(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a volume").mkdir()
    Path("mounts").write_text(f"36 35 98:0 /x {Path.cwd()}/a\\040volume rw - ext3 /dev/root rw\n")
    monkeypatch.setattr("r2m.places._MOUNTS", Path("mounts"))
    for words in ([], ["--overwrite"]):
        result = command("merge", *TWO, "--out", "a volume", *words)
        assert (result.code, result.err) == (
            2,
            "Error: out (a volume): a file system is mounted there, and no directory can take its place; give one "
            "inside it, such as a volume/merged\n",
        )
    assert command("merge", *TWO, "--out", "a volume/merged", "--quiet").code == 0


SWEEP = ["sweep", "out", "--to", "swept", "--eta", "0.5,1,2", "--quiet"]


def test_a_sweep_that_was_killed_goes_on(project: Files, start: Start, command: Command) -> None:
    assert command(*SWEEP[:3], "whole", *SWEEP[4:]).code == 0
    whole = calls(start, *SWEEP[:3], "counted", *SWEEP[4:])
    for at in range(whole // 8, whole + 1, whole // 4):
        shutil.rmtree("swept", ignore_errors=True)
        assert cut_off(start, at, "kill", *SWEEP)[0] == -signal.SIGKILL
        for point in Path("swept").glob("eta=*"):
            assert everything(str(point)) == everything(f"whole/{point.name}")
        if any(Path("swept").glob("eta=*")) and not Path("swept/sweep.csv").exists():
            other = command(*SWEEP[:5], "0.5,1,2,4", "--rank", "0.3")
            assert other.code == 2
            assert "of another sweep" in other.err or "not an empty directory" in other.err
        result = command(*SWEEP)
        assert result.code == 0 or Path("swept/sweep.csv").exists(), result.err
        assert Path("swept/sweep.csv").read_bytes() == Path("whole/sweep.csv").read_bytes()
        assert sorted(os.listdir("swept")) == sorted(os.listdir("whole"))
        for point in Path("swept").glob("eta=*"):
            assert everything(str(point)) == everything(f"whole/{point.name}")


def test_of_two_sweeps_in_one_directory_the_second_is_refused(project: Files, start: Start, command: Command) -> None:
    script = WAITS.replace("r2m.merge.open_job", "r2m.sweep.Job.analyze").replace(
        "(*arguments)", "(*arguments, **named)"
    )
    with start(*SWEEP, script=script) as child:
        assert child.stdout.readline() == "has read\n"
        result = command(*SWEEP)
        Path("go").touch()
        assert child.wait() == 0
    assert (result.code, result.err) == (2, f"Error: out (swept): another merge is writing it, process {child.pid}\n")
    assert len(os.listdir("swept")) == 4


def test_a_conversion_that_was_killed_leaves_nothing_for_ever(
    checkpoints: Checkpoints, start: Start, command: Command
) -> None:
    words = ["convert", "fs.safetensors", "new.pth"]
    whole = calls(start, "convert", "fs.safetensors", "counted.pth")
    for at in (2, whole // 2, whole - 2):
        assert cut_off(start, at, "kill", *words)[0] == -signal.SIGKILL
        Path("new.pth").unlink(missing_ok=True)
    assert [name for name in os.listdir() if name.startswith(".r2m-")]
    assert command(*words).code == 0
    assert not [name for name in os.listdir() if name.startswith(".r2m-")]
    for source in ("fs.safetensors", "./fs.safetensors"):
        before = Path("fs.safetensors").read_bytes()
        result = command("convert", source, "fs.safetensors", "--overwrite", "--dtype", "bfloat16")
        assert (result.code, result.err) == (
            2,
            "Error: out (fs.safetensors): is a file of the source, and inputs are never written to\n",
        )
        assert Path("fs.safetensors").read_bytes() == before


def test_a_lock_that_cannot_be_written_leaves_no_descriptor(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    assert command("merge", *TWO, "--out", "out").code == 1  # what is opened once and for all
    before = sorted(os.listdir("/proc/self/fd"))
    result = command("merge", *TWO, "--out", "out")
    assert (result.code, result.err) == (1, "Error: out/lock: no space left on device\n")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_state_that_was_changed_is_not_believed(checkpoints: Checkpoints, project: Files, command: Command) -> None:
    assert command("merge", "--base", "base.safetensors", "--expert", "fr.safetensors", "--out", "alone").code == 0
    state = json.loads(Path("out/r2m_state.json").read_text())
    name, gram = next((name, gram) for name, gram in state["grams"].items() if gram is not None)
    for changed in (
        {
            **state,
            "grams": {**state["grams"], name: {**gram, "tasks": [[2 * v for v in row] for row in gram["tasks"]]}},
        },
        {**state, "grams": "none"},
        {**state, "state": {**state["state"], "max_shard_size": -1}},
        {"digest": state["digest"]},
        {},
    ):
        Path("out/r2m_state.json").write_text(json.dumps(changed))
        result = command("remove", "out", "--expert", "fs", "--quiet")
        assert result.code == 0, result.err
        assert content("out") == content("alone")
        shutil.rmtree("out")
        shutil.copytree("kept", "out")


def test_an_input_that_was_changed_in_place_is_another_one(project: Files, command: Command) -> None:
    """Its size and time as they were: nothing that was found in it is taken."""
    status = os.stat("fr.safetensors")
    whole = bytearray(Path("fr.safetensors").read_bytes())
    whole[-4:] = b"\x00\x00\x80\x40"
    with open("fr.safetensors", "r+b") as file:
        file.write(whole)
    os.utime("fr.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert command("remove", "out", "--expert", "fs", "--quiet").code == 0
    assert command("merge", "--base", "base.safetensors", "--expert", "fr.safetensors", "--out", "alone").code == 0
    assert content("out") == content("alone")
    steps = json.loads(Path("out/r2m_report.json").read_text())["steps"]
    assert next(step["bytes_read"] for step in steps if step["step"] == "task Gram") > 0
