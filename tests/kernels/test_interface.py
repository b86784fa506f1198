"""The Python interface beside its numbers: progress, dtypes by name, wrapped modules, repr, pickling, logs, types."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from r2m_kernels import Analysis, InvalidInput, MergeConfig, ProgressEvent, ProgressLines, analyze, merge
from r2m_kernels.overrides import Overrides
from r2m_kernels.progress import STEPS
from r2m_kernels.summary import in_words


class Detector(nn.Module):
    """Small, and with all roles but a matrix of one row."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(24, 20), nn.BatchNorm1d(20), nn.ReLU())
        self.head = nn.Linear(20, 2)


def models(count: int = 3) -> list[Detector]:
    """A base and what was fine-tuned from it."""
    base, experts = Detector(0), []
    for seed in range(1, count):
        expert = copy.deepcopy(base)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        experts.append(expert)
    return [base, *experts]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return [*first] == [*second] and all(torch.equal(one, second[name]) for name, one in first.items())


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    base, *experts = models()
    return analyze(base, {"fs": experts[0], "f\x1br": experts[1]})


def test_progress_of_a_merge_and_of_an_analysis() -> None:
    base, *experts = models()
    events: list[ProgressEvent] = []
    whole = merge(base, experts, progress=events.append)
    assert [*dict.fromkeys(event.step for event in events)] == ["task Gram", "truncation", "combination"]
    for step in {event.step for event in events}:
        last = [event for event in events if event.step == step][-1]
        assert last.tensors_done == last.tensors_total > 0
        assert last.bytes_done == last.bytes_total > 0
    lines: list[str] = []
    analyzed = analyze(base, experts)
    assert same(analyzed.merge(progress=ProgressLines(lines.append, lambda: 0.0)), whole)
    assert [line.split(":")[0] for line in lines] == [STEPS["combination"]] * 2
    lines.clear()
    show = ProgressLines(lines.append, lambda: 0.0)
    for eta in (0.5, 1.0):
        analyzed.merge(eta=eta, progress=show)
    assert len(lines) == 4  # each merge is told

    def stop(event: ProgressEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, experts, progress=stop)


@pytest.mark.parametrize("name", ["float16", "torch.bfloat16", "float64"])
def test_dtypes_by_name(name: str, analysis: Analysis) -> None:
    base, *experts = models()
    dtype = getattr(torch, name.removeprefix("torch."))
    assert same(merge(base, experts, dtype=name), merge(base, experts, dtype=dtype))
    assert analysis.merge(dtype=name)["head.weight"].dtype is dtype


def test_a_dtype_that_is_none_is_refused_before_any_work() -> None:
    expected = "dtype: expected one of float64, float32, bfloat16, float16, got 'bfloat'; did you mean 'bfloat16'?"
    with pytest.raises(InvalidInput, match=f"^{re.escape(expected)}$"):
        merge({}, [], dtype="bfloat")
    with pytest.raises(InvalidInput, match=r"^dtype: expected one of torch\.float64.*, got torch\.int8$"):
        merge({}, [], dtype=torch.int8)


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_compiled_and_parallel_modules_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    base, *experts = models(4)
    plain = merge(base, {str(number): expert for number, expert in enumerate(experts)})
    inner = copy.deepcopy(experts[2])
    inner.backbone = torch.compile(inner.backbone, backend="eager")
    wrapped = {
        "0": torch.compile(experts[0], backend="eager"),
        "1": nn.DataParallel(experts[1]),
        "2": prefixed(inner.state_dict(), "_orig_mod.module."),  # a compiled parallel one with a compiled part
    }
    with caplog.at_level(logging.INFO, "r2m_kernels"):
        analyzed = analyze(base, wrapped)
    assert same(analyzed.merge(), plain)
    note = "expert '0': named as a compiled or parallel module has it, '_orig_mod.backbone.0.weight' taken as "
    assert analyzed.notes[0] == f"{note}'backbone.0.weight'"
    assert len(analyzed.notes) == 3
    assert analyzed.notes[0] in caplog.text
    # The names that come out are the base's, whatever it is.
    of_compiled = merge(nn.DataParallel(base), wrapped)
    assert same(of_compiled, prefixed(plain, "module."))


def test_what_only_looks_wrapped_stays_as_it_is() -> None:
    base, *experts = models()
    alike = [prefixed(model.state_dict(), "module.") for model in (base, *experts)]
    analyzed = analyze(alike[0], alike[1:])
    assert analyzed.notes == ()
    assert same(analyzed.merge(), prefixed(merge(base, experts), "module."))
    other = {f"module.{name}" if ".0." in name else name: one for name, one in alike[1].items()}
    with pytest.raises(InvalidInput, match=r"'module\.backbone\.0\.weight'"):
        analyze(base, [other])


def test_what_is_printed_is_short_and_in_words(analysis: Analysis) -> None:
    assert repr(MergeConfig()) == "MergeConfig()"
    config = MergeConfig(rank=16, exclude=("*bn*",), weights=(1.0, 2.0))
    assert repr(config) == "MergeConfig(rank=16, weights=(1.0, 2.0), exclude=('*bn*',))"
    assert eval(repr(config)) == config
    assert repr(analysis).startswith(
        "<Analysis of 2 experts (fs, f\\x1br): <Plan: 1 matrix, 3 vector, 4 statistic, 1 copied>, MergeConfig(), native"
    ) or "torch on cpu" in repr(analysis)
    report = analysis.report()
    words = repr(report)
    assert words.splitlines()[: len(in_words(report))] == in_words(report)
    assert "f\\x1br" in words
    assert len(words) < 1000
    assert report == dict(report)
    config = MergeConfig.cart()
    base, *experts = models()
    assert repr(analyze(base, experts, config).adapters()) == "<Adapters of expert0, expert1: 2 matrices>"


def test_a_configuration_can_be_pickled_and_an_analysis_says_why_not(analysis: Analysis) -> None:
    config = MergeConfig.r2m_paper(rank=4)
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert pickle.loads(pickle.dumps(analysis.report())) == analysis.report()
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"^an analysis reads its inputs again .* keep its report\(\)"):
            attempt(analysis)  # type: ignore[operator]


def test_logging_is_silent_until_somebody_listens(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base, *experts = models()
    logger = logging.getLogger("r2m_kernels")
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    logger.warning("nobody listens")  # without a handler logging's last resort would write it
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.DEBUG, "r2m_kernels"):
        merge(base, experts)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("r2m_kernels")]
    assert any(line.startswith("backend ") and " on cpu: " in line for line in said)
    assert any(line.startswith("combination: ") for line in said)


def as_given(kind: Any) -> Any:
    """A field's type as it may be given: any sequence for a tuple."""
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
        return Sequence[get_args(kind)[0]]  # type: ignore[misc]
    if type(None) in get_args(kind):
        rest = [as_given(one) for one in get_args(kind) if one is not type(None)]
        return rest[0] | None
    return kind


def test_overrides_are_the_fields_of_the_configuration() -> None:
    fields = {name: as_given(kind) for name, kind in get_type_hints(MergeConfig).items()}
    assert get_type_hints(Overrides) == fields
    assert Overrides.__required_keys__ == frozenset()


SNIPPET = """
from torch import Tensor
from r2m_kernels import MergeConfig, ProgressLines, analyze, merge

def right(base: dict[str, Tensor], experts: list[dict[str, Tensor]]) -> None:
    merge(base, experts, rank=0.2, exclude=["*norm*"], dtype="bfloat16", progress=ProgressLines())
    MergeConfig.r2m(eta=0.5).replace(weights=[1, 2])
    print(analyze(base, experts, svd="exact").merge(rank=16).keys())

def wrong(base: dict[str, Tensor], experts: list[dict[str, Tensor]]) -> None:
    merge(base, experts, rnk=0.2)
    analyze(base, experts, svd="precise")
    analyze(base, experts).merge(eta="much")
    MergeConfig.r2m(rank_rouding="up")
"""


@pytest.mark.slow
def test_a_type_checker_sees_typing_errors(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "snippet.py"]
    # Type checkers do not follow the hook of an editable installation.
    variables = {**os.environ, "MYPYPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
    lines = [line.partition("snippet.py:")[2] for line in done.stdout.splitlines() if ": error: " in line]
    first = SNIPPET.splitlines().index("    merge(base, experts, rnk=0.2)") + 1
    assert [int(line.partition(":")[0]) for line in lines] == [first, first + 1, first + 2, first + 3], done.stdout
    assert 'Unexpected keyword argument "rnk"' in lines[0]
