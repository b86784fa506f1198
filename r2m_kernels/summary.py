"""A report in words: what a reader who knows no symbols wants to know of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import printable


class Report(dict[str, Any]):
    """A merge's report: a plain dictionary that, printed, says in words what is in it."""

    def __repr__(self) -> str:
        return "\n".join([*in_words(self), *(f"Warning: {printable(one)}" for one in self["warnings"])])


def in_words(report: Mapping[str, Any]) -> list[str]:
    """Sentences: how alike the experts are, what they share and how strongly it enters, what else does.

    Args:
        report: of :meth:`r2m_kernels.Analysis.report`, or as ``r2m_report.json`` has it.
    """
    return [*_alike(report["task_vectors"]), *_shared(report), *_beyond(report)]


def _alike(task_vectors: Mapping[str, Any]) -> list[str]:
    """How far experts moved from the base, and how alike."""
    moved = [share for share in task_vectors["relative_to_base"].values() if share is not None]
    cosines = [value for i, row in enumerate(task_vectors["cosines"]) for value in row[:i] if value is not None]
    parts = []
    if moved:
        parts.append(f"experts moved by {_range(moved, '{:.2%}')} of the base's length")
    if cosines:
        parts.append(f"alike by cosines of {_range(cosines, '{:.2f}')}")
    return [_sentence("; ".join(parts))] if parts else []


def _shared(report: Mapping[str, Any]) -> list[str]:
    """Who makes up the core, and what becomes of it."""
    core = report["core"]
    total = sum(abs(value) for value in core["coefficients"].values())
    if total == 0:
        return []
    each = ", ".join(f"{printable(name)} {value / total:.0%}" for name, value in core["coefficients"].items())
    ratio, scale = core["norm_ratio_to_mean"], core["scale_used"]
    length = "" if ratio is None else f", {ratio:.0%} as long as the experts' mean"
    factor = "" if scale == 1 else f", multiplied by {scale:.3g}"
    return [f"Shared by all (the core): {each}{length}{factor}."]


def _beyond(report: Mapping[str, Any]) -> list[str]:
    """What enters beside the core."""
    config, residual = report["config"], report["residual"]
    if config["elementwise"] != "none":
        kept = "largest" if config["elementwise"] == "ties" else "random"
        return [f"Of every expert's elements the {kept} {config['density']:.0%} were kept."]
    if config["eta"] == 0 or not residual["norms"]:
        return []
    what = "Of each expert's change" if config["real_rank"] == 0 else "Beyond it (the residuals)"
    cut = [value for value in (residual["cut"] or {}).values() if value is not None]
    parts = []
    if cut and max(cut) >= 0.005:
        parts.append(f"truncation left out {_range(cut, '{:.0%}')} of an expert's energy")
    if residual["eta_used"] is not None:
        parts.append(f"what is left enters times {residual['eta_used']:.3g}")
    if residual["norm_ratio_to_core"] is not None:
        parts.append(f"{residual['norm_ratio_to_core']:.0%} as long as the core")
    return [f"{what}: {', '.join(parts)}."] if parts else []


def _range(values: list[float], form: str) -> str:
    """One number, or the least and the largest."""
    least, largest = form.format(min(values)), form.format(max(values))
    return least if least == largest else f"{least} to {largest}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
