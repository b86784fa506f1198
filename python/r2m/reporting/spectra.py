"""Singular values of residuals, read from the checkpoints again: what truncation kept and dropped, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.axes import Axes

from r2m import former
from r2m.job import open_job
from r2m.reporting.figures import OTHERS, Picture, curves, picture
from r2m.shorten import clip, shorten
from r2m_kernels.errors import BadOption

_LETTERS = 40  # of a matrix's name over its spectrum


def of_residuals(out: str | Path, count: int) -> Iterator[Picture]:
    """Spectra of matrices evenly spread over the model, by a full SVD each.

    Args:
        out: the output of a merge; its checkpoints must still be where its recipe says.
        count: how many matrices.

    Raises:
        InvalidInput: the checkpoints are gone or no longer fit each other, or there are no residuals.
    """
    recipe = former.recipe_of(out)
    if recipe.config.eta == 0:
        raise BadOption(f"spectra: {recipe.method} has no residuals")
    # The mixing is found without truncating anything.
    job = open_job(replace(recipe, config=recipe.config.replace(eta=0.0)))
    analysis = job.analyze()
    matrices = [tensor for tensor in analysis.plan.tensors if tensor.role == "matrix"]
    count = min(count, len(matrices))
    chosen = {matrices[index * len(matrices) // count].name for index in range(count)}
    mixing = analysis.real_subspace.mixing.float()
    for number, tensor in enumerate(tensor for tensor in matrices if tensor.name in chosen):
        base = job.arranged.base.read(tensor.name).float()
        taus = torch.stack([view.read(tensor.name).float() - base for view in job.arranged.experts.values()])
        residuals = torch.einsum("ji,j...->i...", mixing, taus).reshape(len(taus), tensor.matrix_shape[0], -1)
        values = dict(zip(recipe.experts, torch.linalg.svdvals(residuals).tolist(), strict=True))
        yield _spectrum(number, tensor.name, values, tensor.rank)


def _spectrum(number: int, name: str, values: dict[str, list[float]], rank: int) -> Picture:
    truncated = rank < max(map(len, values.values()))

    def draw(axes: Axes) -> None:
        short = shorten(list(values))
        points = {short[expert]: list(enumerate(spectrum, start=1)) for expert, spectrum in values.items()}
        curves(axes, points, "singular value", "size", clip(name, _LETTERS))
        if truncated:
            axes.axvline(rank + 0.5, color=OTHERS, linestyle=":")
        axes.set_ylim(bottom=0)

    rows = [
        {"expert": expert, "index": index, "singular value": value, "kept": index <= rank}
        for expert, spectrum in values.items()
        for index, value in enumerate(spectrum, start=1)
    ]
    text = (
        f"Left of the dotted line is what rank {rank} kept. A steep fall: the residual is a few directions; a slow "
        "one: much of it is lost, or noise."
        if truncated
        else "All of it was kept. A steep fall: a smaller rank would lose little; a slow one: it is spread, or noise."
    )
    return picture(f"spectrum-{number}", name, text, rows, [draw])
