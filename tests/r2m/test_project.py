"""The output of a merge gone on with: whatever is reused, the bytes are those of a merge from scratch."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import r2m
import torch
import yaml
from r2m.merge import merge_files
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from safetensors.torch import load_file, save_file

from r2m_kernels import MergeConfig, analyze
from r2m_kernels.config import make_config
from r2m_kernels.streaming import sources_digest

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
OUTPUT = "model.safetensors"


def moved(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


def more_experts(checkpoints: Checkpoints, count: int) -> dict[str, str]:
    """As many again, name → path."""
    paths = {}
    for seed in range(10, 10 + count):
        tensors = moved(checkpoints.base, seed)
        paths[f"e{seed}"] = f"e{seed}.safetensors"
        save_file(tensors, paths[f"e{seed}"])
    return paths


def scratch(experts: dict[str, str], config: MergeConfig, out: str = "scratch", **options: Any) -> bytes:
    merge_files(Recipe("base.safetensors", Expert.each(experts), config), out, Options(overwrite=True, **options))
    return Path(out, OUTPUT).read_bytes()


def gram_bytes(out: str) -> int:
    """What the search for the Real subspace read."""
    steps = json.loads(Path(out, "r2m_report.json").read_text())["steps"]
    return int(next(step["bytes_read"] for step in steps if step["step"] == "task Gram"))


@pytest.mark.parametrize("seed", range(20))
def test_sequences_of_adding_and_removing(seed: int, checkpoints: Checkpoints, command: Command) -> None:
    dice = random.Random(seed)
    method = dice.choice(["r2m", "r2m_truncated", "ties", "weight_average", "star"])
    everyone = {**checkpoints.paths, **more_experts(checkpoints, 3)}
    there = dict(dice.sample(sorted(everyone.items()), dice.randint(2, 4)))
    words = [word for name, path in there.items() for word in ("--expert", f"{name}={path}")]
    assert command("merge", "--base", "base.safetensors", *words, "--method", method, "--out", "out").code == 0
    for _ in range(4):
        absent = sorted(everyone.keys() - there.keys())
        if len(there) > 1 and (dice.random() < 0.5 or not absent):
            name = dice.choice(sorted(there))
            del there[name]
            assert command("remove", "out", "--expert", name, "--quiet").code == 0
            assert gram_bytes("out") == 0  # all of it was known
        else:
            name = dice.choice(absent)
            there[name] = everyone[name]
            assert command("add", "out", "--expert", f"{name}={there[name]}", "--quiet").code == 0
        recipe = yaml.safe_load(Path("out/r2m_config.yaml").read_text())
        assert [model["name"] for model in recipe["models"]] == list(there)
        config = MergeConfig(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in recipe["parameters"].items()}
        )
        assert Path("out", OUTPUT).read_bytes() == scratch(there, config)
    assert sorted(os.listdir()) == sorted(["base.safetensors", "out", "scratch", *everyone.values()])


def test_several_come_and_go_at_once(checkpoints: Checkpoints, command: Command) -> None:
    everyone = {**checkpoints.paths, **more_experts(checkpoints, 2)}
    (first, path), *others = everyone.items()
    assert command("merge", "--base", "base.safetensors", "--expert", f"{first}={path}", "--out", "out").code == 0
    words = [word for name, path in others for word in ("--expert", f"{name}={path}")]
    assert command("add", "out", *words, "--weight", "2").code == 0
    weights = (1.0, *[2.0] * len(others))
    assert Path("out", OUTPUT).read_bytes() == scratch(everyone, MergeConfig(weights=weights))
    refused = command("remove", "out", "--expert", others[0][0], "--expert", "nobody")
    assert (refused.code, refused.err[:36]) == (2, "Error: expert 'nobody': there is non")
    assert command("remove", "out", "--expert", others[0][0], "--expert", others[-1][0]).code == 0
    left = {name: path for name, path in everyone.items() if name not in (others[0][0], others[-1][0])}
    assert Path("out", OUTPUT).read_bytes() == scratch(left, MergeConfig(weights=weights[: len(left)]))


def test_what_is_known_of_other_inputs_or_options_is_not_taken(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    save_file(moved(checkpoints.base, 7), "fr.safetensors")
    assert command("remove", "out", "--expert", "fs").code == 0
    rest = {name: path for name, path in checkpoints.paths.items() if name != "fs"}
    assert gram_bytes("out") > 0
    assert Path("out", OUTPUT).read_bytes() == scratch(rest, MergeConfig.r2m())
    # Another backend finds other bits.
    assert command("merge", *checkpoints.arguments, "--out", "out", "--overwrite").code == 0
    assert command("remove", "out", "--expert", "fs", "--backend", "torch").code == 0
    assert gram_bytes("out") > 0
    assert Path("out", OUTPUT).read_bytes() == scratch(rest, MergeConfig.r2m(), backend="torch")
    # A state that says something else is not believed either.
    Path("out/r2m_state.json").write_text('{"state": {"order of experts": 3}}')
    assert command("remove", "out", "--expert", "efs").code == 0
    assert Path("out", OUTPUT).read_bytes() == scratch({"fr": "fr.safetensors"}, MergeConfig.r2m())


def test_what_other_code_found_is_not_taken(checkpoints: Checkpoints, command: Command) -> None:
    for other in (False, True):
        assert command("merge", *checkpoints.arguments, "--out", "out", "--backend", "native", "--overwrite").code == 0
        path = Path("out/r2m_state.json")
        content = json.loads(path.read_text())
        assert content["state"]["sources"] == sources_digest("native", Path(str(r2m.__file__)).parent)
        if other:
            content["state"]["sources"] = "0123456789abcdef"
            path.write_text(json.dumps(content))
        assert command("remove", "out", "--expert", "fs", "--backend", "native").code == 0
        assert (gram_bytes("out") > 0) is other


def test_weights_layout_and_format_stay(checkpoints: Checkpoints, command: Command) -> None:
    new = more_experts(checkpoints, 1)
    Path("recipe.yaml").write_text(
        "base_model: base.safetensors\nformat: pth\ndtype: bfloat16\n"
        "models: [{model: fs.safetensors, name: fs, weight: 2}, {model: fr.safetensors, name: fr}]"
    )
    assert command("merge", "recipe.yaml", "--out", "out", "--max-shard-size", "1kB").code == 0
    assert command("add", "out", "--expert", "e10=e10.safetensors", "--weight", "3").code == 0
    recipe = yaml.safe_load(Path("out/r2m_config.yaml").read_text())
    assert recipe["parameters"]["weights"] == [2.0, 1.0, 3.0]
    assert (recipe["format"], recipe["dtype"]) == ("pth", "bfloat16")
    assert command("remove", "out", "--expert", "fr").code == 0
    assert yaml.safe_load(Path("out/r2m_config.yaml").read_text())["parameters"]["weights"] == [2.0, 3.0]
    experts = {"fs": checkpoints.paths["fs"], **new}
    config = MergeConfig.r2m(weights=(2, 3))
    merge_files(Recipe("base.safetensors", Expert.each(experts), config, dtype="bfloat16", format="pth"), "again")
    assert Path("out/model.pth").read_bytes() == Path("again/model.pth").read_bytes()
    assert json.loads(Path("out/r2m_state.json").read_text())["state"]["max_shard_size"] == 1000


def test_an_experts_own_names_are_its_own(checkpoints: Checkpoints, command: Command) -> None:
    save_file({f"module.{name}": tensor for name, tensor in checkpoints.experts["efs"].items()}, "wrapped.safetensors")
    words = [word for name in ("fs", "fr") for word in ("--expert", f"{name}={checkpoints.paths[name]}")]
    assert command("merge", "--base", "base.safetensors", *words, "--out", "out").code == 0
    assert command("add", "out", "--expert", "efs=wrapped.safetensors", "--rename", "module.=").code == 0
    assert Path("out", OUTPUT).read_bytes() == scratch(checkpoints.paths, MergeConfig.r2m())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("add out --expert fs=fr.safetensors", "expert 'fs': there is one already; another name, or remove that one"),
        ("add out --expert new=missing", "expert 'new' (missing): no such file or directory"),
        ("add out --expert new=fr.safetensors --weight -1", "weights[3]: expected a positive number, got -1"),
        (
            "add base.safetensors --expert fr.safetensors",
            "base.safetensors: expected the output of a merge, with a r2m_",
        ),
        ("remove out --expert fss", "expert 'fss': there is none; there are fs, fr, efs; did you mean 'fs'?"),
        ("sweep out --to s", "sweep: expected values of one option at least: rank, eta, core_scale, row_power"),
        ("sweep out --to s --eta 1,1", "eta: expected different values, got 1, 1"),
        ("sweep out --to s --eta 1,x", "eta: expected a finite number of at least 0, got 'x'"),
        ("sweep out --to s --rank 0.1,3", "rank: expected shares alone or whole numbers alone, got 0.1, 3"),
        ("sweep out --to out --eta 1", "to (out): exists already and is not an empty directory"),
    ],
)
def test_what_is_refused(arguments: str, sentence: str, checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    before = Path("out", OUTPUT).read_bytes()
    result = command(*arguments.split())
    assert result.code == 2
    assert result.err.startswith(f"Error: {sentence}"), result.err
    assert Path("out", OUTPUT).read_bytes() == before
    assert not {"s", "out.partial"} & set(os.listdir())


def test_the_last_expert_stays(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", "--base", "base.safetensors", "--expert", "fs=fs.safetensors", "--out", "out").code == 0
    result = command("remove", "out", "--expert", "fs")
    assert (result.code, result.err) == (2, "Error: expert 'fs': it is the only one, and a merge of none is none\n")


@pytest.mark.parametrize(
    ("method", "options", "points"),
    [
        ("r2m_truncated", ["--rank", "0.1,0.3", "--eta", "0.3,0.6"], [(0.1, 0.3), (0.1, 0.6), (0.3, 0.3), (0.3, 0.6)]),
        ("r2m_truncated", ["--rank", "2,5"], [(2, None), (5, None)]),
        ("r2m", ["--eta", "0,0.5,1"], [(None, 0), (None, 0.5), (None, 1)]),
    ],
)
def test_a_sweep_is_one_analysis_merged_again_and_again(
    method: str, options: list[str], points: list[tuple[Any, Any]], checkpoints: Checkpoints, command: Command
) -> None:
    assert command("merge", *checkpoints.arguments, "--method", method, "--out", "out").code == 0
    result = command("sweep", "out", "--to", "swept", *options)
    assert result.code == 0, result.err
    told, following = result.out.splitlines()
    assert told == f"{len(points)} merges in swept, in swept/sweep.csv what they are"
    named = [model.partition("=")[::2] for model in following.split("--model ")[1:]]
    assert [name.replace("-", "=") for name, _ in named] == [
        path.split()[0].removeprefix("swept/") for _, path in named
    ]
    assert len(named) == len(points)
    config = {"r2m_truncated": make_config("r2m_truncated", {}), "r2m": MergeConfig.r2m()}[method]
    largest = max((rank for rank, _ in points if rank is not None), default=config.rank)
    analysis = analyze(checkpoints.base, checkpoints.experts, config, rank=largest)
    rows = list(csv.DictReader(Path("swept/sweep.csv").read_text().splitlines()))
    assert sorted(os.listdir("swept")) == sorted([row["point"] for row in rows] + ["sweep.csv"])
    for row, (rank, eta) in zip(rows, points, strict=True):
        fields = {name: value for name, value in (("rank", rank), ("eta", eta)) if value is not None}
        expected = analysis.merge(**fields)
        found = load_file(Path("swept", row["point"], OUTPUT))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), row
        assert {name: float(row[name]) for name in fields} == {name: float(value) for name, value in fields.items()}
        report = json.loads(Path("swept", row["point"], "r2m_report.json").read_text())
        assert {name: report["config"][name] for name in fields} == fields
        assert float(row["eta used"]) == report["residual"]["eta_used"]
    # Each point is an output like any other.
    assert command("merge", f"swept/{rows[0]['point']}/r2m_config.yaml", "--out", "again").code == 0


def test_a_sweep_reads_once_and_combines_for_each(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    assert command("sweep", "out", "--to", "swept", "--eta", "0.5,1").code == 0
    reports = [json.loads(path.read_text()) for path in sorted(Path("swept").glob("*/r2m_report.json"))]
    first, second = ({step["step"]: step["bytes_read"] for step in report["steps"]} for report in reports)
    assert first["task Gram"] == second["task Gram"] > 0


def test_a_sweep_over_methods_is_each_as_merged_alone(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r2m import sweep

    arguments = [*checkpoints.arguments, "--keep", "conv*"]
    assert command("merge", *arguments, "--rank", "0.3", "--eta", "0.7", "--out", "out").code == 0
    words = ("sweep", "out", "--to", "swept", "--method", "ties:density=0.1,ties,tsv_m,star,r2m", "--rank", "0.2,0.3")
    result = command(*words)
    assert result.code == 0, result.err
    alone = {
        "method=ties,density=0.1": ["--method", "ties", "--density", "0.1"],
        "method=ties": ["--method", "ties"],
        "method=tsv_m": ["--method", "tsv_m"],
        "method=star,rank=0.2": ["--method", "star", "--rank", "0.2"],  # whose ranks have no analysis in common
        "method=star,rank=0.3": ["--method", "star", "--rank", "0.3"],
        # Of the method that out was made by all stays that is not said; both ranks are of one analysis.
        "method=r2m,rank=0.2": None,
        "method=r2m,rank=0.3": ["--rank", "0.3", "--eta", "0.7"],
    }
    rows = list(csv.DictReader(Path("swept/sweep.csv").read_text().splitlines()))
    assert [row["point"] for row in rows] == list(alone)
    assert [(row["method"], row["rank"], row["density"]) for row in rows] == [
        ("ties", "", "0.1"),
        ("ties", "", "0.2"),
        ("tsv_m", "", ""),
        ("star", "0.2", ""),
        ("star", "0.3", ""),
        ("r2m", "0.2", ""),
        ("r2m", "0.3", ""),
    ]
    assert sorted(os.listdir("swept")) == sorted([*alone, "sweep.csv"])
    for number, (point, options) in enumerate(alone.items()):
        report = json.loads(Path("swept", point, "r2m_report.json").read_text())
        assert report["method"] == rows[number]["method"]
        assert report["config"]["keep"] == ["conv*"]
        if options is not None:
            assert command("merge", *arguments, *options, "--out", f"alone{number}").code == 0
            assert Path("swept", point, OUTPUT).read_bytes() == Path(f"alone{number}", OUTPUT).read_bytes()
    config = json.loads(Path("swept/method=r2m,rank=0.2/r2m_report.json").read_text())["config"]
    assert (config["rank"], config["eta"]) == (0.2, 0.7)
    # Cut off and given again: what is whole stays, and only what is missing is analyzed.
    analyzed: list[str] = []
    analyze_job = sweep.Job.analyze
    monkeypatch.setattr(
        sweep.Job, "analyze", lambda job, **more: analyzed.append(job.recipe.method) or analyze_job(job, **more)
    )
    before = {point: Path("swept", point, OUTPUT).stat().st_mtime_ns for point in alone}
    Path("swept/sweep.csv").unlink()
    shutil.rmtree("swept/method=tsv_m")
    assert command(*words).code == 0
    assert analyzed == ["tsv_m"]
    after = {point: Path("swept", point, OUTPUT).stat().st_mtime_ns for point in alone}
    assert {point for point in alone if before[point] != after[point]} == {"method=tsv_m"}


NO_SWEEP = [
    ("--method tys", "method: expected one of 'r2m', "),
    ("--method ties:dense=2", "method: ties: expected OPTION=VALUE, got 'dense=2'; did you mean 'density'?"),
    ("--method ties:density", "method: ties: density: expected density=VALUE, got 'density'"),
    ("--method ties:density=2", "density: expected a number in (0, 1], got 2"),
    ("--method ties:eta=2", "--eta: not used by the method 'ties', which uses "),
    ("--method ties --eta 1,2", "--eta: none of the methods ties uses it"),
    ("--method ties,ties", "sweep: expected different points, got method=ties twice"),
    ("--method r2m:exclude=a", "--exclude: cannot be given here; a recipe's parameters have it"),
    ("--density 0.1", "density: cannot be swept over; expected one of rank, eta, core_scale, row_power"),
    ("", "sweep: expected values of one option at least: rank, eta, core_scale, row_power; or methods"),
]


def test_sweeps_that_cannot_be(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    for words, said in NO_SWEEP:
        result = command("sweep", "out", "--to", "swept", *words.split())
        assert result.code == 2, words
        assert result.err.startswith(f"Error: {said}")
        assert not Path("swept").exists()


def test_a_full_disk_ends_a_sweep_with_whole_points_alone(
    checkpoints: Checkpoints, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from r2m import sweep

    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    complete, calls = sweep.complete, []

    def full(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1].output))
        return complete(*arguments)

    monkeypatch.setattr(sweep, "complete", full)
    result = command("sweep", "out", "--to", "swept", "--eta", "0.5,1,2")
    assert result.code == 1
    assert os.listdir("swept") == ["eta=0.5"]
    assert result.err.endswith("1 whole merges are kept in swept; the same command goes on from there.\n")


def test_a_merge_enters_with_the_number_of_its_specialists(checkpoints: Checkpoints, command: Command) -> None:
    new = more_experts(checkpoints, 1)
    assert command("merge", *checkpoints.arguments, "--out", "three").code == 0
    arguments = ("merge", "--base", "base.safetensors", "--expert", "e10=e10.safetensors")
    assert command(*arguments, "--expert", "old=three", "--out", "four").code == 0
    assert json.loads(Path("four/r2m_report.json").read_text())["specialists"] == {"e10": 1, "old": 3}
    experts = {**new, "old": "three/model.safetensors"}
    assert Path("four", OUTPUT).read_bytes() == scratch(experts, MergeConfig.r2m(weights=(1, 3)))
    # In turn it counts four; and what is said counts more than what is found.
    assert command(*arguments, "--expert", "old=four", "--out", "five").code == 0
    assert json.loads(Path("five/r2m_report.json").read_text())["specialists"] == {"e10": 1, "old": 4}
    Path("equal.yaml").write_text(
        "base_model: base.safetensors\nmodels: [{model: e10.safetensors, weight: 1}, {model: three, weight: 1}]"
    )
    assert command("merge", "equal.yaml", "--out", "equal").code == 0
    assert Path("equal", OUTPUT).read_bytes() == scratch(experts, MergeConfig.r2m(weights=(1, 1)))
