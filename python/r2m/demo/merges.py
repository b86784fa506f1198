"""Merging the specialists' files, by the code of ``r2m merge``, and picking what has to be picked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from r2m.demo.evaluation import group_auc, score_group
from r2m.demo.files import load_detector
from r2m.demo.networks import Detector
from r2m.demo.samples import Group
from r2m.execute import merge_files
from r2m_kernels import MergeConfig

TASK_ARITHMETIC_SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
CART_RANKS, CART_SCALES = (0.08, 0.16, 0.32), (0.5, 1.0)


@dataclass(frozen=True)
class Choice:
    """The candidate with the best mean AUC on the validation people.

    Attributes:
        config: how it merges.
        label: its hyper-parameters in words.
        validation_auc: that mean AUC.
    """

    config: MergeConfig
    label: str
    validation_auc: float


def task_arithmetic_candidates() -> dict[str, MergeConfig]:
    """Hyper-parameters in words → configuration, for task arithmetic."""
    return {f"scale {scale}": MergeConfig.task_arithmetic(scale) for scale in TASK_ARITHMETIC_SCALES}


def cart_candidates() -> dict[str, MergeConfig]:
    """Hyper-parameters in words → configuration, for CART."""
    return {
        f"rank {rank}, scale {scale}": MergeConfig.cart(rank, scale) for rank in CART_RANKS for scale in CART_SCALES
    }


def merge_and_load(base: Path, experts: Mapping[str, Path], out: Path, method: str, config: MergeConfig) -> Detector:
    """Merge the files into the directory ``out``, replacing a former merge there, and read the result back.

    Args:
        base, experts: the checkpoints.
        out: the directory of the merged one.
        method: name of the method, for recipe and report.
        config: how to merge.
    """
    merge_files(base, experts, out, config, method=method, overwrite=True)
    return load_detector(out / "model.safetensors")


def pick(
    base: Path,
    experts: Mapping[str, Path],
    method: str,
    candidates: Mapping[str, MergeConfig],
    validation: Group,
) -> Choice:
    """Try each candidate on the validation group; of equal ones the first wins.

    Args:
        base, experts, method: as for ``merge_and_load``.
        candidates: hyper-parameters in words → configuration, at least one.
        validation: pictures of people that are in neither training nor test.
    """
    choices = []
    for label, config in candidates.items():
        with tempfile.TemporaryDirectory(prefix="r2m-demo-") as directory:
            detector = merge_and_load(base, experts, Path(directory) / "merged", method, config)
        choices.append(Choice(config, label, group_auc(score_group(detector, validation))))
    return max(choices, key=lambda choice: choice.validation_auc)
