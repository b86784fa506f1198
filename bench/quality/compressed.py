"""The compressed ensemble on fresh runs: ``python -m bench.quality.compressed [RUN …]``.

What ``r2m merge --format adapters`` writes of a run's three specialists at several ranks, as files, and ``evaluate
--adapters`` makes of it: the mean logit over the model with each adapter in turn. Beside it the mean logit of the
specialists themselves, and the numbers that either stores. Detectors come from build/quality and are not trained here.
``bench/results/quality_adapters.json`` keeps the runs, and a section of docs/adapters.md tells them; without a run that
section alone is written.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
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
from bench.quality.models import Models, Run, StateDict

ARCHITECTURE, DETECTOR = "mobilenet", "bench.quality.mobilenet:mobilenet"
DEFAULT, RANKS = 0.05, (0.02, 0.05, 0.1, 0.2)
# What the compressed ensemble is held to: AUC behind the ensemble in every group, and numbers beside the model's own.
MOST_BEHIND, MOST_MORE = 0.004, 0.3
FOUND, PAGE = RESULTS / "quality_adapters.json", ROOT / "docs" / "adapters.md"
COMMAND, SECTION = "python -m bench.quality.compressed", "compressed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"such as {ARCHITECTURE}-100; none: the page alone")
    parser.add_argument("--check", action="store_true", help="only whether the page is what the JSON gives")
    options = parser.parse_args(arguments)
    known = {Run(ARCHITECTURE, seed).name: Run(ARCHITECTURE, seed) for seed in settings.fresh_of(ARCHITECTURE)}
    if strange := [name for name in options.runs if name not in known]:
        parser.error(f"runs: expected some of {', '.join(known)}, got {strange[0]}")
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(FOUND.read_text()) if FOUND.exists() else {"runs": {}}
    for name in options.runs:
        content["machine"] = machine()
        content["runs"][name] = measure(known[name])
        content["runs"] = dict(sorted(content["runs"].items()))
        write_json(FOUND, content)
        print(name, content["runs"][name]["auc"], flush=True)
    page = put(PAGE.read_text(), SECTION, section(content["runs"]), COMMAND)
    return update(PAGE, page, check=options.check, command=COMMAND)


def measure(run: Run) -> dict[str, Any]:
    """AUC of every group, of the ensemble and of what stands for it by rank; and what that stores.

    Returns:
        ``auc``: row → group → AUC; ``numbers``: of the model, and by rank of all adapters.
    """
    pictures = Pictures(groups_of(run))
    base, experts = Models(run).trained()
    auc = {"ensemble": _auc(run, pictures, experts)}
    numbers = {"model": sum(tensor.numel() for tensor in base.values())}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        states = {"base": base, **dict(zip(SPECIALISTS, experts, strict=True))}
        paths = {called: directory / f"{called}.safetensors" for called in states}
        for called, state in states.items():
            save_file(state, paths[called])
        given = {"base": str(paths.pop("base")), "expert": [f"{name}={path}" for name, path in paths.items()]}
        for rank in RANKS:
            out = directory / f"rank{rank:g}"
            merge_files(Recipe.from_options({**given, "format": "adapters", "rank": rank}), out)
            auc[f"{rank:g}"] = _auc(run, pictures, _members(out))
            numbers[f"{rank:g}"] = _stored(out)
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
    for rank in RANKS:
        more = float(np.mean([one["numbers"][f"{rank:g}"] / one["numbers"]["model"] for one in runs.values()]))
        behind = {group: _apart(runs, f"{rank:g}", group) for group in groups}
        fits = more <= MOST_MORE and all(one["mean"] >= -MOST_BEHIND for one in behind.values())
        within += [f"{rank:g}"] if fits else []
        cells = [f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]" for one in behind.values()]
        rows.append([f"{rank:g}" + " (default)" * (rank == DEFAULT), f"{100 * more:.0f} %", *cells])
    met = f"met at rank {', '.join(within)}" if within else "met at none of these ranks"
    count, percent = len(runs), f"{100 * MOST_MORE:.0f} %"
    text = f"""AUC of the compressed ensemble minus that of the three specialists' mean logit, mean over {count} fresh
runs of the pretrained benchmark ([quality.md](quality.md)) with a 95 % bootstrap interval, and what all adapters store
beside the model, as a share of its numbers. The goal, at most {MOST_BEHIND:g} behind in every group with at most
{percent} more numbers, is {met}."""
    return f"{text}\n\n{table(['rank', 'more numbers', *groups], rows)}"


def _apart(runs: Mapping[str, Any], row: str, group: str) -> dict[str, float]:
    """A row minus the ensemble, paired by run."""
    values = [one["auc"][row][group] - one["auc"]["ensemble"][group] for one in runs.values()]
    return paired({place: [value] for place, value in enumerate(values)})


if __name__ == "__main__":
    raise SystemExit(main())
