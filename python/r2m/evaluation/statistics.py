"""Running means and variances of batch normalisation, estimated anew from pictures that nobody has labelled."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from r2m_kernels.errors import DoesNotFit, quoted

STATISTICS = ("running_mean", "running_var")


def estimated(model: nn.Module, batches: Iterable[Tensor], label: str) -> dict[str, Tensor]:
    """Of every such layer, the mean over batches; each layer sees what those before it make with a batch's own.

    Args:
        model: in evaluation mode; its statistics are changed.
        batches: (n, 3, s, s) each.
        label: how error messages name it.

    Returns:
        Name in the model's state → value.

    Raises:
        DoesNotFit: it has no such layer.
    """
    layers = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, _NormBase) and part.track_running_stats and part.running_mean is not None
    }
    if not layers:
        raise DoesNotFit(f"{label}: expected layers of batch normalisation with running statistics, got none")
    for part in layers.values():
        part.reset_running_stats()
        part.momentum = None  # the mean of all batches
        part.train()
    with torch.no_grad():
        for images in batches:
            model(images)
    for part in layers.values():
        part.eval()
    return {
        f"{name}.{kind}".lstrip("."): getattr(part, kind).detach().cpu().clone()
        for name, part in layers.items()
        for kind in STATISTICS
    }


def under(names: Collection[str], found: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """The same by the names of a checkpoint, which may begin with more.

    Raises:
        DoesNotFit: it is not clear which one a statistic is.
    """
    by_name = {}
    for own, value in found.items():
        fitting = [own] if own in names else [name for name in names if name.endswith(f".{own}")]
        if len(fitting) != 1:
            raise DoesNotFit(f"{label}: {quoted(own)} of the detector: expected one such tensor, got {len(fitting)}")
        by_name[fitting[0]] = value
    return by_name
