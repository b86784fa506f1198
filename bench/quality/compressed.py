"""The compressed ensemble on fresh runs: ``python -m bench.quality.compressed [RUN …]``.

What ``r2m merge --format adapters`` writes of a run's three specialists at several ranks and sizes, as files, and
``evaluate --adapters`` makes of it: the mean logit over the model with each adapter in turn. Beside it the mean logit
of the specialists themselves, and the numbers that either stores. Detectors come from build/quality and are not
trained here. ``bench/results/quality_adapters.json`` keeps the runs, of which what was judged is not judged again, and
a section of docs/adapters.md tells them; without a run that section alone is written.

How ``--adapter-size`` chooses is the answer to the question in ``compressed.json``, which was written before a fresh
run was scored. Its candidates' scores are kept beside the runs; of their code there is the chosen one's alone.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from r2m.demo.detectors import SPECIALISTS
from r2m.demo.evaluation import group_auc
from r2m.evaluation.ensemble import load_ensemble
from r2m.merge import merge_files
from r2m.recipe import Arrangement, Recipe
from safetensors import safe_open
from safetensors.torch import save_file

from bench.machine import RESULTS, ROOT, machine, write_json
from bench.markdown import put, table, update
from bench.quality import settings
from bench.quality.groups import GROUPS, groups_of
from bench.quality.judging import Pictures, paired
from bench.quality.models import Models, Run, StateDict, run_among

ARCHITECTURE, DETECTOR = "mobilenet", "bench.quality.mobilenet:mobilenet"
DEFAULT = "0.05"
# Row → options of the merge. Sizes were chosen on the development seeds' validation people.
ROWS: dict[str, dict[str, Any]] = {
    **{f"{rank:g}": {"rank": rank} for rank in (0.02, 0.05, 0.1, 0.2)},
    **{f"size {size:g}": {"adapter_size": size} for size in (0.1,)},
}
AGAIN = "size 0.1"  # what was asked again
# What the compressed ensemble is held to: AUC behind the ensemble in every group, and numbers beside the model's own.
MOST_BEHIND, MOST_MORE = 0.004, 0.3
FOUND, PAGE = RESULTS / "quality_adapters.json", ROOT / "docs" / "adapters.md"
ASKED = Path(__file__).with_suffix(".json")
COMMAND, SECTION = "python -m bench.quality.compressed", "compressed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = run_among([Run(ARCHITECTURE, seed) for seed in settings.fresh_of(ARCHITECTURE)])
    parser.add_argument("runs", nargs="*", type=known, help=f"such as {ARCHITECTURE}-100; none: the page alone")
    parser.add_argument("--check", action="store_true", help="only whether the page is what the JSON gives")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(FOUND.read_text()) if FOUND.exists() else {"runs": {}}
    for run in options.runs:
        content["machine"], name = machine(), run.name
        content["runs"][name] = measure(run, content["runs"].get(name, {"auc": {}, "numbers": {}}))
        content["runs"] = dict(sorted(content["runs"].items()))
        write_json(FOUND, content)
        print(name, content["runs"][name]["auc"], flush=True)
    told = [section(content["runs"]), compared(content["candidates"], content["runs"]), asked_again(content["again"])]
    page = put(PAGE.read_text(), SECTION, "\n\n".join(told), COMMAND)
    return update(PAGE, page, check=options.check, command=COMMAND)


def measure(run: Run, judged: Mapping[str, Any]) -> dict[str, Any]:
    """AUC of every group, of the ensemble and of what stands for it by row; and what that stores.

    Args:
        run: whose specialists.
        judged: what was returned before.

    Returns:
        ``auc``: row → group → AUC; ``numbers``: of the model, and by row of all adapters.
    """
    auc, numbers = dict(judged["auc"]), dict(judged["numbers"])
    missing = {row: options for row, options in ROWS.items() if row not in auc}
    pictures = Pictures(groups_of(run))
    base, experts = Models(run).trained()
    if "ensemble" not in auc:
        auc["ensemble"] = _auc(run, pictures, experts)
    numbers["model"] = sum(tensor.numel() for tensor in base.values())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        states = {"base": base, **dict(zip(SPECIALISTS, experts, strict=True))}
        paths = {called: directory / f"{called}.safetensors" for called in states}
        for called, state in states.items():
            save_file(state, paths[called])
        given = {"base": str(paths.pop("base")), "expert": [f"{name}={path}" for name, path in paths.items()]}
        for number, (row, more) in enumerate(missing.items()):
            out = directory / f"row{number}"
            merge_files(Recipe.from_options({**given, "format": "adapters", **more}), out)
            auc[row], numbers[row] = _auc(run, pictures, _members(out)), _stored(out)
    return {"auc": auc, "numbers": numbers}


def _members(out: Path) -> Iterator[StateDict]:
    """The detector with each adapter in turn."""
    ensemble = load_ensemble(DETECTOR, str(out), "adapters", Arrangement())
    for name in ensemble.members:
        yield dict(ensemble.with_adapter(name).state_dict())


def _auc(run: Run, pictures: Pictures, members: Iterable[StateDict]) -> dict[str, float]:
    """Group → AUC of the mean logit."""
    scores = np.mean([pictures.scores(run, [state]) for state in members], axis=0)
    return {name: float(f"{group_auc(group):.5g}") for name, group in pictures.split(scores).items()}


def _stored(out: Path) -> int:
    """Numbers in all adapters of an output."""
    count = 0
    for path in out.glob("adapters/*/adapter_model.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def section(runs: Mapping[str, Any]) -> str:
    """What was found, as the page has it."""
    groups = GROUPS[settings.REGIMES[ARCHITECTURE]]
    rows, within = [], []
    for row in ROWS:
        more = float(np.mean([one["numbers"][row] / one["numbers"]["model"] for one in runs.values()]))
        behind = {group: _apart(runs, row, group) for group in groups}
        fits = more <= MOST_MORE and all(one["mean"] >= -MOST_BEHIND for one in behind.values())
        called = f"`--adapter-{row}`" if row.startswith("size") else f"`--rank {row}`" + " (default)" * (row == DEFAULT)
        within += [called] if fits else []
        cells = [f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]" for one in behind.values()]
        rows.append([called, f"{100 * more:.1f} %", *cells])
    met = f"met by {' and '.join(within)}" if within else "met by none of these"
    count, percent = len(runs), f"{100 * MOST_MORE:.0f} %"
    text = f"""AUC of the compressed ensemble minus that of the three specialists' mean logit, mean over {count} fresh
runs of the pretrained benchmark ([quality.md](quality.md)) with a 95 % bootstrap interval, and what all adapters store
beside the model, as a share of its numbers. The goal, at most {MOST_BEHIND:g} behind in every group with at most
{percent} more numbers, is {met}."""
    return f"{text}\n\n{table(['adapters', 'more numbers', *groups], rows)}"


def compared(candidates: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Any]) -> str:
    """The candidates for ``--adapter-size``: candidate → run → what :func:`measure` gives of a row.

    The one that the rule chooses is marked.
    """
    asked = json.loads(ASKED.read_text())
    groups = GROUPS[settings.REGIMES[ARCHITECTURE]]
    behind, rows = {}, []
    for name, judged in candidates.items():
        pairs = {
            run: {"auc": {name: one["auc"], "ensemble": runs[run]["auc"]["ensemble"]}} for run, one in judged.items()
        }
        behind[name] = {group: _apart(pairs, name, group) for group in groups}
    worst = {name: min(one["mean"] for one in each.values()) for name, each in behind.items()}
    within = [name for name, least in worst.items() if least >= -MOST_BEHIND]
    chosen = max(within, key=lambda name: worst[name], default=None)
    for name, each in behind.items():
        cells = [f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]" for one in each.values()]
        share = np.mean([one["numbers"] / runs[run]["numbers"]["model"] for run, one in candidates[name].items()])
        rows.append(
            [
                name + " (chosen)" * (name == chosen),
                asked["candidates"][name].replace("|", "‖"),
                f"{100 * share:.1f} %",
                *cells,
            ]
        )
    sentences = [
        f"`--adapter-size 0.1` is one of {len(rows)} candidates that were scored on these runs. {asked['alike']}",
        f"They were chosen by {asked['chosen by']}. The rule, written before a fresh run was scored: {asked['rule']}",
        f"Seen before: {asked['seen before']}",
    ]
    paragraphs = [
        textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False),
        table(["candidate", "weight of a layer", "more numbers", *groups], rows),
    ]
    return "\n\n".join(paragraphs)


def asked_again(runs: Mapping[str, Any]) -> str:
    """What the chosen candidate gave on further runs."""
    question = json.loads(ASKED.read_text())["asked again"]["question"]
    behind = {group: _apart(runs, AGAIN, group) for group in GROUPS[settings.REGIMES[ARCHITECTURE]]}
    told = [f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}] {group}" for group, one in behind.items()]
    within = all(one["mean"] >= -MOST_BEHIND for one in behind.values())
    share = np.mean([one["numbers"][AGAIN] / one["numbers"]["model"] for one in runs.values()])
    found = f"{'Yes' if within else 'No'}: {', '.join(told)}, with {100 * share:.1f} % more numbers."
    return textwrap.fill(f"Then it was asked: {question} {found}", 120, break_on_hyphens=False)


def _apart(runs: Mapping[str, Any], row: str, group: str) -> dict[str, float]:
    """A row minus the ensemble, paired by run."""
    values = [one["auc"][row][group] - one["auc"]["ensemble"][group] for one in runs.values()]
    return paired({place: [value] for place, value in enumerate(values)})


if __name__ == "__main__":
    raise SystemExit(main())
