"""``r2m report``: the page holds what the report and the evaluation say, hurts nobody, and can be looked at."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from r2m.places import new_file
from r2m.reporting.target import check_target, put_files

from r2m_kernels.errors import BadFile

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]


class Reader(HTMLParser):
    """The page's visible text and what it would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            inside = (value or "").startswith(("#", "data:image/png;base64,"))
            if name in ("src", "href", "xlink:href") and not inside:
                self.outside.append(f"{tag} {value}")
            if name.startswith("on"):
                self.outside.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def write_scores(name: str, quality: float, path_of: Callable[[int], str] = str) -> str:
    dice = np.random.default_rng(0)
    with open(name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "probability", "dataset"])
        for video in range(30):
            label = video % 2
            value = float(np.clip(0.5 + quality * (label - 0.5) + 0.2 * dice.normal(), 0, 1))
            writer.writerow([path_of(video), label, value, "celeb"])
        writer.writerow(["x", 1, 0.7, "whichisreal"])
    return name


def merged(checkpoints: Checkpoints, command: Command, *options: str) -> dict[str, Any]:
    assert command("merge", *checkpoints.arguments, "--out", "out", "--quiet", *options).code == 0
    report = json.loads(Path("out/r2m_report.json").read_text())
    assert isinstance(report, dict)
    return report


def written(*pictures: str) -> list[str]:
    """Files of a page with these pictures."""
    return sorted([f"{n}.{e}" for n in pictures for e in ("csv", "png", "pdf")] + ["report.html", "r2m_page.json"])


GEOMETRY = ("cosines", "core", "kept_energy", "lengths", "norms")


def test_the_page_says_what_the_report_says(checkpoints: Checkpoints, command: Command) -> None:
    report = merged(checkpoints, command)
    Path("kept.json").write_text(json.dumps(report))
    result = command("report", "out")
    assert (result.code, result.out) == (
        0,
        "out.report/report.html, which any browser opens, and 16 files beside it\nNext: r2m card out\n",
    )
    assert sorted(os.listdir("out.report")) == written(*GEOMETRY)
    page = Reader(Path("out.report/report.html").read_text())
    text = " ".join(page.words)
    assert all(warning in text for warning in report["warnings"])
    assert "truncation kept 1" not in text
    assert "How well it detects is not known yet" in text
    report["tensors"][0]["kept_energy"] = dict.fromkeys(report["experts"], 0.1)
    for row in report["tensors"][1:]:
        row["kept_energy"] = None
    Path("out/r2m_report.json").write_text(json.dumps(report))
    assert command("report", "out", "--to", "noisy").code == 0
    noisy = " ".join(Reader(Path("noisy/report.html").read_text()).words)
    assert "truncation kept 10% of the residuals' energy" in noisy
    report = json.loads(Path("kept.json").read_text())
    assert all(name in text for name in ("fs", "fr", "efs", "block.weight", "conv.weight"))
    assert f"{report['core']['norm_ratio_to_mean']:.4g}" in text
    rows = list(csv.DictReader(Path("out.report/core.csv").read_text().splitlines()))
    assert {row["expert"]: float(row["coefficient"]) for row in rows} == report["core"]["coefficients"]
    rows = list(csv.DictReader(Path("out.report/norms.csv").read_text().splitlines()))
    assert len({round(float(row["after"]), 9) for row in rows}) == 1  # matched
    kept = {row["name"]: row["kept_energy"] for row in report["tensors"] if row.get("kept_energy")}
    rows = list(csv.DictReader(Path("out.report/kept_energy.csv").read_text().splitlines()))
    assert {row["tensor"]: float(row["fs"]) for row in rows} == {name: one["fs"] for name, one in kept.items()}


def test_the_page_stands_alone(checkpoints: Checkpoints, command: Command) -> None:
    merged(checkpoints, command, "--rank", "1.0")
    assert command("report", "out").code == 0
    text = Path("out.report/report.html").read_text()
    page = Reader(text)
    assert page.outside == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3  # lengths, core, norms
    assert "What truncation kept" not in text  # all of it
    assert "@import" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {f"#{one}" for one in ids} >= {*re.findall(r'<a href="([^"]+)"', text)}
    # The same merge gives the same page, to the byte.
    assert command("report", "out", "--to", "again").code == 0
    for name in set(os.listdir("again")) - {"r2m_page.json"}:
        assert Path("again", name).read_bytes() == Path("out.report", name).read_bytes(), name


def test_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "page"

    def put(*names: str, overwrite: bool = False) -> None:
        check_target(target, overwrite)
        files = {name: f"{name} of {names}".encode() for name in names}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        put_files(target, files, {"sources": {}, "written": digests})

    put("report.html", "core.csv")
    with pytest.raises(BadFile, match=r"holds a page already; --overwrite replaces it"):
        put("report.html")
    for name in ("notes.txt", "core.csv"):  # somebody's, and ours that somebody has changed
        before = target.joinpath(name).read_bytes() if (target / name).exists() else None
        target.joinpath(name).write_text("mine")
        with pytest.raises(BadFile, match=f"holds '{name}', which no r2m report wrote; move it away"):
            put("report.html", overwrite=True)
        assert target.joinpath(name).read_text() == "mine"
        target.joinpath(name).unlink() if before is None else target.joinpath(name).write_bytes(before)
    put("report.html", "roc.csv", overwrite=True)
    assert sorted(os.listdir(target)) == ["r2m_page.json", "report.html", "roc.csv"]  # no picture of the former page
    put("report.html", "core.csv", overwrite=True)
    record = json.loads(target.joinpath("r2m_page.json").read_text())
    record["written"]["notes.txt"] = [hashlib.sha256(b"mine").hexdigest()]  # somebody would have it removed
    target.joinpath("r2m_page.json").write_text(json.dumps(record))
    target.joinpath("notes.txt").write_text("mine")
    with pytest.raises(BadFile, match="was changed since"):
        put("report.html", overwrite=True)


def test_a_former_page_cut_off_midway_is_still_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, names = tmp_path / "page", ("report.html", "core.csv", "roc.csv")
    contents = [{name: f"{name} {turn}".encode() for name in names} for turn in range(3)]

    def put(files: dict[str, bytes]) -> None:
        check_target(target, overwrite=True)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        put_files(target, files, {"sources": {}, "written": digests})

    put(contents[0])
    done = []

    def killed(path: Path, content: bytes) -> None:
        done.append(path)
        if len(done) == 3:
            raise KeyboardInterrupt
        new_file(path, content)

    monkeypatch.setattr("r2m.reporting.target.new_file", killed)
    with pytest.raises(KeyboardInterrupt):
        put(contents[1])
    monkeypatch.undo()
    assert {target.joinpath(name).read_bytes() for name in names} == {b"report.html 1", b"core.csv 0", b"roc.csv 0"}
    put(contents[2])
    assert {name: target.joinpath(name).read_bytes() for name in names} == contents[2]


def test_an_evaluation_and_a_sweep_are_shown(checkpoints: Checkpoints, command: Command) -> None:
    merged(checkpoints, command)
    assert command("sweep", "out", "--to", "swept", "--eta", "0.5,1", "--quiet").code == 0
    for name, quality in (("fs", 0.3), ("r2m", 0.8)):
        write_scores(f"{name}.csv", quality)
    assert (
        command(
            "evaluate", "--scores", "fs=fs.csv", "--scores", "r2m=r2m.csv", "--out", "eval", "--bootstrap", "5"
        ).code
        == 0
    )
    content = json.loads(Path("eval/evaluation.json").read_text())
    # No point is in the evaluation: they are drawn all the same.
    assert command("report", "out", "--evaluation", "eval", "--sweep", "swept", "--to", "points").code == 0
    rows = list(csv.DictReader(Path("points/sweep.csv").read_text().splitlines()))
    assert [(row["eta"], row["auc"]) for row in rows] == [("0.5", ""), ("1.0", "")]
    assert "No point is in the evaluation" in Path("points/report.html").read_text()
    for point, auc in (("eta=0.5", 0.6), ("eta=1", 0.7)):
        shutil.copy("r2m.csv", f"swept/{point}/scores.csv")
        source = os.path.abspath(f"swept/{point}/scores.csv")
        one = {"datasets": {}, "average": {"auc": auc}, "source": source, "detector": None}
        content["models"][point] = one
    Path("eval/evaluation.json").write_text(json.dumps(content))
    result = command("report", "out", "--evaluation", "eval", "--to", "page")  # whose sweep it is, is known
    assert result.code == 0, result.err
    rows = list(csv.DictReader(Path("page/sweep.csv").read_text().splitlines()))
    assert [(row["eta"], row["auc"]) for row in rows] == [("0.5", "0.6"), ("1.0", "0.7")]
    rows = list(csv.DictReader(Path("page/table.csv").read_text().splitlines()))
    assert [(row["model"], row["role"]) for row in rows[:2]] == [("r2m", "this merge"), ("fs", "specialist")]
    assert float(rows[0]["celeb"]) == content["models"]["r2m"]["datasets"]["celeb"]["auc"]
    assert rows[0]["whichisreal"] == ""  # one class: nothing, not 0
    roc = list(csv.DictReader(Path("page/roc.csv").read_text().splitlines()))
    assert {(row["dataset"], row["model"]) for row in roc} >= {("celeb", "fs"), ("celeb", "r2m")}
    assert {row["dataset"] for row in roc} == {"celeb"}
    counts = [
        row
        for row in csv.DictReader(Path("page/scores.csv").read_text().splitlines())
        if (row["dataset"], row["model"]) == ("celeb", "fs")
    ]
    assert sum(int(row["real"]) for row in counts) == sum(int(row["fake"]) for row in counts) == 15
    text = Path("page/report.html").read_text()
    assert "ROC curves" in " ".join(Reader(text).words)
    assert os.getcwd() not in text  # where things lie here


@pytest.mark.parametrize("method", ["r2m_truncated", "r2m"])
def test_spectra_are_the_residuals_own(method: str, checkpoints: Checkpoints, command: Command) -> None:
    report = merged(checkpoints, command, "--method", method)
    assert command("report", "out", "--spectra", "9").code == 0
    assert len([name for name in os.listdir("out.report") if name.startswith("spectrum")]) == 3 * 2  # both matrices
    rows = list(csv.DictReader(Path("out.report/spectrum-0.csv").read_text().splitlines()))
    taus = {name: one["block.weight"] - checkpoints.base["block.weight"] for name, one in checkpoints.experts.items()}
    core = sum(report["core"]["coefficients"][name] * tau for name, tau in taus.items())
    tensor = next(row for row in report["tensors"] if row["name"] == "block.weight")
    first = [row for row in rows if row["expert"] == "fs"]
    expected = np.linalg.svd((taus["fs"] - core).numpy(), compute_uv=False)
    title = "block.weight" in Path("out.report/report.html").read_text()
    assert title
    assert [float(row["singular value"]) for row in first] == pytest.approx(expected.tolist(), rel=1e-4)
    assert sum(row["kept"] == "True" for row in first) == tensor["rank"]
    # What is kept of the energy is what the report says.
    assert tensor["rank"] == {"r2m_truncated": 2, "r2m": 7}[method]
    energy = (expected[: tensor["rank"]] ** 2).sum() / (expected**2).sum()
    assert tensor["kept_energy"]["fs"] == pytest.approx(energy, rel=0.05)


def test_spectra_of_experts_whose_preprocessing_was_settled(checkpoints: Checkpoints, command: Command) -> None:
    own = {"size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    models = []
    for name, size in (("fs", 224), ("fr", 256)):
        Path(name).mkdir()
        Path(f"{name}.safetensors").rename(f"{name}/model.safetensors")
        said = {"size": size, "image_mean": own["mean"], "image_std": own["std"]}
        Path(name, "preprocessor_config.json").write_text(json.dumps(said))
        models.append({"model": name})
    recipe = {"base_model": "base.safetensors", "models": models, "preprocessing": own}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert command("merge", "recipe.yaml", "--out", "out", "--quiet").code == 0
    result = command("report", "out", "--spectra", "1")
    assert (result.code, result.err) == (0, "")


def test_spectra_of_what_has_no_residuals(checkpoints: Checkpoints, command: Command) -> None:
    merged(checkpoints, command, "--method", "weight_average")
    result = command("report", "out", "--spectra", "2")
    assert (result.code, result.err) == (2, "Error: spectra: weight_average has no residuals\n")
    assert not Path("out.report").exists()


def test_names_are_text_and_nothing_else(checkpoints: Checkpoints, command: Command) -> None:
    odd = "<script>alert(1)</script> $x_$ & \x1b[31m"
    arguments = ["--base", "base.safetensors", "--expert", f"{odd}=fs.safetensors", "--expert", "fr.safetensors"]
    assert command("merge", *arguments, "--out", "out", "--quiet").code == 0
    assert command("report", "out").code == 0
    text = Path("out.report/report.html").read_text()
    page = Reader(text)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in " ".join(page.words)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("report base.safetensors", "base.safetensors: expected the output of a merge, with r2m_report.json"),
        ("report out --to out", "to (out): exists already and is not an empty directory"),
        ("report out --evaluation out", "out: expected a directory of r2m evaluate, with evaluation.json"),
        ("report out --sweep out", "out: expected a directory of r2m sweep, with sweep.csv"),
    ],
)
def test_what_is_refused(arguments: str, sentence: str, checkpoints: Checkpoints, command: Command) -> None:
    merged(checkpoints, command)
    before = sorted(os.listdir())
    result = command(*arguments.split())
    assert (result.code, result.err) == (2, f"Error: {sentence}\n")
    assert sorted(os.listdir()) == before
