"""The model card of a merge: what the Hub shows, and what a reader has to know before using it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r2m import plain_yaml
from r2m.checkpoints import hub
from r2m.inspection import family
from r2m.output import held
from r2m.ownership import CARD_FILE, RECIPE_FILE, RESULTS_FILE, digest, rewrite
from r2m.places import read_small, to_output
from r2m.records import REPORT, WRITTEN, as_written
from r2m.results import Benchmark, results
from r2m.templating import render
from r2m.workplace import settle
from r2m_kernels.errors import BadFile, BadOption, printable

# How much a licence asks of who uses a model: the more, the later. Those that are not here are compared by name alone.
_RANKED = (
    ("mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "unlicense", "isc"),
    ("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
    ("cc-by-sa-3.0", "cc-by-sa-4.0", "mpl-2.0", "lgpl-3.0", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
    ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
)
_RANKS = {name: rank for rank, names in enumerate(_RANKED) for name in names}
_FORBIDDING = 3  # rank from which a licence forbids something
UNKNOWN = "unknown"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")  # as the Hub calls them
_MOST_HEADER = 2**16  # letters of what a card says in YAML
_METRICS = {"auc": "AUC, frames", "video_auc": "AUC, videos", "acc": "accuracy", "eer": "EER", "ap": "AP"}


def card(
    out: Path,
    report: Mapping[str, Any],
    *,
    evaluation: Mapping[str, Any] | None = None,
    licence: str | None = None,
    hashes: bool = False,
    at: Path | None = None,
) -> str:
    """The text of a merge's ``README.md``.

    Args:
        out: the merge's output; its recipe is read.
        report: the merge's.
        evaluation: the content of an ``evaluation.json``, for the metrics of the model that lies in ``out``.
        licence: the merged model's, where the inputs' are not to decide.
        hashes: work out SHA-256 of the inputs' files, which reads them all.
        at: where the output will be, if it is not yet.

    Raises:
        InvalidInput: the recipe cannot be read, or the evaluation has no model that lies there.
        OSError: an input cannot be read.
    """
    what = f"{out}: {RECIPE_FILE}"
    recipe = plain_yaml.load(read_small(out / RECIPE_FILE, what), what)
    with as_written(what):
        paths = {"base": recipe["base_model"], **{one["name"]: one["model"] for one in recipe["models"]}}
        paths = {name: path if hub.is_reference(path) else to_output(at or out, path) for name, path in paths.items()}
        public = _yaml(_public(recipe))
    cards = {name: _front_matter(path) for name, path in paths.items()}
    licences = {name: _licence_of(content) for name, content in cards.items()}
    chosen = licence or most_restrictive(list(licences.values()))
    with as_written("evaluation"):
        measured = _measured(evaluation, out) if evaluation else {}
        listed = _model_index(measured)
    inputs = [
        (name, _shown_path(path), licences[name] or UNKNOWN, _digests(path, recipe.get("key")) if hashes else ())
        for name, path in paths.items()
    ]
    with as_written(f"{out}: {REPORT.file}"):
        return render(
            "card.md",
            header=_yaml(_header(out, report, list(paths.values()), cards, chosen, listed)),
            report=report,
            names=", ".join(report["experts"]),
            unknown=[name for name, own in licences.items() if own is None and licence is None],
            forbids=chosen if "-nc" in chosen and licence is None else None,
            inputs=inputs,
            hashes=hashes,
            measured=measured,
            metrics=_METRICS,
            recipe=public,
            adapters=report.get("adapters"),
        )


def write_card(
    out: str,
    *,
    overwrite: bool = False,
    evaluation: Mapping[str, Any] | None = None,
    benchmarks: Sequence[Benchmark] = (),
    source: str | None = None,
    licence: str | None = None,
) -> tuple[str, list[str]]:
    """Write the card of a merge's output anew, what the Hub's leaderboards read, and what tells that a merge wrote it.

    Args:
        out: the output.
        overwrite: whether files that somebody has changed may be replaced.
        evaluation: as :func:`card` has it.
        benchmarks: of the Hub, to which numbers of the evaluation go.
        source: an address where those can be looked up.
        licence: as :func:`card` has it.

    Returns:
        The card's text, and the names of what was written.

    Raises:
        InvalidInput: as :func:`card`; ``out`` is no merge, somebody has changed what is to be replaced, another process
            is at work on it, or the evaluation has no such number.
        OSError: it cannot be read or written; ``filename`` is set.
    """
    directory = Path(out)
    settle(directory)
    if not (directory / RECIPE_FILE).is_file() or not (directory / REPORT.file).is_file():
        raise BadFile(f"{out}: expected the output of a merge, with {RECIPE_FILE} and {REPORT.file}")
    if benchmarks and evaluation is None:
        raise BadOption("--benchmark: needs --evaluation, whose numbers it takes")
    with held(out):
        report = REPORT.whole(directory, f"{out}: {REPORT.file}")
        text = card(directory, report, hashes=True, evaluation=evaluation, licence=licence)
        made = {CARD_FILE: text.encode(errors="backslashreplace")}
        if benchmarks and evaluation is not None:
            measured = _measured(evaluation, directory)
            made[RESULTS_FILE] = results(measured, benchmarks, evaluation.get("date"), source)
        former = {name: _former(directory, report, name, overwrite) for name in made}
        for name, content in made.items():
            rewrite(directory, REPORT.whole(directory, f"{out}: {REPORT.file}"), name, former[name], content)
    return text, list(made)


def _former(directory: Path, report: Mapping[str, Any], name: str, overwrite: bool) -> list[str]:
    """The digest of what stands under a name, as a list; empty where nothing does."""
    path = directory / name
    before = [digest(path)] if path.is_file() else []
    if not overwrite and not set(before) <= set(report[WRITTEN].get(name, ())):
        raise BadFile(f"{path}: was changed since a merge wrote it; --overwrite replaces it")
    return before


def most_restrictive(licences: Sequence[str | None]) -> str:
    """The licence of what is made of several: what asks the most, if that is known; else ``"unknown"``.

    One that forbids commercial use or changes holds whatever the unknown ones say; of two that ask as much and differ,
    neither is a guess to make: ``"other"``.
    """
    if licences and licences[0] is not None and len(set(licences)) == 1:
        return licences[0]
    top = max((_RANKS[licence] for licence in licences if licence in _RANKS), default=0)
    if top < _FORBIDDING and not all(licence in _RANKS for licence in licences):
        return UNKNOWN
    asking = {licence for licence in licences if licence is not None and _RANKS.get(licence) == top}
    return asking.pop() if len(asking) == 1 else "other"


def warnings(text: str) -> list[str]:
    """What a card's licence asks its writer to do."""
    licence = plain_yaml.load(text.split("\n---\n", 1)[0].removeprefix("---"), "card")["license"]
    if licence == UNKNOWN:
        return ["the licence of a merge is that of its inputs, and not all of theirs are known: set it (--license)"]
    if "-nc" in licence:
        return [f"an input's licence is {licence}: the merged model is not for commercial use either"]
    return []


def _header(
    out: Path,
    report: Mapping[str, Any],
    paths: Sequence[str],
    cards: Mapping[str, Mapping[str, Any]],
    licence: str,
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the Hub reads."""
    ids = ["/".join(path.removeprefix(hub.SCHEME).split("/")[:2]) for path in paths if hub.is_reference(path)]
    listed = [content.get("datasets") for content in cards.values()]
    datasets = {name for one in listed for name in (one if isinstance(one, list) else [one]) if isinstance(name, str)}
    title = f"R2M merge of {', '.join(map(printable, report['experts']))}"
    header = {
        "base_model": list(dict.fromkeys(name.partition("@")[0] for name in ids)),
        "base_model_relation": "merge",
        "license": licence,
        "library_name": _library(out, report),
        "pipeline_tag": "image-classification",
        "tags": ["merge", "r2m", "deepfake-detection"],
        "datasets": sorted(datasets),
        "model-index": [{"name": title, "results": list(results)}] if results else [],
    }
    return {key: value for key, value in header.items() if value}


def _model_index(measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the Hub reads of an evaluation."""
    return [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset},
            "metrics": [
                {"name": title, "type": key, "value": numbers[key]}
                for key, title in _METRICS.items()
                if numbers[key] is not None
            ],
        }
        for dataset, numbers in measured.items()
    ]


def _front_matter(path: str) -> dict[str, Any]:
    """The YAML at the head of the card beside a checkpoint; empty where there is none."""
    checkpoint = hub.local(path)
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        text = read_small(directory / CARD_FILE, path).decode(errors="replace")
        header = text.split("\n---", 1)[0].removeprefix("---")
        content = plain_yaml.load(header[:_MOST_HEADER], path) if text.startswith("---") else {}
    except (OSError, BadFile):
        return {}
    return content if isinstance(content, dict) else {}


def _licence_of(content: Mapping[str, Any]) -> str | None:
    licence = content.get("license")
    known = isinstance(licence, str) and licence not in (UNKNOWN, "other") and _LICENCE.fullmatch(licence)
    return str(licence).lower() if known else None


def _library(out: Path, report: Mapping[str, Any]) -> str | None:
    if (out / "config.json").is_file():
        return "transformers"
    guess = family({row["name"]: row["shape"] for row in report["tensors"]}) or ""
    return next((library for library in ("timm", "open_clip") if library in guess), None)


def _measured(evaluation: Mapping[str, Any], out: Path) -> dict[str, Mapping[str, Any]]:
    target = os.path.realpath(out)
    for one in evaluation.get("models", {}).values():
        source = os.path.realpath(one["source"])
        if source == target or os.path.dirname(source) == target:
            return dict(one["datasets"])
    raise BadFile(f"evaluation: none of its models lies in {out}")


def _digests(path: str, key: str | None) -> list[str]:
    from r2m.checkpoints.reader import open_checkpoint

    digests = []
    for file in open_checkpoint(path, path, key, adapters=True).files:
        with open(file, "rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    return digests


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the machine it was made on is called inside: of paths, their last two parts."""
    models = [{**one, "model": _shown_path(one["model"])} for one in recipe["models"]]
    return {**recipe, "base_model": _shown_path(recipe["base_model"]), "models": models}


def _shown_path(path: str) -> str:
    return path if hub.is_reference(path) else "/".join(Path(path).parts[-2:])


def _yaml(content: Mapping[str, Any]) -> str:
    return plain_yaml.dump(content).rstrip()
