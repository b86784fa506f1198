"""JSON files have the keys that docs/files.md lists, and a version that readers look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from r2m import former
from r2m.records import EVALUATION, REPORT, SEAL, STATE, VERSION, Record

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]


def found(record: Record, directory: str) -> set[str]:
    """Keys of a file, as deep as the record describes them."""
    content = json.loads((Path(directory) / record.file).read_text())
    assert content.pop(VERSION) == record.version
    assert (content.pop(SEAL, None) is not None) == record.sealed

    def deeper(value: Any, path: str) -> Iterator[str]:
        below = {key.removeprefix(f"{path}.").partition(".")[0] for key in record.keys if key.startswith(f"{path}.")}
        if not below:
            yield path
        elif below == {"*"}:
            for one in value.values() if isinstance(value, dict) else value:
                yield from deeper(one, f"{path}.*")
        else:
            for key, one in value.items():
                yield from deeper(one, f"{path}.{key}")

    return {path for key, value in content.items() for path in deeper(value, key)}


def test_a_merge_and_an_evaluation_write_what_is_documented(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    asked_for = {"screening", "factors", "statistics"}  # those only where they are
    assert found(REPORT, "out") | asked_for == set(REPORT.keys)
    assert found(STATE, "out") == set(STATE.keys)
    Path("scores.csv").write_text("path,label,probability\na.png,0,0.25\nb.png,1,0.75\n")
    assert command("evaluate", "--scores", "scores.csv", "--bootstrap", "5", "--out", "eval").code == 0
    assert found(EVALUATION, "eval") == set(EVALUATION.keys)


def rewritten(path: str, version: object) -> None:
    content = json.loads(Path(path).read_text())
    content.pop(VERSION, None)
    Path(path).write_text(json.dumps(content if version is None else {VERSION: version, **content}))


def test_a_report_of_another_version_is_refused_and_one_without_is_read(
    checkpoints: Checkpoints, command: Command
) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    for version in (2, "1", -1, True):
        rewritten("out/r2m_report.json", version)
        expected = f"expected schema_version 1 or less, got {json.dumps(version)}; a newer r2m_kernels wrote it\n"
        for words in (["report", "out", "--to", "page"], ["card", "out"]):
            result = command(*words)
            assert (result.code, result.err) == (2, f"Error: out: r2m_report.json: {expected}")
    assert not Path("page").exists()
    rewritten("out/r2m_report.json", None)
    assert REPORT.read(Path("out"), "out")["experts"] == ["fs", "fr", "efs"]


def test_nothing_is_taken_from_the_state_of_another_version(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    content = json.loads(Path("out/r2m_state.json").read_text())
    for version, taken in ((1, True), (2, False)):
        Path("out/r2m_state.json").write_bytes(replace(STATE, version=version).text(content))
        assert bool(former.grams("out", content["state"])) == taken
        assert isinstance(former.shard_size("out"), int) == taken


def sealed_again(record: Record, directory: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A record that somebody has changed, and then sealed."""
    path = Path(directory, record.file)
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(record.text(content))


@pytest.mark.parametrize(
    ("record", "change", "words"),
    [
        (REPORT, lambda report: report.update(experts=True), ("card", "out")),
        (REPORT, lambda report: report.update(warnings=[3]), ("card", "out")),
        (REPORT, lambda report: report.pop("core"), ("report", "out")),
        (STATE, lambda state: state.pop("state"), ("relink", "out", "base=base.safetensors")),
        (STATE, lambda state: state.update(grams=[1]), ("relink", "out", "base=base.safetensors")),
        (
            EVALUATION,
            lambda found: found["models"]["out"].update(datasets=[1]),
            ("card", "out", "--evaluation", "eval"),
        ),
    ],
)
def test_what_a_stranger_put_together_is_refused_in_one_sentence(
    record: Record, change: Any, words: Any, checkpoints: Checkpoints, command: Command
) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
    Path("scores.csv").write_text("path,label,probability\na.png,0,0.25\nb.png,1,0.75\n")
    assert command("evaluate", "--scores", "out=scores.csv", "--bootstrap", "5", "--out", "eval").code == 0
    sealed_again(EVALUATION, "eval", lambda found: found["models"]["out"].update(source="../out"))
    sealed_again(record, "eval" if record is EVALUATION else "out", change)
    result = command(*words)
    assert result.code == 2
    assert "is not as r2m writes it" in result.err
    assert result.err.count("\n") == 1


def test_grams_that_are_none_are_found_again(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "plain").code == 0
    for value in (None, {"tasks": [["1"] * 3] * 3, "base": 1.0}):
        assert command("merge", *checkpoints.arguments, "--out", "out").code == 0
        sealed_again(STATE, "out", lambda state, value=value: state["grams"].update({"block.bias": value}))
        assert command("remove", "out", "--expert", "efs", "--quiet").code == 0
        shutil.rmtree("out")
