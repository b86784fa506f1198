"""What the output of a former merge says: its recipe, what it found, and how many specialists are in it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r2m.checkpoints.formats import OUTPUTS
from r2m.options import OPTIONS
from r2m.output import INPUTS, STATISTICS, difference
from r2m.ownership import RECIPE_FILE
from r2m.places import MOST_RECORD, read_beside
from r2m.recipe import Recipe
from r2m.recipe_file import read_recipe
from r2m.records import REPORT, STATE
from r2m.workplace import settle
from r2m_kernels import Analysis
from r2m_kernels.errors import BadFile

# Keys of a state on which no Gram matrix of two experts depends, and no truncation of one alone.
_FREE = (
    *("merge_method", "dtype", "format", "adapters", "adapter_rank", "adapter_size"),
    *("max_shard_size", "order of experts", "specialists", "temperature", "head_bias"),
    *("statistics", STATISTICS),
)

# In one merge of merges, as a file may claim: it decides weights.
_MOST_SPECIALISTS = 1000


def recipe_of(out: str | Path) -> Recipe:
    """The recipe of a merge's output.

    Raises:
        BadFile: it is none.
    """
    settle(Path(out))
    path = Path(out) / RECIPE_FILE
    if not path.is_file():
        raise BadFile(f"{out}: expected the output of a merge, with a {RECIPE_FILE}")
    return replace(read_recipe(path), file=None)  # it goes with the output


def report_of(out: str | Path) -> dict[str, Any]:
    """The report of a merge's output.

    Raises:
        BadFile: there is none that can be read.
        OSError: the same.
    """
    return REPORT.read(Path(out), f"out ({out}): {REPORT.file}")


def shard_size(out: str | Path) -> int | str:
    """``max_shard_size`` of the merge that wrote an output, which no recipe holds; the default where not known."""
    try:
        return int(STATE.whole(Path(out), STATE.file)["state"]["max_shard_size"])
    except (OSError, ValueError, KeyError, TypeError):
        default: str = OPTIONS["max_shard_size"].default
        return default


def specialists(checkpoint: Path) -> int:
    """How many specialists a checkpoint stands for: those of the merge that wrote it, or one."""
    report = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / REPORT.file
    if checkpoint.is_file() and checkpoint.name not in OUTPUTS:
        return 1
    counts = read_beside(report, MOST_RECORD).get("specialists")
    numbers = list(counts.values()) if isinstance(counts, dict) else []
    whole = all(isinstance(count, int) and count > 0 for count in numbers)
    return sum(numbers) if numbers and whole and sum(numbers) <= _MOST_SPECIALISTS else 1


def record(state: Mapping[str, Any], analysis: Analysis) -> bytes:
    """The content of a merge's ``r2m_state.json``, from which :func:`grams` takes what another one need not find.

    Its digest binds what was found to the inputs it was found in.
    """
    factored = {tensor.name for tensor in analysis.plan.tensors if tensor.factored}
    grams: dict[str, Any] = {
        name: {"tasks": gram.tolist(), "base": analysis.base_squares[name], "factored": name in factored}
        for name, gram in analysis.grams.items()
    }
    grams |= {tensor.name: None for tensor in analysis.plan.of("statistic", "extra")}  # looked at, for NaN
    return STATE.text({"state": state, "grams": dict(sorted(grams.items()))}, indent=None)


def grams(out: str | Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Gram matrices by tensor from a merge that had all the experts of another one, and more perhaps.

    They are what the other would find, to the bit, if files and options are the same and the backend's inner products
    do not depend on who else is there. Empty where files or options are not the same, or the state was changed since.

    Args:
        out: the output of the former merge.
        state: of the other one, as its :meth:`r2m.job.Job.state` has it.
    """
    try:
        content = STATE.whole(Path(out), STATE.file)
        return _of_the_same(content["state"], content["grams"], json.loads(json.dumps(state)))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):  # what we have not written
        return {}


def of_each(state: Mapping[str, Any], files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """For each expert what decides what is made of it where no other one counts: what its truncations are kept by.

    Args:
        state: of a merge, as its :meth:`r2m.job.Job.state` has it.
        files: expert → its files and the base's, as the state's inputs have them.
    """
    common = {key: value for key, value in state.items() if key not in (*_FREE, "experts", INPUTS)}
    common["parameters"] = {name: value for name, value in common["parameters"].items() if name != "weights"}
    return {
        name: [common, state["experts"][name], {file: state[INPUTS][file] for file in own}]
        for name, own in files.items()
    }


def _of_the_same(before: dict[str, Any], known: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    names, order = before["order of experts"], now["order of experts"]
    if not set(order) <= set(names):
        return {}
    for state in (before, now):
        state["experts"] = {name: state["experts"][name] for name in order}
        state[INPUTS] = {file: one for file, one in state[INPUTS].items() if file in now[INPUTS]}
        state["parameters"] = {name: value for name, value in state["parameters"].items() if name != "weights"}
        for free in _FREE:
            state.pop(free, None)
    if difference(before, now):
        return {}
    places = [names.index(name) for name in order]
    return {name: gram if gram is None else _gram(gram, places) for name, gram in known.items()}


def _gram(found: dict[str, Any], places: list[int]) -> dict[str, Any]:
    """A Gram matrix of some experts alone; TypeError where it has no numbers."""
    tasks = [[found["tasks"][i][j] for j in places] for i in places]
    if not all(type(number) in (int, float) for number in (*itertools.chain.from_iterable(tasks), found["base"])):
        raise TypeError
    return {"tasks": tasks, "base": found["base"], "factored": found["factored"] is True}
