"""What checkpoints are, from their headers, and whether they can be merged (``r2m inspect``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from r2m.arrangement import Arranged, arrange
from r2m.checkpoints.adapters import described
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.reader import open_checkpoint
from r2m.labels import Classes
from r2m.naming import name_experts
from r2m.progress import readable_bytes
from r2m.recipe import Arrangement
from r2m_kernels import MergeConfig, analyze
from r2m_kernels.errors import DoesNotFit, InvalidInput, printable
from r2m_kernels.heads import classifier
from r2m_kernels.meanings import composites
from r2m_kernels.streaming import dtype_name, plan_tensors

# The end of a name that a family of models has, and what has it. Its tensor is the first convolution, whose shape says
# how wide the model is.
FAMILIES: Mapping[str, str] = {
    "embeddings.patch_embedding.weight": "CLIP vision tower, transformers",
    "visual.conv1.weight": "CLIP vision tower, open_clip",
    "vit.embeddings.patch_embeddings.projection.weight": "ViT, transformers",
    "patch_embed.proj.weight": "ViT, timm",
    "conv_proj.weight": "ViT, torchvision",
    "conv_stem.weight": "EfficientNet, timm",
    "features.0.0.weight": "EfficientNet, torchvision",
    "_conv_stem.weight": "EfficientNet, efficientnet_pytorch (DeepfakeBench)",
    "block1.rep.0.conv1.weight": "Xception (DeepfakeBench)",
    "layer1.0.conv1.weight": "ResNet, torchvision",
}
# Role of a tensor → what becomes of such tensors.
TOLD: Mapping[str, str] = {
    "matrix": "matrices merged",
    "vector": "vectors merged",
    "statistic": "averaged",
    "copied": "kept as the base's",
    "extra": "of the experts alone averaged",
}
_ENDINGS = tuple(FAMILIES)
_LISTED = 6  # beginnings of names


def family(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """A guess from tensors' names and shapes, with the width of what stands first; None where nothing is known."""
    known = [name for name in shapes if name.endswith(_ENDINGS)]
    for ending, title in FAMILIES.items():
        name = next((name for name in known if name == ending or name.endswith("." + ending)), None)
        if name is not None:
            shape = shapes[name]
            patch = f", patches of {shape[-1]}" if "ViT" in title or "CLIP" in title else ""
            return f"{title}, {shape[0]} wide{patch}" if len(shape) == 4 else title
    return None


def describe(path: str, source: Checkpoint, base: str | None = None) -> list[str]:
    """A checkpoint in a few lines; of an adapter also whether ``base`` is its own."""
    specs = source.specs
    stored = {name: spec for name, spec in specs.items() if name not in source.aliases} if source.aliases else specs
    parameters = sum(spec.numel for spec in stored.values() if spec.dtype.is_floating_point)
    size = readable_bytes(sum(spec.nbytes for spec in stored.values()))
    types = Counter(spec.dtype for spec in specs.values())
    begin = Counter(name.partition(".")[0] for name in specs)
    files = "" if len(source.files) == 1 else f" in {len(source.files)} files"
    title = f"{printable(path)}: {len(specs)} tensors, {_count(parameters)} parameters, {size}{files}"
    if source.adapter is not None:
        return [title, *_rows(described(source, base))]
    classes = Classes.beside(source)
    rows = {
        "family": family({name: spec.shape for name, spec in specs.items() if name.endswith(_ENDINGS)}) or "unknown",
        "types": ", ".join(f"{count} {dtype_name(one)}" for one, count in types.most_common()),
        "begin": ", ".join(f"{printable(name)} {count}" for name, count in begin.most_common(_LISTED))
        + (f" and {len(begin) - _LISTED} more" if len(begin) > _LISTED else ""),
        "heads": ", ".join(f"{printable(name)} {list(specs[name].shape)}" for name in classifier(specs)[:4]),
        "labels": str(classes) if classes.labels else "",
        "stored": next((one.sentence for one in composites(specs)), ""),
        "from": ", ".join(map(printable, sorted(source.keys))),
        "notes": "; ".join(source.notes),
        "tied": ", ".join(f"{printable(name)} = {printable(first)}" for name, first in source.aliases.items()),
    }
    return [title, *_rows(rows)]


def _rows(rows: Mapping[str, str]) -> list[str]:
    return [f"  {row:<8}{text}" for row, text in rows.items() if text]


def inspect(
    paths: Sequence[str], *, arrangement: Arrangement | None = None, norms: bool = False, every: bool = False
) -> tuple[list[str], bool]:
    """Describe checkpoints; of several, the first is the base of a merge, and the rest its experts.

    Args:
        paths: as ``r2m merge`` takes them.
        arrangement: of names, of several.
        norms: read them all, for how far each expert moved, and how alike their ways are.
        every: list every mismatch, not examples alone.

    Returns:
        Lines for a terminal, and whether the set can be merged.

    Raises:
        InvalidInput: one of them cannot be read.
    """
    arrangement = arrangement or Arrangement()
    sources = [
        open_checkpoint(path, printable(path), arrangement.key, adapters=index > 0 or len(paths) == 1)
        for index, path in enumerate(paths)
    ]
    base = paths[0] if paths[1:] else None
    text = [line for path, source in zip(paths, sources, strict=True) for line in describe(path, source, base)]
    if len(paths) == 1:
        return text, True
    experts = dict(zip(name_experts(paths[1:]), sources[1:], strict=True))
    try:
        arranged = arrange(sources[0], experts, MergeConfig.weight_average().replace(head="mean"), arrangement)
        plan = plan_tensors(arranged.base, arranged.experts, arranged.config)
    except InvalidInput as error:
        whole = error.every if isinstance(error, DoesNotFit) and every else ""
        more = ["(--all lists every mismatch)"] if isinstance(error, DoesNotFit) and error.every and not every else []
        return [*text, f"cannot be merged: {whole or error}", *more], False
    roles = Counter(tensor.role for tensor in plan.tensors)
    counts = ", ".join(f"{count} {TOLD[role]}" for role, count in roles.most_common())
    return [*text, f"can be merged into {printable(paths[0])}: {counts}", *(_norms(arranged) if norms else ())], True


def _norms(arranged: Arranged) -> list[str]:
    report: dict[str, Any] = analyze(arranged.base, dict(arranged.experts), arranged.config).report()
    lengths, cosines = report["task_vectors"]["norms"], report["task_vectors"]["cosines"]
    relative = report["task_vectors"]["relative_to_base"]
    rows = []
    for name, angles in zip(lengths, cosines, strict=True):
        alike = " ".join("    –" if value is None else f"{value:5.2f}" for value in angles)
        share = "" if relative[name] is None else f"{relative[name]:.2%}·‖base‖"
        rows.append(f"  ‖task vector‖ {lengths[name]:<10.4g} {share:<14} cosines {alike}  {printable(name)}")
    return rows


def _count(number: int) -> str:
    """``"304 M"``."""
    if number == 0:
        return "0"
    step = min(3, int(math.log10(number)) // 3)
    return f"{number / 1000**step:.3g}{('', ' k', ' M', ' G')[step]}"
