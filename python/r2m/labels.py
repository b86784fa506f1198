"""What the outputs of a classifier stand for, and the heads of experts brought into one order.

Two detectors may count the same classes the other way round: the mean of their heads is then a head of nothing. What
says so is ``id2label`` of a ``config.json`` beside the checkpoint, or whoever merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from r2m.checkpoints import class_names
from r2m.checkpoints.class_names import UNSAID
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.formats import OUTPUTS
from r2m.checkpoints.view import LazyTensor, View
from r2m.places import MOST_RECORD, mapping, read_beside
from r2m.records import REPORT
from r2m_kernels.errors import BadFile, BadOption, DoesNotFit, InvalidInput, printable, quoted

FILE = "config.json"  # of transformers
_MOST_HEAD = 2**20  # elements of a head that is looked at
# Standard deviations of the cosine of two ways that have nothing to do with each other.
_CHANCE = 5.0
_WRITTEN = ("id2label", "label2id", "label_names")  # of the libraries that a merge is written for
_NUMBER = re.compile(r"\W*\d+\W*")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # FakeFace, AI_generated and real-art are two each
FAKE_WORD = re.compile(
    r"(deep)?fakes?|spoof(ed|ing)?|forge(d|ry)|synthetic|synthesi[sz]ed|generated|manipulated|altered|tampered|edited|"
    r"artificial|ai|attack|gan|diffusion"
)
REAL_WORD = re.compile(r"real|genuine|authentic|original|pristine|bonafide|human|natural|nature")
NOT_WORD = re.compile(r"not?|non")


@dataclass(frozen=True)
class Classes:
    """What is known of a classifier's outputs.

    Attributes:
        labels: of each, by index; ``None``: not known.
        fake: the index of the fake's output; ``None``: not known, or there is no such thing.
        where: who says it, of a checkpoint; empty: nobody.
    """

    labels: tuple[str, ...] | None = None
    fake: int | None = None
    where: str = field(default="", compare=False)

    @classmethod
    def called(cls, labels: Sequence[str], where: str = "") -> Classes:
        """By what they are called."""
        if all(UNSAID.fullmatch(label) for label in labels):
            return cls()
        fakes = [i for i, label in enumerate(labels) if _is_fake(label)]
        return cls(tuple(labels), fakes[0] if len(fakes) == 1 else None, where)

    @classmethod
    def beside(cls, source: Checkpoint) -> Classes:
        """As the configuration in the directory of a checkpoint's files says it, or these themselves; or nothing.

        Raises:
            BadFile: one says two things, or both say another.
        """
        if not source.files:
            return cls()
        file = source.files[0].parent / FILE
        said, where = class_names.labels(read_beside(file), printable(str(file))), FILE
        own = class_names.labels(source.about, source.label)
        if own and said and own != said and sorted(own) == sorted(said):
            both = f"{printable(', '.join(said[:8]))}, and it itself as {printable(', '.join(own[:8]))}"
            raise BadFile(f"{source.label}: {FILE} beside it has its labels as {both}; expected one order")
        if not said:
            said, where = own, "its file"
        if not said and source.files[0].name in OUTPUTS:  # of a merge whose base has no configuration
            merged = read_beside(source.files[0].parent / REPORT.file, MOST_RECORD).get("arrangement")
            said, where = class_names.listed(merged.get("labels")) if isinstance(merged, dict) else [], "its merge"
        return cls.called(said, where)

    def said(self, fake: int | None) -> Classes:
        """With what somebody says of the fake's output, which counts more than any file."""
        if fake is None:
            return self
        return Classes(self.labels if self.fake in (None, fake) else None, fake)

    def of(self, count: int) -> Classes:
        """What is known of a head of ``count`` outputs, 0 where none is found: labels of another number are not its."""
        return self if self.labels is None or count in (0, len(self.labels)) else Classes()

    def order(self, other: Classes, count: int) -> list[int] | None:
        """Of the outputs of ``other``, which comes first here, second, …; ``None``: nothing is known of it.

        Args:
            other: of a head of ``count`` outputs, 0 where that is not known.

        Raises:
            ValueError: they are not the same classes.
        """
        labels, others = self.labels or (), other.labels or ()
        if labels and others:
            ours, theirs = [_plain(label) for label in labels], [_plain(label) for label in others]
            if sorted(ours) == sorted(theirs) and len(set(ours)) == len(ours):
                return [theirs.index(label) for label in ours]
        if (count or len(others)) == 2 and self.fake is not None and other.fake is not None:
            return [0, 1] if self.fake == other.fake else [1, 0]
        if labels and others and not any(all(map(_NUMBER.fullmatch, one)) for one in (labels, others)):
            raise ValueError
        return None

    def __str__(self) -> str:
        if self.labels is None:
            return f"the fake at {self.fake}"
        return ", ".join(f"{i} {printable(label)}" for i, label in enumerate(self.labels[:8]))


@dataclass(frozen=True)
class Agreed:
    """Experts whose heads have one order.

    Attributes:
        experts: with their heads' rows in it.
        classes: of the merged head.
        turned: expert → which of its rows came first, second, …, where that was another order.
        notes: what was done, a sentence for each.
    """

    experts: Mapping[str, View]
    classes: Classes
    turned: Mapping[str, list[int]]
    notes: tuple[str, ...] = ()


def agree(
    base: View,
    experts: Mapping[str, View],
    heads: Mapping[str, Sequence[str]],
    wanted: Classes,
    said: Mapping[str, int],
) -> Agreed:
    """Bring the rows of experts' heads into one order: the wanted one, the base's, or that of the first who has one.

    Args:
        base, experts: in one layout.
        heads: names of the classifier's tensors in each expert, by its name.
        wanted: of the merged head, as far as it is said.
        said: expert → where its fake's output is.

    Raises:
        BadOption: an index that the head does not have.
        DoesNotFit: experts that tell other things apart.
    """
    turned: dict[str, list[int]] = {}
    views, notes, whose = dict(experts), [], "what is asked for"
    counts = {name: _outputs(view, heads[name]) for name, view in experts.items()}
    known = {}
    for name, view in experts.items():
        beside = Classes.beside(view.source)
        known[name] = beside.of(counts[name]).said(said.get(name))
        if beside.labels and beside.of(counts[name]) != beside:
            notes.append(
                f"{view.label}: {_whose(beside.where)} has {len(beside.labels)} labels and its head {counts[name]} "
                "outputs: they say nothing of it"
            )
        elif not beside.labels and (key := class_names.not_understood(_config(view.files))):
            notes.append(
                f"{view.label}: {quoted(key)} of its {FILE} is not read; expected a label for every output from 0 on"
            )
    indices = [*said.items(), *((name, wanted.fake) for name in experts if wanted.fake is not None)]
    for name, index in indices:
        if counts[name] != 2 or index not in (0, 1):
            raise BadOption(
                f"fake: expected 0 or 1, for a head of two outputs, got {index} for {experts[name].label}, which has "
                f"{counts[name] or 'no head'}"
            )
    if wanted == Classes():
        wanted, whose = _first(base, experts, known, counts)
    for name, view in experts.items():
        try:
            order = wanted.order(known[name], counts[name])
        except ValueError:
            raise DoesNotFit(
                f"{view.label}: its head tells {known[name]} apart, expected the same classes as {whose}: {wanted}"
            ) from None
        if order is None:
            if wanted != Classes() and counts[name]:
                notes.append(
                    f"{view.label}: does not say its labels, taken to be as of {whose}: {wanted} (fake: in a recipe)"
                )
            continue
        theirs = known[name].labels
        if wanted.labels is None and theirs:
            wanted = Classes(tuple(theirs[i] for i in order), wanted.fake)
        if order != sorted(order):
            if not heads[name]:
                raise DoesNotFit(
                    f"{view.label}: its labels are {known[name]}, of {whose} {wanted}, and which tensors are its head "
                    "is not known; name them (head_tensors, --head-tensors)"
                )
            views[name] = view.having({one: _rows(view.tensors[one], order) for one in heads[name]})
            turned[name] = order
            notes.append(
                f"{view.label}: its labels are {known[name]}, of {whose} {wanted}; its head's rows were put so"
            )
    said_for = [name for name in experts if known[name] != Classes()]
    notes += _against(base, {name: view for name, view in views.items() if counts[name] in (1, 2)}, heads, said_for)
    return Agreed(views, wanted, turned, tuple(notes))


def _against(
    base: View, experts: Mapping[str, View], heads: Mapping[str, Sequence[str]], known: Sequence[str]
) -> list[str]:
    """Heads that run against the first one, where files say of one of them at most what its outputs stand for."""
    first: tuple[str, Tensor] | None = None
    notes = []
    for name, view in experts.items():
        matrix = next((one for one in heads[name] if len(view.specs[one].shape) > 1), None)
        if matrix is None or view.specs[matrix].numel > _MOST_HEAD:
            continue
        rows = view.read(matrix).double().flatten(1)
        if matrix in base.specs and base.specs[matrix].shape == view.specs[matrix].shape:
            rows = rows - base.read(matrix).double().flatten(1)
        way = rows[-1] - rows[0] if len(rows) > 1 else rows[0]
        if first is None:
            first = name, way
        elif way.shape == first[1].shape and not {name, first[0]} <= {*known}:
            cosine = float(functional.cosine_similarity(way, first[1], dim=0))
            if cosine < -_CHANCE / len(way) ** 0.5:
                theirs = experts[first[0]].label
                notes.append(
                    f"{view.label}: its head runs against that of {theirs} (cosine {cosine:.2f}): does it count "
                    f"real and fake the other way round?{' (fake: in a recipe)' * (len(rows) == 2)}"
                )
    return notes


def _first(
    base: View, experts: Mapping[str, View], known: Mapping[str, Classes], counts: Mapping[str, int]
) -> tuple[Classes, str]:
    """The order of the first expert that has one, or the base's of the same classes; and whose it is."""
    first = next((name for name in experts if known[name] != Classes()), None)
    if first is None:
        return Classes(), ""
    ours = Classes.beside(base.source).of(counts[first])
    try:
        same = ours.order(known[first], counts[first]) is not None
    except ValueError:  # a base that told other things apart
        same = False
    return (ours, base.label) if same else (known[first], experts[first].label)


def into_config(text: bytes, classes: Classes, outputs: int, dtype: str | None = None) -> bytes:
    """A ``config.json`` that says what the merged model is; as it was where that is right already.

    Args:
        text: the base's.
        classes: of the merged head, as far as they are known.
        outputs: how many the merged head has; 0 where there is none.
        dtype: of the merged tensors, where it is not the base's.
    """
    try:
        content = mapping(text, FILE)
        before = class_names.labels(content, FILE)
        after = mapping(text, FILE)
    except InvalidInput:
        return text
    labels = list(classes.labels or ()) or before
    if len(labels) != outputs:  # the base's, of another head
        labels = [f"LABEL_{i}" for i in range(outputs)] if outputs and before else before
    timm = [one for one in (after, after.get("pretrained_cfg")) if isinstance(one, dict) and "num_classes" in one]
    # transformers, which is not told, takes two.
    unsaid = "model_type" in after and (len(before) or after.get("num_labels", 2)) != outputs != 0
    for one in timm if outputs else ():
        one["num_classes"] = outputs
        if labels != before:
            one.pop("label_names", None), one.pop("label_descriptions", None)
        if classes.labels:
            one["label_names"] = labels
    if labels != before:
        after = class_names.without(after, _WRITTEN)
        timm = [one for one in (after, after.get("pretrained_cfg")) if isinstance(one, dict) and "num_classes" in one]
    if not timm and (labels != before or unsaid):
        labels = labels or [f"LABEL_{i}" for i in range(outputs)]
        after |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        after |= {"num_labels": len(labels)} if "num_labels" in after else {}
    if dtype is not None:
        _say_dtype(after, dtype)
    return text if after == content else (json.dumps(after, indent=2) + "\n").encode()


def _say_dtype(config: dict[str, Any], dtype: str) -> None:
    """In a configuration of transformers and those in it, where one is said."""
    for key, value in config.items():
        if isinstance(value, dict):
            _say_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and isinstance(value, str) and "float" in value:
            config[key] = dtype


def _config(files: Sequence[Path]) -> dict[str, Any]:
    return read_beside(files[0].parent / FILE) if files else {}


def _whose(where: str) -> str:
    """Who says labels, in a note about a checkpoint."""
    return f"its {where}" if where == FILE else where


def _is_fake(label: str) -> bool:
    """Whether a label's words say fake, or that it is not real."""
    words = [word.lower() for word in _WORD.findall(label)]
    if any(map(NOT_WORD.fullmatch, words)):
        return any(map(REAL_WORD.fullmatch, words))
    return any(map(FAKE_WORD.fullmatch, words))


def _plain(label: str) -> str:
    """Without what people write in different ways."""
    return re.sub(r"[\W_]+", "", label.casefold())


def _outputs(view: View, names: Sequence[str]) -> int:
    return next((view.specs[name].shape[0] for name in names if view.specs[name].shape), 0)


def _rows(tensor: LazyTensor, order: list[int]) -> LazyTensor:
    """A head's tensor with its rows in another order."""
    return LazyTensor.computed(tensor.spec, lambda: tensor.read()[order])
