"""The model card of a merge: what the Hub shows, and what a reader has to know before using it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from r2m import hub
from r2m.inspection import family
from r2m.output import CARD_FILE, RECIPE_FILE, REPORT_FILE
from r2m.places import MOST_RECORD, read_mapping, read_small
from r2m.recipe import PlainLoader
from r2m_kernels.errors import InvalidInput, printable
from r2m_kernels.streaming import TensorSpec

# How much a licence asks of who uses a model: the more, the later. Those that are not here are compared by name alone.
_RANKS: tuple[tuple[str, ...], ...] = (
    ("mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "unlicense", "isc"),
    ("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
    ("cc-by-sa-3.0", "cc-by-sa-4.0", "mpl-2.0", "lgpl-3.0", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
    ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
)
_FORBIDDING = 3  # rank from which a licence forbids something
UNKNOWN = "unknown"
_LIBRARIES = ("timm", "open_clip", "transformers")
_METRICS = {"auc": "AUC, frames", "video_auc": "AUC, videos", "acc": "accuracy", "eer": "EER", "ap": "AP"}


def card(
    out: Path, *, evaluation: Mapping[str, Any] | None = None, licence: str | None = None, hashes: bool = False
) -> str:
    """The text of a merge's ``README.md``.

    Args:
        out: the merge's output; its recipe and report are read.
        evaluation: the content of an ``evaluation.json``, for the metrics of the model that lies in ``out``.
        licence: the merged model's, where the inputs' are not to decide.
        hashes: work out SHA-256 of the inputs' files, which reads them all.

    Raises:
        InvalidInput: ``out`` is no merge, or the evaluation has no model that lies there.
        OSError: an input cannot be read.
    """
    if not (out / RECIPE_FILE).is_file() or not (out / REPORT_FILE).is_file():
        raise InvalidInput(f"{out}: expected the output of a merge, with {RECIPE_FILE} and {REPORT_FILE}")
    recipe = yaml.safe_load(read_small(out / RECIPE_FILE, f"{out}: {RECIPE_FILE}"))
    report = read_mapping(out / REPORT_FILE, f"{out}: {REPORT_FILE}", MOST_RECORD)
    inputs = {"base": recipe["base_model"], **{one["name"]: one["model"] for one in recipe["models"]}}
    cards = {name: _front_matter(path) for name, path in inputs.items()}
    licences = {name: _licence_of(content) for name, content in cards.items()}
    chosen = licence or most_restrictive(list(licences.values()))
    measured = _measured(evaluation, out) if evaluation else {}
    lines = ["---", _header(out, recipe, report, cards, chosen, measured).rstrip(), "---", ""]
    lines += [
        f"# R²M merge of {_names(report)}",
        "",
        f"{len(report['experts'])} detectors, fine-tuned from one base, merged without data by "
        f"[R²M](https://arxiv.org/abs/2509.24367) (`{report['method']}`, r2m_kernels "
        f"{report['versions']['r2m_kernels']}).",
        "",
        *_licence_lines(licences, chosen, licence is not None),
        "## Inputs",
        "",
        f"| | checkpoint | licence |{' SHA-256 |' * hashes}",
        f"| --- | --- | --- |{' --- |' * hashes}",
    ]
    for name, path in inputs.items():
        digests = f" {_digests(path)} |" if hashes else ""
        lines.append(f"| {_cell(name)} | {_cell(_shown_path(path))} | {licences[name] or UNKNOWN} |{digests}")
    lines += ["", "## Preprocessing", ""]
    own = report["preprocessing"]
    lines.append(
        f"{own['size']} × {own['size']} pixels, mean {own['mean']}, deviation {own['std']}."
        if own
        else "Not recorded: set it. Fed with another size, mean or deviation than in training, detectors give nonsense."
    )
    if measured:
        lines += [
            "",
            "## Measured",
            "",
            f"| dataset | {' | '.join(_METRICS.values())} |",
            "| --- |" + " ---: |" * len(_METRICS),
        ]
        for dataset, found in measured.items():
            numbers = " | ".join("–" if found[key] is None else f"{found[key]:.3f}" for key in _METRICS)
            lines.append(f"| {_cell(dataset)} | {numbers} |")
    lines += ["", "## Before you rely on it", ""]
    lines += [f"* {warning}" for warning in report["warnings"]]
    lines += [
        "* Detectors fail on forgeries, cameras and compressions they were not trained on; measure it on yours.",
        "* Its weights are a function of its inputs: their biases are in it.",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "## Citation",
        "",
        "R²M: Real-aware Residual Model Merging for Deepfake Detection, arXiv 2509.24367, 2025.",
        "",
    ]
    return "\n".join(lines)


def most_restrictive(licences: Sequence[str | None]) -> str:
    """The licence of what is made of several: what asks the most, if that is known; else ``"unknown"``.

    One that forbids commercial use or changes holds whatever the unknown ones say; of two that ask as much and differ,
    neither is a guess to make: ``"other"``.
    """
    ranked = {name: rank for rank, names in enumerate(_RANKS) for name in names}
    if licences and licences[0] is not None and len(set(licences)) == 1:
        return licences[0]
    top = max((ranked[licence] for licence in licences if licence in ranked), default=0)
    if top < _FORBIDDING and not all(licence in ranked for licence in licences):
        return UNKNOWN
    asking = {licence for licence in licences if licence is not None and ranked.get(licence) == top}
    return asking.pop() if len(asking) == 1 else "other"


def warnings(text: str) -> list[str]:
    """What a card's licence asks its writer to do."""
    licence = yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---"))["license"]
    if licence == UNKNOWN:
        return ["the licence of a merge is that of its inputs, and not all of theirs are known: set it (--license)"]
    if "-nc" in licence:
        return [f"an input's licence is {licence}: the merged model is not for commercial use either"]
    return []


def _header(
    out: Path,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    cards: Mapping[str, Mapping[str, Any]],
    licence: str,
    measured: Mapping[str, Mapping[str, Any]],
) -> str:
    paths = [recipe["base_model"], *(one["model"] for one in recipe["models"])]
    ids = list(dict.fromkeys(_hub_id(path) for path in paths if hub.is_reference(path)))
    names = (name for content in cards.values() for name in _listed(content.get("datasets")))
    datasets = sorted({name for name in names if isinstance(name, str)})
    library = _library(out, report)
    title = f"R2M merge of {_names(report)}"
    found: dict[str, Any] = {
        **({"base_model": ids} if ids else {}),
        "base_model_relation": "merge",
        "license": licence,
        **({"library_name": library} if library else {}),
        "pipeline_tag": "image-classification",
        "tags": ["merge", "r2m", "deepfake-detection"],
        **({"datasets": datasets} if datasets else {}),
    }
    if measured:
        results = [
            {
                "task": {"type": "image-classification"},
                "dataset": {"name": dataset, "type": dataset},
                "metrics": [
                    {"name": title_of, "type": key, "value": numbers[key]}
                    for key, title_of in _METRICS.items()
                    if numbers[key] is not None
                ],
            }
            for dataset, numbers in measured.items()
        ]
        found["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _licence_lines(licences: Mapping[str, str | None], chosen: str, given: bool) -> list[str]:
    if given:
        return []
    unknown = [name for name, licence in licences.items() if licence is None]
    lines = []
    if unknown:
        lines.append(
            "**Licence: set it.** A merge is under the licences of its inputs, and that of "
            f"{', '.join(printable(name) for name in unknown)} is not known here."
        )
    if "-nc" in chosen:
        lines.append(f"**Not for commercial use**: an input is under {chosen}.")
    return [*lines, ""] if lines else []


def _names(report: Mapping[str, Any]) -> str:
    return ", ".join(printable(name) for name in report["experts"])


def _front_matter(path: str) -> dict[str, Any]:
    """The YAML at the head of the card beside a checkpoint; empty where there is none."""
    place = hub.fetch(path).path if hub.is_reference(path) else Path(path)
    found = (place if place.is_dir() else place.parent) / CARD_FILE
    try:
        text = read_small(found, path).decode(errors="replace")
        if not text.startswith("---"):
            return {}
        content = yaml.load(text.split("\n---", 1)[0].removeprefix("---"), PlainLoader)
    except (OSError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _licence_of(content: Mapping[str, Any]) -> str | None:
    found = content.get("license")
    known = isinstance(found, str) and found not in ("", UNKNOWN, "other")
    return str(found).lower() if known else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _hub_id(reference: str) -> str:
    owner, name, *_ = reference.removeprefix(hub.SCHEME).split("/")
    return f"{owner}/{name.partition('@')[0]}"


def _library(out: Path, report: Mapping[str, Any]) -> str | None:
    specs = {row["name"]: TensorSpec(tuple(row["shape"]), torch.float32) for row in report["tensors"]}
    guess = family(specs) or ""
    if (out / "config.json").is_file():
        return "transformers"
    return next((library for library in _LIBRARIES[:2] if library in guess), None)


def _measured(evaluation: Mapping[str, Any], out: Path) -> dict[str, Mapping[str, Any]]:
    target = os.path.realpath(out)
    for one in evaluation.get("models", {}).values():
        source = os.path.realpath(one["source"])
        if source == target or os.path.dirname(source) == target:
            return dict(one["datasets"])
    raise InvalidInput(f"evaluation: none of its models lies in {out}")


def _digests(path: str) -> str:
    from r2m.checkpoints.reader import open_checkpoint

    found = []
    for file in open_checkpoint(path, path).files:
        with open(file, "rb") as content:
            found.append(hashlib.file_digest(content, "sha256").hexdigest())
    return " ".join(f"`{digest}`" for digest in found)


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the machine it was made on is called inside: of paths, their last two parts."""
    models = [{**one, "model": _shown_path(one["model"])} for one in recipe["models"]]
    return {**recipe, "base_model": _shown_path(recipe["base_model"]), "models": models}


def _shown_path(path: str) -> str:
    return path if hub.is_reference(path) else "/".join(Path(path).parts[-2:])


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
