"""Merging the specialists' files, by the code of ``r2m merge``, and picking what has to be picked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from r2m.demo.evaluation import group_auc, score_group
from r2m.demo.networks import Detector, load_detector
from r2m.demo.samples import Group
from r2m.merge import merge_files
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from r2m_kernels import MergeConfig

# Row of the table → method of `r2m merge` and directory of the merged checkpoint.
MERGES = {"R2M": "r2m", "weight average": "weight_average", "task arithmetic": "task_arithmetic", "CART": "cart"}
# Hyper-parameters in words → configuration.
TASK_ARITHMETIC = {f"scale {scale}": MergeConfig.task_arithmetic(scale) for scale in (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)}
CART = {
    f"rank {rank}, scale {scale}": MergeConfig.cart(rank, scale) for rank in (0.08, 0.16, 0.32) for scale in (0.5, 1.0)
}


class Choice(NamedTuple):
    """The candidate with the best mean AUC on the validation people."""

    config: MergeConfig
    label: str  # its hyper-parameters in words
    validation_auc: float  # that mean AUC


def merge_and_load(base: Path, experts: Mapping[str, Path], out: Path, method: str, config: MergeConfig) -> Detector:
    """Merge the files into the directory ``out``, replacing a former merge there, and read the result back."""
    merge_files(Recipe(str(base), Expert.each(experts), config, method), out, Options(overwrite=True))
    return load_detector(out / "model.safetensors")


def pick(
    base: Path, experts: Mapping[str, Path], method: str, candidates: Mapping[str, MergeConfig], validation: Group
) -> Choice:
    """Try each candidate, words → configuration, on the validation people; of equal ones the first wins."""
    choices = []
    for label, config in candidates.items():
        with tempfile.TemporaryDirectory(prefix="r2m-demo-") as directory:
            detector = merge_and_load(base, experts, Path(directory) / "merged", method, config)
        choices.append(Choice(config, label, group_auc(score_group(detector, validation))))
    return max(choices, key=lambda choice: choice.validation_auc)


def merge_specialists(
    out: Path, base: Path, experts: Mapping[str, Path], validation: Group, seed: int
) -> tuple[dict[str, Detector], dict[str, Choice]]:
    """Merge by each method into directories under ``out``: row → merged detector, and row → what was picked for it."""
    choices = {
        row: pick(base, experts, MERGES[row], candidates, validation)
        for row, candidates in (("task arithmetic", TASK_ARITHMETIC), ("CART", CART))
    }
    configs = {"R2M": MergeConfig.r2m(seed=seed), "weight average": MergeConfig.weight_average()}
    configs |= {row: choice.config for row, choice in choices.items()}
    merged = {
        row: merge_and_load(base, experts, out / MERGES[row], MERGES[row], config) for row, config in configs.items()
    }
    return merged, choices
