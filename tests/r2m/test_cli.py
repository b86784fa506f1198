"""The command: options to configuration, errors to sentences and exit codes; also in real processes."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import forked
import pytest
import r2m.job
import r2m.merge
import torch
from r2m.commands.main import main
from r2m.commands.main import r2m as group
from r2m.commands.merge import merge
from r2m.commands.process import exit_code
from r2m.commands.way import ORDER, WAY
from r2m.distributed import LostProcess
from r2m.options import Options
from r2m.recipe import ARRANGEMENT, OUTPUT, Arrangement, Expert, Recipe
from safetensors.torch import load_file, save_file

import r2m_kernels
from r2m_kernels import InvalidInput, MergeConfig
from r2m_kernels.config import FLAGS, METHODS, OFFERED, make_config
from r2m_kernels.errors import BackendUnavailable, BadCheckpoint
from r2m_kernels.fields import OPTIONS
from r2m_kernels.options import flag
from r2m_kernels.summary import in_words

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

    Command = Callable[..., Result]
    Start = Callable[..., forked.Child]

HELP = {option.name: option for option in merge.params if isinstance(option, click.Option)}


def test_a_merge_says_where_and_how(checkpoints: Checkpoints, command: Command) -> None:
    result = command("merge", *checkpoints.arguments, "--out", "a/merged")
    report = json.loads(Path("a/merged/r2m_report.json").read_text())
    assert result.code == 0
    where, *words, following = result.out.splitlines()
    assert where.startswith("Merged 3 experts into a/merged: ")
    assert words == in_words(report)
    cosines, shared, beyond = words
    total = sum(map(abs, report["core"]["coefficients"].values()))
    shares = ", ".join(f"{name} {report['core']['coefficients'][name] / total:.0%}" for name in ("fs", "fr", "efs"))
    length = f"{report['core']['norm_ratio_to_mean']:.0%} as long as the experts' mean"
    assert cosines.startswith("Experts moved by ")
    assert shared == f"Shared by all (the core): {shares}, {length}, multiplied by {report['core']['scale_used']:.3g}."
    assert f"{max(report['residual']['cut'].values()):.0%} of an expert's energy" in beyond
    assert following == "Next: r2m evaluate a/merged --data PICTURES --out a/merged.evaluation"
    assert result.err.startswith("comparing experts: 4 tensors, ")
    again = command("merge", *checkpoints.arguments, "--out", "a/merged/", "--overwrite").out
    assert again.endswith("Next: r2m evaluate a/merged/ --data PICTURES --out a/merged.evaluation\n")  # not inside
    beyond = command("merge", *checkpoints.arguments, "--row-power", "0", "--out", "a/alike").out.splitlines()[3]
    report = json.loads(Path("a/alike/r2m_report.json").read_text())
    assert beyond.endswith(f", {report['residual']['norm_ratio_to_core']:.0%} as long as the core.")


def test_alone_the_command_shows_the_way_and_all_of_every_summary(command: Command) -> None:
    result = command()
    lines = result.err.splitlines()
    at = [
        next(number for number, line in enumerate(lines) if line.startswith(f"  r2m {name} "))
        for name in WAY
        if name in group.commands
    ]
    assert at == sorted(at)
    listed = result.err.partition("Commands, in this order:\n")[2]
    assert re.findall(r"^  (\w+)  ", listed, re.MULTILINE) == [name for name in ORDER if name in group.commands]
    assert group.commands.keys() <= {*ORDER}, "their place in the order is not said"
    for one in group.commands.values():
        assert " ".join((one.help or "").partition("\n\n")[0].split()) in " ".join(listed.split())


@pytest.mark.parametrize("name", sorted({*group.commands} & {*WAY}))
def test_the_way_is_one_that_can_be_gone(name: str) -> None:
    words = [word for word in WAY[name].split() if word.startswith("--")]
    known = {flag for parameter in group.commands[name].params for flag in parameter.opts}
    assert {*words} <= known


@pytest.mark.parametrize("recipe", [False, True])
def test_a_path_at_home_is_there(
    recipe: bool, checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands ~ behind a = or in a recipe: a directory of that name is not what anybody means."""
    home = Path("home").absolute()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("base", "fs"):
        (home / f"{name}.safetensors").write_bytes(Path(f"{name}.safetensors").read_bytes())
    arguments = ["--base=~/base.safetensors", "--expert=fs=~/fs.safetensors"]
    if recipe:
        Path("recipe.yaml").write_text("base_model: ~/base.safetensors\nmodels: [model: ~/fs.safetensors]\n")
        arguments = ["recipe.yaml"]
    assert command("merge", *arguments, "--out=~/out").code == 0
    assert (home / "out" / "model.safetensors").exists()
    assert not Path("~").exists()
    Path("~").mkdir()
    Path("~/out").mkdir()
    assert command("inspect", "~/out").code == 2  # what is there


def test_warnings_are_told(checkpoints: Checkpoints, command: Command) -> None:
    arguments = [
        "--base",
        "base.safetensors",
        "--expert",
        "fs.safetensors",
        "--expert",
        "idle=base.safetensors",
    ]
    result = command("merge", *arguments, "--out", "merged")
    warnings = json.loads(Path("merged/r2m_report.json").read_text())["warnings"]
    assert any("'idle' equals the base" in warning for warning in warnings)
    assert [line for line in result.err.splitlines() if "Warning" in line] == [f"Warning: {text}" for text in warnings]


def test_quiet_says_nothing(checkpoints: Checkpoints, command: Command) -> None:
    result = command("merge", *checkpoints.arguments, "--out", "merged", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert Path("merged/model.safetensors").exists()


def test_undefined_numbers_are_shown_as_that(checkpoints: Checkpoints, command: Command) -> None:
    result = command("merge", "--base", "base.safetensors", "--expert", "base.safetensors", "--out", "merged")
    assert result.code == 0
    assert "Merged 1 expert into merged" in result.out
    assert "nan" not in result.out
    assert "None" not in result.out


@pytest.fixture
def configuration(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What ``merge_files`` is called with, instead of a merge."""
    report = {
        "experts": ["x"],
        "task_vectors": {"relative_to_base": {"x": None}, "cosines": [[None]]},
        "core": {"coefficients": {"x": 1.0}, "norm_ratio_to_mean": None, "scale_used": 1.0},
        "config": {"elementwise": "none", "eta": 0.0},
        "residual": {},
        "output": {"bytes": 1, "seconds": 0.0},
        "warnings": [],
    }

    def of(*arguments: str) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []

        def record(recipe: Recipe, out: str, options: Options, **keywords: Any) -> dict[str, Any]:
            calls.append({"recipe": recipe, "out": out, "options": options, **keywords})
            return report

        monkeypatch.setattr(r2m.merge, "merge_files", record)
        assert main(["merge", "--base", "b", "--expert", "x=e", "--out", "o", *arguments]) == 0
        return calls[0]

    return of


def test_options_left_out_leave_the_defaults(configuration: Callable[..., dict[str, Any]]) -> None:
    call = configuration()
    assert call.pop("progress") is not None
    assert call.pop("processes").size == 1
    recipe = Recipe("b", {"x": Expert("e")}, MergeConfig.r2m(), "r2m", None, "safetensors", Arrangement())
    assert call == {"recipe": recipe, "out": "o", "options": Options()}
    assert (Options().shard_bytes, Options().budget_bytes) == (5 * 10**9, None)


def test_options_reach_the_merge(configuration: Callable[..., dict[str, Any]]) -> None:
    words = "--dtype float16 --format pth --rename a=b --drop c --preset df40 --head base --head-features f --quiet "
    words += "--head-tensor x* --head-tensor y* --max-shard-size 1MB --memory-budget 2KiB --overwrite --resume "
    words += "--device cpu --backend torch"
    call = configuration(*words.split())
    arrangement = Arrangement({"a": "b", "c": None}, "df40", "base", ("x*", "y*"), "f")
    assert call["recipe"] == Recipe("b", {"x": Expert("e")}, dtype="float16", format="pth", arrangement=arrangement)
    assert call["options"] == Options(
        overwrite=True, max_shard_size=10**6, device="cpu", backend="torch", memory_budget=2048, resume=True
    )
    assert call["progress"] is None


# Another value than the default of each, as it is written and as the configuration has it.
OTHER = {
    int: ("7", 7),
    float: ("0.5", 0.5),
    float | int: ("16", 16),
    tuple[str, ...]: ("a*", ("a*",)),
    tuple[tuple[str, float | int], ...]: ("b=0.5", (("b", 0.5),)),
}


@pytest.mark.parametrize("key", sorted(METHODS["r2m"].options))
def test_every_option_reaches_the_configuration(configuration: Callable[..., dict[str, Any]], key: str) -> None:
    declared = FLAGS[key]
    if declared.kind is bool:
        words, value = [("--no-" if declared.default else "--") + declared.flag], not declared.default
    elif declared.choices:
        value = next(choice for choice in declared.choices if choice != declared.default)
        words = [flag(key), value]
    else:
        text, value = OTHER[declared.kind]
        words = [flag(key), text]
    more = {"row_power": 0.0} if value == "relative" else {}  # which needs it
    words += [word for field, other in more.items() for word in (flag(field), str(other))]
    assert configuration(*words)["recipe"].config == MergeConfig(**{declared.name: value, **more})


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ("--method weight_average", MergeConfig.weight_average()),
        ("--method weight_average --extra drop", replace(MergeConfig.weight_average(), extra="drop")),
        ("--method task_arithmetic", MergeConfig.task_arithmetic(0.3)),
        ("--method task_arithmetic --scale 0", MergeConfig.task_arithmetic(0.0)),
        ("--method cart", MergeConfig.cart(0.1, 1.0)),
        ("--method cart --rank 4 --scale 0.5 --seed 3", replace(MergeConfig.cart(4, 0.5), seed=3)),
        ("--method star", MergeConfig.star(0.4)),
        ("--method star --rank 0.7", MergeConfig.star(0.7)),
        ("--method score --scale 0.9 --svd exact", MergeConfig.score(0.9).replace(svd="exact")),
        ("--method swudi --descent-steps 12 --scale 1.2", MergeConfig.swudi(12, 1.2)),
        ("--method mono_soup", MergeConfig.mono_soup()),
        ("--method tsv_m --scale 0.8 --seed 3", replace(MergeConfig.tsv_m(0.8), seed=3)),
        ("--method iso_c --scale 0.5", MergeConfig.iso_c(0.5)),
        ("--method ties --density 0.1", MergeConfig.ties(0.1, 1.0)),
        ("--method ties --scale 0.5", MergeConfig.ties(0.2, 0.5)),
        ("--method dare --density 0.5 --seed 2", replace(MergeConfig.dare(0.5, 0.3), seed=2)),
        ("--eta 0 --center --no-norm-match", MergeConfig.r2m(eta=0, center=True, norm_match=False)),
        ("--no-center --norm-match", MergeConfig.r2m()),
        ("--seed 0", MergeConfig.r2m()),
        ("--rank 0.2 --row-power 2", MergeConfig.r2m(rank=0.2, row_power=2.0)),
        ("--method r2m_truncated --eta 0.3", make_config("r2m_truncated", {}).replace(eta=0.3)),
        ("--method r2m_paper --rank 0.05", MergeConfig.r2m_paper(rank=0.05)),
        ("--method weight_average --scale-by column", replace(MergeConfig.weight_average(), scale="column")),
    ],
)
def test_methods(configuration: Callable[..., dict[str, Any]], words: str, config: MergeConfig) -> None:
    assert configuration(*words.split())["recipe"].config == config


@pytest.mark.parametrize(
    ("text", "rank"),
    [("16", 16), ("1", 1), ("1.0", 1.0), ("0.1", 0.1), ("1e-1", 0.1), (".5", 0.5), (" 3 ", 3)],
)
def test_a_point_makes_a_rank_a_ratio(configuration: Callable[..., dict[str, Any]], text: str, rank: float) -> None:
    found = configuration("--rank", text)["recipe"].config.rank
    assert found == rank
    assert type(found) is type(rank)


def test_the_help_states_choices_and_the_defaults_of_every_method() -> None:
    for key, declared in FLAGS.items():
        shown = HELP[key]
        assert shown.help is not None
        assert shown.help.startswith(declared.sentence)
        if declared.choices:
            assert isinstance(shown.type, click.Choice)
            assert tuple(shown.type.choices) == declared.choices
        for name, method in OFFERED.items():
            default = method.default(key) if key in method.options else None
            if default is not None and default != ():
                assert declared.shown(default) in shown.help.partition("[default: ")[2], (key, name)
    assert all(declared.section == "" for name, declared in OPTIONS.items() if declared.key not in FLAGS), "no flag"
    for key, declared in {**OUTPUT, **ARRANGEMENT}.items():
        kind = HELP[declared.key].type
        assert (tuple(kind.choices) if isinstance(kind, click.Choice) else ()) == declared.choices, key


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("rank", "0.4; 1.0 in r2m_paper"),  # others may follow
        ("scale", "0.3 in task_arithmetic"),
        ("density", "0.2]"),
        ("center", "no-center; center in r2m_centred"),
        ("tolerance", "never]"),
        ("exclude", "*ln*, *bias* in r2m_paper]"),
    ],
)
def test_defaults_in_the_help(key: str, text: str) -> None:
    assert (HELP[key].help or "").partition("  [default: ")[2].startswith(text)
    assert "[default" not in (HELP["keep"].help or "")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "r2m"])
def test_an_option_that_a_method_does_not_use_is_refused(method: str) -> None:
    # Its own values: of two methods' defaults not every pair goes together.
    own = make_config(method, {})
    for key, declared in FLAGS.items():
        value = 1.0 if key == "scale" else getattr(own, declared.name)
        if key in METHODS[method].options:
            make_config(method, {key: value})
        else:
            with pytest.raises(InvalidInput, match=f"^{flag(key)}: not used by the method '{method}', which uses --"):
                make_config(method, {key: value})


def write_bad_files(checkpoints: Checkpoints) -> None:
    whole = Path("fs.safetensors").read_bytes()
    Path("truncated.st").write_bytes(whole[:-10])
    Path("empty.st").write_bytes(b"")
    Path("garbage.st").write_bytes(b"\xa5" * 1000)
    Path("huge.st").write_bytes(b"\xff" * 8 + whole[8:])
    Path("folder").mkdir()
    torch.save(torch.nn.Linear(2, 2), "folder/clip.pth")
    expert = checkpoints.experts["fs"]
    save_file({name: tensor for name, tensor in expert.items() if name != "block.bias"}, "missing.st")
    save_file({**expert, "head.weight": torch.ones(2)}, "extra.st")
    save_file({**expert, "block.weight": torch.ones(24, 18)}, "shape.st")
    save_file({**expert, "position_ids": torch.ones(7)}, "dtype.st")
    nan = expert["block.weight"].clone()
    nan[3, 4] = float("nan")
    save_file({**expert, "block.weight": nan}, "nan.st")
    nan[3, 4] = float("inf")
    save_file({**checkpoints.base, "block.weight": nan}, "inf.st")
    save_file({"position_ids": torch.arange(7)}, "integers.st")


RANK = "expected a ratio in (0, 1] or a whole number of at least 1, got"
FILES = "--base base.safetensors --expert x={} --out new/out"
DAMAGED = "not a whole safetensors file"
UNFIT = "does not fit base (base.safetensors):"
BAD_INPUT = {
    "no such base": (
        "--base no/where --expert fs.safetensors --out new/out",
        "base (no/where): no such file or directory",
    ),
    "no such expert": (FILES.format("./no/"), "expert 'x' (./no/): no such file or directory"),
    "truncated": (
        FILES.format("truncated.st"),
        f"expert 'x' (truncated.st): {DAMAGED}: it is cut off, or longer than its header says",
    ),
    "empty": (FILES.format("empty.st"), "expert 'x' (empty.st): the file is empty"),
    "garbage": (
        FILES.format("garbage.st"),
        f"expert 'x' (garbage.st): {DAMAGED}: its header would be larger than the format allows",
    ),
    "huge header": (
        FILES.format("huge.st"),
        f"expert 'x' (huge.st): {DAMAGED}: its header would be larger than the format allows",
    ),
    "torch.save": (
        FILES.format("folder"),
        "expert 'x' (folder): file 'clip.pth': holds 'torch.nn.modules.linear.Linear', which could run code",
    ),
    "missing": (
        FILES.format("missing.st"),
        f"expert 'x' (missing.st) {UNFIT} missing: 'block.bias' (float32 [24])",
    ),
    "extra": (
        FILES.format("extra.st"),
        f"expert 'x' (extra.st) {UNFIT} extra: 'head.weight' (float32 [2]) is not in the base",
    ),
    "shape": (
        FILES.format("shape.st"),
        f"expert 'x' (shape.st) {UNFIT} shape: 'block.weight' expected [24, 17], got [24, 18]",
    ),
    "dtype": (
        FILES.format("dtype.st"),
        f"expert 'x' (dtype.st) {UNFIT} dtype: 'position_ids' expected int64, got float32",
    ),
    "NaN": (
        FILES.format("nan.st"),
        "expert 'x' (nan.st): tensor 'block.weight' holds NaN or Inf in 1 of 408 elements",
    ),
    "Inf in the base": (
        "--base inf.st --expert fs.safetensors --out new/out",
        "base (inf.st): tensor 'block.weight' holds NaN or Inf in 1 of 408 elements",
    ),
    "integers only": (
        "--base integers.st --expert integers.st --out new/out",
        "base (integers.st): nothing to merge",
    ),
    "out exists": (
        "--base base.safetensors --expert fs.safetensors --out folder",
        "out (folder): exists already; --overwrite replaces the output of a former merge",
    ),
    "out is an input": (
        "--base base.safetensors --expert fs.safetensors --out base.safetensors --overwrite",
        "out (base.safetensors): is or holds the input base.safetensors, and inputs are never written to",
    ),
    "duplicate names": (
        FILES.format("fs.safetensors") + " --expert x=fr.safetensors",
        "expert name 'x' is given 2 times; names must differ",
    ),
    "empty name": (
        "--base base.safetensors --expert =fs.safetensors --out new/out",
        "expert '=fs.safetensors': expected [NAME=]PATH, got an empty NAME",
    ),
    **{
        f"rank {text}": (FILES.format("fs.safetensors") + f" --rank {text}", f"rank: {RANK} {shown}")
        for text, shown in {
            "0": "0",
            "-1": "-1",
            "1.5": "1.5",
            "0.0": "0.0",
            "nan": "nan",
            "few": "'few'",
        }.items()
    },
    "eta NaN": (
        FILES.format("fs.safetensors") + " --eta nan",
        "eta: expected a finite number of at least 0, got nan",
    ),
    "eta text": (
        FILES.format("fs.safetensors") + " --eta much",
        "Invalid value for '--eta': 'much' is not a valid float.",
    ),
    "method": (
        FILES.format("fs.safetensors") + " --method slerp",
        "Invalid value for '--method': 'slerp' is not one of 'r2m', 'r2m_paper', 'r2m_centred', 'r2m_truncated'",
    ),
    "unused option": (
        FILES.format("fs.safetensors") + " --method weight_average --eta 1",
        "--eta: not used by the method 'weight_average', which uses --average, --core-scale, --extra, --keep, "
        "--scale-by",
    ),
    "size": (
        FILES.format("fs.safetensors") + " --max-shard-size 5XB",
        "max_shard_size: expected a positive size such as 4GiB or 500MB, got '5XB'",
    ),
    "backend": (FILES.format("fs.safetensors") + " --backend cublas", "backend: expected one of"),
    "no expert": ("--base base.safetensors --out new/out", "Missing option '--expert', or a recipe."),
    "no such device": (
        FILES.format("fs.safetensors") + " --device gpu",
        "device: expected one such as cpu, cuda or cuda:1, got 'gpu'",
    ),
    "no option of that name": (
        FILES.format("fs.safetensors") + " --etta 1",
        "No such option '--etta'.",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_sentence(
    case: str, checkpoints: Checkpoints, command: Command, tmp_path: Path, fingerprint: Callable[[Path], Any]
) -> None:
    write_bad_files(checkpoints)
    words, sentence = BAD_INPUT[case]
    before = fingerprint(tmp_path)
    result = command("merge", *words.split())
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"Error: {sentence}"), result.err
    assert result.err.count("Error") == 1
    assert result.out == ""
    assert fingerprint(tmp_path) == before
    assert not Path("new").exists()
    assert not list(Path().glob(".*"))


def test_a_failure_of_the_machine_names_the_file(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "fs.safetensors")

    monkeypatch.setattr(r2m.job, "open_checkpoint", refuse)
    result = command("merge", *checkpoints.arguments, "--out", "out")
    assert (result.code, result.err) == (1, "Error: fs.safetensors: permission denied\n")


def test_exit_codes_come_with_the_kinds_of_errors() -> None:
    errors = [BadCheckpoint("x"), BackendUnavailable("x"), LostProcess("x"), OSError("x"), ValueError("x")]
    assert [exit_code(error) for error in errors] == [2, 2, 1, 1, None]


def test_help_and_version(command: Command) -> None:
    assert command("--help").code == 0
    assert "merge" in command().err  # no arguments: the help, as an error
    sections = [line for line in command("merge", "--help").out.splitlines() if line and line[0] != " "]
    assert sections[1:] == [
        "Files:",
        "Method:",
        "Real subspace:",
        "Residual truncation:",
        "Strength of the residuals:",
        "Running:",
        "Other:",
    ]
    result = command("--version")
    assert (result.code, result.out) == (0, f"r2m {r2m_kernels.__version__}\n")


def test_help_does_not_wait_for_torch(start: Start) -> None:
    with start("merge", "--help", python=("-X", "importtime")) as process:
        out, err = process.communicate(timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert process.returncode == 0
    assert "--core-scale" in out
    assert "r2m.commands.merge" in imported
    assert not {"torch", "numpy", "rich", "yaml", "safetensors"} & imported


def test_a_process_on_a_terminal_without_such_letters_merges(checkpoints: Checkpoints, start: Start) -> None:
    with start(
        "merge",
        *checkpoints.arguments,
        "--out",
        "out‖",
        python=(),
        environment={"PYTHONIOENCODING": "latin-1"},
    ) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Merged 3 experts into out?: " in out
    assert set(load_file("out‖/model.safetensors")) == set(checkpoints.base)


def test_a_process_with_bad_input_ends_with_2(checkpoints: Checkpoints, start: Start) -> None:
    write_bad_files(checkpoints)
    arguments = ["--base", "base.safetensors", "--expert", "truncated.st", "--out", "out"]
    with start("merge", *arguments) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("Error: expert 'truncated.st' (truncated.st): not a whole safetensors file")
    assert err.count("\n") == 1


def test_a_process_without_space_ends_with_1(checkpoints: Checkpoints, start: Start) -> None:
    limits = {resource.RLIMIT_FSIZE: 20_000}
    for path in (checkpoints.base_path, *checkpoints.paths.values()):
        save_file({**load_file(path), "large": torch.randn(6000)}, path)
    with start("merge", *checkpoints.arguments, "--out", "a/out", "--quiet", limits=limits) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert err == (
        "Error: a/out/model.safetensors: file too large\n"
        "The work so far is kept in a/out.partial; --resume goes on from there.\n"
    )
    assert not Path("a/out").exists()
    with start("merge", *checkpoints.arguments, "--out", "a/out", "--quiet", "--resume") as process:
        assert process.communicate(timeout=120) == ("", "")
    assert os.listdir("a") == ["out"]


def test_ctrl_c_ends_a_process_with_130(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        save_file({str(i): torch.randn(700, 700, generator=generator) for i in range(12)}, f"{name}.safetensors")
    arguments = "--base base.safetensors --expert a.safetensors --expert b.safetensors --svd exact --out x/out"
    with start("merge", *arguments.split()) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("comparing experts: 12 tensors")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "\nStopped.\n" in err
    assert "Traceback" not in err
    assert out == ""
    assert not Path("x/out").exists()


def test_the_demo_is_called_with_its_options(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    calls: list[Any] = []

    class Demo:
        @staticmethod
        def run_demo(out: Path, *, seed: int, quick: bool, console: Any) -> None:
            calls.append((out, seed, quick, type(console).__name__))

    monkeypatch.setitem(sys.modules, "r2m.demo", Demo)
    assert command("demo").code == 0
    assert command("demo", "--out", "x", "--seed", "3", "--quick").code == 0
    assert calls == [(Path("demo"), 0, False, "Console"), (Path("x"), 3, True, "Console")]
