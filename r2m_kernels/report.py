"""The report of a merge: its numbers as plain JSON values, and what they mean in plain words (README §7)."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ._backends import Backend
from ._stream.plan import PlannedTensor
from ._stream.run import Run
from ._stream.tensors import dtype_name
from ._version import __version__
from .config import MergeConfig
from .findings import Findings, Residuals
from .norm_matching import LEAST_SHARE
from .real_subspace import GRAM_ERROR
from .row_weights import shared_weight
from .summary import Report

# Found on merged detectors: alarms that told bad merges there, with their error rates in docs/quality-studies.md.
CALIBRATED = {
    "smallest cosine": 0.05,  # of two task vectors: below, they hardly have anything in common
    "longest/median task vector": 3.0,  # above, one update drowns the others
    "leading expert's share of the core": 0.9,  # above, the core is one expert
}
# What these say is true by itself; no merge of the benchmark came near them, good or bad.
WEAK_CORE = 0.5  # ‖core‖/‖mean‖ below this: the specialists share little
SMALL_GAP = 0.05  # (λ_k − λ_{k+1})/λ_k below this: the Real subspace turns with rounding
SWALLOWED = 1e-3  # of the largest weight; less: nothing of the expert is left to speak of
LARGE_SCALE = 10.0  # s_i above this: a residual of almost nothing is blown up
USUAL_UPDATE = (0.001, 0.4)  # ‖task vector‖/‖base‖ outside of these: another base, or no fine-tuning
CLOSE_TO_MEAN = 1e-3  # ‖update − mean task vector‖/‖mean‖ below this: an average, but for rounding to 16 bits
CLOSE_TO_CORE = 0.01  # ‖residual term‖/‖core‖ below this: the merge is its core
# What the estimate of a truncation's distance to the optimum rests on; of a backend's own method the backend says it.
BASIS = {
    "exact": "an exact truncation",
    "textbook": "growth of the kept energy in the last iteration, continued at the rate of the Ritz values",
}
UNCERTAIN = 0.01  # cancellation above this fraction of an energy makes it uncertain


def _installed(package: str) -> str:
    """Its version; what is not imported here may be missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def report(
    findings: Findings, residuals: Residuals, base_squares: Mapping[str, float], config: MergeConfig, run: Run
) -> Report:
    """See :meth:`r2m_kernels.Analysis.report`."""
    names = findings.experts
    real, gram, strength = findings.real, findings.matrix_gram, residuals.strength
    mean_norm = float((real.weights @ gram @ real.weights).clamp_min(0).sqrt())
    core_norm = float((real.core @ gram @ real.core).clamp_min(0).sqrt())
    core_bound = _cancellation(real.core, gram)
    residual_term = None if strength.residual_norm is None else strength.eta * strength.residual_norm
    with_residuals = config.eta != 0
    numbers: dict[str, Any] = {
        "versions": {
            "r2m_kernels": __version__,
            "torch": torch.__version__,
            "numpy": _installed("numpy"),
            "python": platform.python_version(),
        },
        "backend": {
            "name": run.backend.name,
            "reason": run.backend.reason,
            "device": str(run.device),
        },
        "config": config.to_dict(),
        "experts": list(names),
        "task_vectors": {
            "gram": gram.tolist(),
            "norms": _by_name(names, gram.diag().clamp_min(0).sqrt()),
            "relative_to_base": _relative_to_base(findings, base_squares),
            "cosines": _cosines(gram),
            "vector_gram": findings.vector_gram.tolist(),
        },
        "core": {
            "coefficients": _by_name(names, real.core),
            "norm": core_norm,
            "mean_norm": mean_norm,
            "norm_ratio_to_mean": core_norm / mean_norm if mean_norm > 0 else None,
            "norm_uncertain": core_bound > UNCERTAIN * core_norm**2,
            "dimension": real.dimension,
            "weighted_gram": real.gram.tolist(),
            "eigenvalues": real.eigenvalues.tolist(),
            "gap": real.gap,
            "scale_used": strength.core_scale,
            "left": _left_of_core(findings, residuals, config),
            "share_of_update": _share(strength.core_norm, residual_term if with_residuals else 0.0),
        },
        "residual": {
            "norms": _by_name(names, residuals.norms) if with_residuals else None,
            "scales": _by_name(names, residuals.scales) if with_residuals else None,
            "eta_used": strength.eta,
            "norm": residual_term if with_residuals else 0.0,
            "cancelled": strength.cancelled,
            "cut": _cut(findings, residuals) if with_residuals else None,
            "norm_ratio_to_core": (
                residual_term / strength.core_norm if residual_term is not None and strength.core_norm > 0 else None
            ),
        },
        "tensors": tensor_rows(findings, residuals.energies, config, run.backend),
        "head": list(findings.plan.heads),
        "tied": dict(findings.plan.aliases),
        "dropped": list(findings.plan.dropped),
        "steps": [
            {"step": step.step, "seconds": step.seconds, "bytes_read": step.bytes_read} for step in run.records.values()
        ],
    }
    numbers["warnings"] = [
        *_warnings(findings, config, numbers),
        *_of_the_update(findings, residuals, config, numbers),
    ]
    return Report(numbers)


def _relative_to_base(findings: Findings, base_squares: Mapping[str, float]) -> dict[str, float | None]:
    """‖τ_i‖/‖θ₀‖ over matrix tensors."""
    base = math.sqrt(sum(base_squares[tensor.name] for tensor in findings.plan.of("matrix")))
    norms = findings.matrix_gram.diag().clamp_min(0).sqrt().tolist()
    return {name: norm / base if base > 0 else None for name, norm in zip(findings.experts, norms, strict=True)}


def _share(core_norm: float, residual_term: float | None) -> float | None:
    """Of the update's energy, the core's: the two are orthogonal but for what truncation and matching change."""
    if residual_term is None or core_norm == residual_term == 0:
        return None
    return core_norm**2 / (core_norm**2 + residual_term**2)


def _cut(findings: Findings, residuals: Residuals) -> dict[str, float | None]:
    """Of the energy of each residual, over matrix tensors, what truncation cut off: there the core alone is added."""
    names = sorted(residuals.energies)
    kept = sum((residuals.energies[name] for name in names), torch.zeros(len(findings.experts)).double())
    whole = findings.real.mixing.T @ findings.matrix_gram @ findings.real.mixing
    bounds = [_cancellation(column, findings.matrix_gram) for column in findings.real.mixing.T]
    return {
        expert: max(0.0, 1 - float(kept[i] / whole[i, i])) if whole[i, i] > bounds[i] else None
        for i, expert in enumerate(findings.experts)
    }


def _left_of_core(findings: Findings, residuals: Residuals, config: MergeConfig) -> float | None:
    """Factor of the core when residuals have taken it away again, as whole ones do; None where they are truncated."""
    if config.eta == 0 or config.residual != "core" or any(one.truncated for one in findings.matrices(config)):
        return None
    weights, scales = findings.real.weights, residuals.scales
    taken = shared_weight(weights, scales) if config.row_power > 0 else float(weights @ scales)
    return residuals.strength.core_scale - residuals.strength.eta * taken


def _of_the_update(findings: Findings, residuals: Residuals, config: MergeConfig, numbers: dict[str, Any]) -> list[str]:
    """Warnings of updates that are no R²M: without a core, next to the base or to the mean; of strange lengths."""
    warnings = []
    for name, share in numbers["task_vectors"]["relative_to_base"].items():
        if share is None and numbers["task_vectors"]["norms"][name]:
            warnings.append(
                f"the task vector of '{name}' is the whole of it, as all of the base is zero: another base?"
            )
        if share and not USUAL_UPDATE[0] <= share <= USUAL_UPDATE[1]:
            warnings.append(
                f"the task vector of '{name}' has {share:.2%} of the base's length, and fine-tuning moves "
                f"{USUAL_UPDATE[0]:.1%} to {USUAL_UPDATE[1]:.0%}: another base, or hardly any?"
            )
    core, strength, real = numbers["core"], residuals.strength, findings.real
    term, mean = numbers["residual"]["norm"], core["mean_norm"]
    if config.real_rank is None or config.elementwise != "none" or len(findings.experts) == 1 or mean == 0:
        return warnings
    left = core["left"]
    if left is not None and core["norm"] > 0 and abs(left) < abs(strength.core_scale) / 2:
        warnings.append(
            f"the core cancels: whole residuals take it away again, and of {strength.core_scale:.3g} times the core "
            f"{left:.3g} is left; truncated residuals (rank) give it its part"
        )
    if not (residuals.norms > 0).any():
        return warnings
    if term is None:  # a row's is no longer than the longest residual there
        term = strength.eta * float(residuals.norms.norm())
    most = (strength.core_norm + term) / mean
    if most < WEAK_CORE:
        warnings.append(
            f"the merge is the base to {1 - most:.0%}: its update has at most {most:.1%} of the mean task vector's norm"
        )
    scaled = strength.core_scale * real.core
    if left is not None and config.row_power == 0:
        scaled, term = scaled + strength.eta * (real.mixing @ (real.weights * residuals.scales)), 0.0
    off = scaled - real.weights
    distance = (float((off @ findings.matrix_gram @ off).clamp_min(0).sqrt()) + term) / mean
    if distance < CLOSE_TO_MEAN:
        warnings.append(
            f"the update is within {distance:.1e} of the plain average's: in matrices the merge is weight_average"
        )
    return warnings


def tensor_rows(
    findings: Findings, energies: Mapping[str, Tensor], config: MergeConfig, backend: Backend
) -> list[dict[str, Any]]:
    """One row per output tensor.

    ``kept_energy`` is ‖F_il‖²/‖X_il‖² per expert: the kept part from the factors, the whole from the Gram, whose
    difference of large numbers is ``uncertain`` where its rounding bound exceeds 1 % of the value.
    ``distance_to_optimum`` estimates ‖X_il − F_il‖ / the smallest possible − 1 per expert, on ``distance_basis``.
    """
    rows = []
    for tensor in findings.plan.tensors:
        row: dict[str, Any] = {
            "name": tensor.name,
            "role": tensor.role,
            "shape": list(tensor.spec.shape),
            "dtype": dtype_name(tensor.spec.dtype),
        }
        if tensor.role == "matrix":
            row["rank"] = findings.at(tensor, config).rank
            row.update(dict.fromkeys(("kept_energy", "uncertain", "distance_to_optimum", "distance_basis")))
            if tensor.mapped:  # energies of other singular values than the residual's say nothing about a truncation
                pass
            elif tensor.name in energies and row["rank"] == min(tensor.matrix_shape):
                row["kept_energy"] = dict.fromkeys(findings.experts, 1.0)
                row["uncertain"] = []
            elif tensor.name in energies:
                row.update(_kept_energy(findings, tensor.name, energies[tensor.name]))
                row.update(_distance(findings, tensor, config, backend, energies[tensor.name]))
        rows.append(row)
    return rows


def _kept_energy(findings: Findings, name: str, kept: Tensor) -> dict[str, Any]:
    mixing, gram = findings.real.mixing, findings.grams[name]
    whole = findings.residual_energies[name]
    energies: dict[str, float | None] = {}
    uncertain = []
    for i, expert in enumerate(findings.experts):
        bound = _cancellation(mixing[:, i], gram)
        energies[expert] = float(kept[i] / whole[i]) if whole[i] > bound else None
        if bound > UNCERTAIN * float(whole[i]):
            uncertain.append(expert)
    return {"kept_energy": energies, "uncertain": uncertain}


def _distance(
    findings: Findings, tensor: PlannedTensor, config: MergeConfig, backend: Backend, kept: Tensor
) -> dict[str, Any]:
    """None where the analyzed rank is another, nothing is known, or what was cut off is within rounding."""
    known = findings.truncation_of(tensor, config)
    if findings.at(tensor, config).whole:
        return {"distance_to_optimum": dict.fromkeys(findings.experts, 0.0), "distance_basis": BASIS["exact"]}
    if known is None:
        return {}
    method, gap = known.method, known.gap
    mixing, gram = findings.real.mixing, findings.grams[tensor.name]
    lost = findings.residual_energies[tensor.name] - kept
    distances: dict[str, float | None] = {}
    for i, expert in enumerate(findings.experts):
        best = math.nan if gap is None else float(lost[i] - gap[i])
        if method == "exact":
            distances[expert] = 0.0
        else:
            certain = best > _cancellation(mixing[:, i], gram)
            distances[expert] = math.sqrt(float(lost[i]) / best) - 1 if certain else None
    basis = backend.operators.traits.gap_basis if method == "shifted" else BASIS[method]
    return {"distance_to_optimum": distances, "distance_basis": basis}


def _cancellation(weights: Tensor, gram: Tensor) -> float:
    """Rounding bound of wᵀGw: 16·2⁻²⁴ · |w|ᵀ|A||A|ᵀ|w|, with |a_i||a_j| ≤ ‖a_i‖‖a_j‖."""
    return GRAM_ERROR * float(weights.abs() @ gram.diag().clamp_min(0).sqrt()) ** 2


def _by_name(names: list[str], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _cosines(gram: Tensor) -> list[list[float | None]]:
    norms = gram.diag().clamp_min(0).sqrt()
    outer = torch.outer(norms, norms)
    return [
        [float(gram[i, j] / outer[i, j]) if outer[i, j] > 0 else None for j in range(len(gram))]
        for i in range(len(gram))
    ]


def _warnings(findings: Findings, config: MergeConfig, numbers: dict[str, Any]) -> list[str]:
    warnings = []
    core, residual = numbers["core"], numbers["residual"]
    names, count = findings.experts, len(findings.experts)
    for name, norm in numbers["task_vectors"]["norms"].items():
        if norm == 0 and findings.plan.of("matrix"):
            warnings.append(f"expert '{name}' equals the base in every matrix tensor: it adds nothing but its weight")
    weights = dict(zip(names, findings.real.weights.tolist(), strict=True))
    heaviest = max(names, key=lambda name: weights[name])
    for name in names:
        if weights[name] < SWALLOWED * weights[heaviest]:
            share = weights[name] / weights[heaviest]
            warnings.append(f"expert '{name}' has {share:.1e} of the weight of '{heaviest}': nothing of it is left")
    ratio = core["norm_ratio_to_mean"]
    if config.real_rank != 0 and ratio is not None and ratio < WEAK_CORE:
        warnings.append(
            f"the core has {ratio:.2f} of the mean task vector's length: the specialists share little of what "
            "the core keeps, and the merge may fall behind plain averaging"
        )
    if core["norm_uncertain"] and core["norm"] > 0:
        warnings.append("the core's norm is a difference of nearly equal numbers and known to few digits")
    coefficients = {name: abs(value) for name, value in core["coefficients"].items()}
    total = sum(coefficients.values())
    leader = max(names, key=lambda name: coefficients[name])
    warnings += _strangers(names, numbers["task_vectors"])
    if count > 1 and total > 0 and coefficients[leader] / total > CALIBRATED["leading expert's share of the core"]:
        share = coefficients[leader] / total
        warnings.append(f"expert '{leader}' dominates the core with {share:.0%} of its coefficients")
    if core["gap"] is not None and core["gap"] < SMALL_GAP:
        warnings.append(
            f"the gap after the last eigenvalue kept is small ({core['gap']:.1e} of it): the Real subspace is not well "
            "determined, tiny changes of the inputs turn it"
        )
    if config.eta == 0 or count == 1:
        return warnings
    for name, scale in residual["scales"].items():
        if scale > LARGE_SCALE:
            warnings.append(f"the residual of expert '{name}' is scaled up {scale:.0f} times to match the others' norm")
    without = [name for name, norm in residual["norms"].items() if norm == 0]
    if len(without) == count:
        warnings.append("no expert has a residual beyond rounding: the merge is its core")
    elif without:
        listed = ", ".join(f"'{name}'" for name in without)
        warnings.append(f"no residual beyond rounding for expert {listed}: it enters through the core alone")
    if residual["cancelled"]:
        warnings.append(
            f"the residuals cancel: their sum has less than 1/{LEAST_SHARE:.0f} of their mean length, and a relative "
            f"eta counts it as so long (η {residual['eta_used']:.3g}), lest truncation's leavings be blown up"
        )
    strength = residual["norm_ratio_to_core"]
    if strength is not None and len(without) < count and strength < CLOSE_TO_CORE:
        warnings.append(f"the residual term has {strength:.1e} of the core's norm: the merge is close to its core")
    return warnings


def _strangers(names: list[str], task_vectors: dict[str, Any]) -> list[str]:
    """Warnings of experts that do not belong: another base has the same names and shapes."""
    warnings = []
    cosines: list[list[float | None]] = task_vectors["cosines"]
    pairs = [(value, i, j) for i, row in enumerate(cosines) for j, value in enumerate(row[:i]) if value is not None]
    if pairs and min(pairs)[0] < CALIBRATED["smallest cosine"]:
        value, i, j = min(pairs)
        warnings.append(
            f"the task vectors of '{names[j]}' and '{names[i]}' have cosine {value:.2f}, nearly nothing in common: "
            "was one of them fine-tuned from another base?"
        )
    norms = task_vectors["norms"]
    for i, name in enumerate(names):
        twin = next((j for value, one, j in pairs if one == i and _same(value, norms[name], norms[names[j]])), None)
        if twin is not None:
            warnings.append(
                f"expert '{name}' is the same as '{names[twin]}' in every matrix tensor, which counts twice so: is "
                "another file meant?"
            )
    longest, median = max(norms, key=lambda name: float(norms[name])), statistics.median(norms.values())
    if median > 0 and norms[longest] > CALIBRATED["longest/median task vector"] * median:
        warnings.append(
            f"the task vector of '{longest}' is {norms[longest] / median:.1f} times as long as the median one: "
            "over-trained, or fine-tuned from another base?"
        )
    return warnings


def _same(cosine: float, norm: float, other: float) -> bool:
    """Whether two task vectors differ by no more than rounding of what is known of them."""
    return norm**2 + other**2 - 2 * cosine * norm * other <= GRAM_ERROR * (norm**2 + other**2)
