"""The model card: what the Hub reads, licences that are not guessed, numbers that were measured."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from r2m.card import most_restrictive
from safetensors.torch import save_file

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]


def front(out: str) -> dict[str, Any]:
    text = Path(out, "README.md").read_text()
    assert text.startswith("---\n")
    content = yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["mit", "mit", "mit"], "mit"),
        (["mit", "cc-by-4.0"], "cc-by-4.0"),
        (["mit", "cc-by-nc-4.0", "apache-2.0"], "cc-by-nc-4.0"),
        (["mit", None], "unknown"),
        ([None, None], "unknown"),
        (["cc-by-nc-4.0", None], "cc-by-nc-4.0"),  # forbids, whatever the other says
        (["mit", "house-licence"], "unknown"),
        (["house-licence", "house-licence"], "house-licence"),
        (["mit", "apache-2.0"], "other"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "other"),
        (["cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"], "cc-by-nc-nd-4.0"),
    ],
)
def test_the_licence_of_what_is_made_of_several(licences: list[str | None], expected: str) -> None:
    assert most_restrictive(licences) == most_restrictive(licences[::-1]) == expected


def folders(checkpoints: Checkpoints, cards: dict[str, str]) -> list[str]:
    """The checkpoints in directories of their own, with cards; the arguments of a merge."""
    for name in ("base", *checkpoints.paths):
        Path(name).mkdir()
        save_file(checkpoints.base if name == "base" else checkpoints.experts[name], f"{name}/model.safetensors")
        if name in cards:
            Path(name, "README.md").write_text(cards[name])
    return ["--base", "base", *(word for name in checkpoints.paths for word in ("--expert", f"{name}={name}"))]


def test_a_merge_has_a_card(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    found = front("out")
    assert found == {
        "base_model_relation": "merge",
        "license": "unknown",
        "pipeline_tag": "image-classification",
        "tags": ["merge", "r2m", "deepfake-detection"],
    }
    text = Path("out/README.md").read_text()
    assert (
        "**Licence: set it.** A merge is under the licences of its inputs, and that of base, fs, fr, efs is not" in text
    )
    assert "arXiv 2509.24367" in text
    assert "Not recorded: set it." in text
    report = json.loads(Path("out/r2m_report.json").read_text())
    assert all(f"* {warning}\n" in text for warning in report["warnings"])
    assert str(Path.cwd()) not in text  # nobody's directories


def test_what_the_inputs_cards_say(checkpoints: Checkpoints, command: Command) -> None:
    cards = {
        "base": "---\nlicense: MIT\ndatasets: [laion]\n---\n# CLIP",
        "fs": "---\nlicense: cc-by-nc-4.0\ndatasets: FaceForensics++\n---\n",
        "fr": "no front matter",
        "efs": "---\nlicense: [broken\n---\n",
    }
    assert command("merge", *folders(checkpoints, cards), "--out", "out").code == 0
    assert front("out")["license"] == "cc-by-nc-4.0"
    assert front("out")["datasets"] == ["FaceForensics++", "laion"]
    text = Path("out/README.md").read_text()
    assert "**Not for commercial use**" in text
    assert "that of fr, efs is not known here" in text
    result = command("card", "out")
    assert (
        result.err == "Warning: an input's licence is cc-by-nc-4.0: the merged model is not for commercial use either\n"
    )


def test_a_strangers_card_costs_nothing(checkpoints: Checkpoints, command: Command) -> None:
    """A few lines that stand for gigabytes once they are written out."""
    layers = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 30)]
    bomb = "\n".join(["---", "a0: &a0 [x]", *layers, "datasets: *a29", "license: mit", "---", ""])
    odd = "---\nlicense: [mit]\ndatasets: [{a: b}, 3, celeb]\n---\n"
    assert command("merge", *folders(checkpoints, {"fs": bomb, "fr": odd}), "--out", "out").code == 0
    assert front("out")["license"] == "unknown"
    assert front("out")["datasets"] == ["celeb"]


def test_names_cannot_break_the_page(checkpoints: Checkpoints, command: Command) -> None:
    odd = "a\n# injected | x"
    arguments = ["--base", "base.safetensors", "--expert", f"{odd}=fs.safetensors"]
    assert command("merge", *arguments, "--out", "out").code == 0
    text = Path("out/README.md").read_text()
    assert "\n# injected" not in text.partition("## Recipe")[0]
    assert "a\\\\n# injected \\| x" in text  # shown as a\\n# injected | x


def test_a_strangers_licence_cannot_break_the_page(checkpoints: Checkpoints, command: Command) -> None:
    odd = '---\nlicense: "mit | x\\n# injected"\n---\n'
    assert command("merge", *folders(checkpoints, {"fs": odd}), "--out", "out").code == 0
    text = Path("out/README.md").read_text()
    assert "\n# injected" not in text
    assert "| unknown |" in text


def test_the_command_adds_hashes_and_metrics(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    with open("scores.csv", "w", newline="") as file:
        rows = [["a", 0, 0.1, "celeb"], ["b", 1, 0.9, "celeb"], ["c", 1, 0.2, "whichisreal"]]
        csv.writer(file).writerows([["path", "label", "probability", "dataset"], *rows])
    assert command("evaluate", "--scores", "r2m=scores.csv", "--out", "eval").code == 0
    evaluation = json.loads(Path("eval/evaluation.json").read_text())
    result = command("card", "out", "--evaluation", "eval")
    assert (result.code, result.err) == (2, "Error: evaluation: none of its models lies in out\n")
    evaluation["models"]["r2m"]["source"] = str(Path("out/model.safetensors").resolve())
    Path("eval/evaluation.json").write_text(json.dumps(evaluation))
    result = command("card", "out", "--evaluation", "eval", "--license", "cc-by-nc-4.0")
    assert (result.code, result.out) == (0, "out/README.md\n")
    (entry,) = front("out")["model-index"]
    assert [one["dataset"]["name"] for one in entry["results"]] == ["celeb", "whichisreal"]
    metrics = [{one["type"]: one["value"] for one in result["metrics"]} for result in entry["results"]]
    assert metrics[0] == {"auc": 1.0, "video_auc": 1.0, "acc": 1.0, "eer": 0.0, "ap": 1.0}
    assert metrics[1] == {"acc": 0.0}  # one class: the rest is undefined, and left out
    text = Path("out/README.md").read_text()
    for path in ("base.safetensors", *checkpoints.paths.values()):
        assert f"`{hashlib.sha256(Path(path).read_bytes()).hexdigest()}`" in text
    assert "| whichisreal | – | – | 0.000 | – | – |" in text
    assert "Licence: set it" not in text
    # A merge replaces it like everything else, and adds no stranger to the output.
    assert command("merge", *checkpoints.arguments, "--out", "out", "--overwrite").code == 0
    assert front("out")["license"] == "unknown"


def test_numbers_go_where_the_hub_looks_for_them(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    rows = ["path,label,probability,dataset", "a,0,0.1,DF=DC", "b,1,0.9,DF=DC", "c,0,0.95,DF=DC", "d,1,.5,one"]
    Path("scores.csv").write_text("\n".join(rows))
    assert command("evaluate", "--scores", "r2m=scores.csv", "--out", "eval").code == 0
    evaluation = json.loads(Path("eval/evaluation.json").read_text())
    evaluation["models"]["r2m"]["source"] = str(Path("out/model.safetensors").resolve())
    Path("eval/evaluation.json").write_text(json.dumps(evaluation))
    words = [
        "card",
        "out",
        "--evaluation",
        "eval",
        "--benchmark",
        "DF=DC=some/dfdc:test",
        "--source",
        "https://x.org/y",
    ]
    result = command(*words, "--benchmark", "DF=DC=some/dfdc:video:video_acc", "--license", "mit")
    assert (result.code, result.out) == (0, "out/README.md\nout/.eval_results/r2m.yaml\n")
    found = parse_eval_result_entries(yaml.safe_load(Path("out/.eval_results/r2m.yaml").read_text()))
    assert [(one.dataset_id, one.task_id, one.value) for one in found] == [
        ("some/dfdc", "test", 0.5),
        ("some/dfdc", "video", pytest.approx(2 / 3)),
    ]
    assert {(one.date, one.source_url) for one in found} == {(evaluation["date"], "https://x.org/y")}
    assert found[0].notes == "auc, 3 frames of 3 videos"
    # It is replaced like the rest: by the next card, by the next merge; but not what somebody else put there.
    assert command(*words, "--license", "mit").code == 0
    assert Path("out/.eval_results/r2m.yaml").read_text().count("dataset:") == 1
    with open("out/.eval_results/r2m.yaml", "a") as file:
        file.write("# mine\n")
    changed = "out/.eval_results/r2m.yaml: was changed since a merge wrote it; --overwrite replaces it\n"
    assert command(*words).err == f"Error: {changed}"
    merge = ["merge", *checkpoints.arguments, "--out", "out", "--overwrite"]
    assert "holds '.eval_results/r2m.yaml', which was changed" in command(*merge).err
    assert command(*words, "--overwrite", "--license", "mit").code == 0
    Path("out/.eval_results/other.yaml").write_text("- mine")
    assert "holds '.eval_results', which no merge wrote" in command(*merge).err
    Path("out/.eval_results/other.yaml").unlink()
    assert command(*merge).code == 0
    assert not Path("out/.eval_results").exists()


def test_benchmarks_that_are_none(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    Path("scores.csv").write_text("path,label,probability\na,1,0.1\n")
    assert command("evaluate", "--scores", "r2m=scores.csv", "--out", "eval").code == 0
    evaluation = json.loads(Path("eval/evaluation.json").read_text())
    evaluation["models"]["r2m"]["source"] = str(Path("out").resolve())
    Path("eval/evaluation.json").write_text(json.dumps(evaluation))
    before = Path("out/README.md").read_bytes()
    for words, sentence in (
        ("DFDC", "expected DATASET=OWNER/NAME:TASK[:METRIC], such as DFDC=owner/dfdc:test:video_auc"),
        ("data=owner/name", "expected DATASET="),
        ("data=name:test", "expected DATASET="),
        ("data=owner/name:a:b:c", "expected DATASET="),
        ("x=owner/name:test", "--benchmark x: the evaluation has no dataset of that name; expected one of 'data'"),
        ("data=owner/name:test", "--benchmark data: the evaluation has no number 'auc' of it"),
        ("data=owner/name:test:videos", "--benchmark data: the evaluation has no number 'videos' of it"),
    ):
        result = command("card", "out", "--evaluation", "eval", "--benchmark", words)
        assert (result.code, sentence in result.err, len(result.err.splitlines())) == (2, True, 1)
    assert Path("out/README.md").read_bytes() == before
    assert "needs --evaluation" in command("card", "out", "--benchmark", "data=owner/name:test").err


def test_what_is_no_merge_has_no_card(checkpoints: Checkpoints, command: Command) -> None:
    result = command("card", ".")
    assert (result.code, result.err.startswith("Error: .: expected the output of a merge")) == (2, True)
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    result = command("card", "out", "--evaluation", "nowhere")
    assert result.err == "Error: nowhere: expected a directory of r2m evaluate, with evaluation.json\n"


def test_preprocessing_and_library_are_said(checkpoints: Checkpoints, command: Command) -> None:
    arguments = folders(checkpoints, {})
    Path("base/config.json").write_text("{}")
    side = {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    Path("fs/preprocessor_config.json").write_text(json.dumps(side))
    assert command("merge", *arguments, "--out", "out").code == 0
    assert front("out")["library_name"] == "transformers"
    text = Path("out/README.md").read_text()
    assert "224 × 224 pixels, mean [0.5, 0.5, 0.5], deviation [0.25, 0.25, 0.25]." in text
