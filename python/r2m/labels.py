"""What the outputs of a classifier stand for, and the heads of experts brought into one order.

Two detectors may count the same classes the other way round: the mean of their heads is then a head of nothing. What
says so is ``id2label`` of a ``config.json`` beside the checkpoint, or whoever merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2m.checkpoints.view import LazyTensor, View
from r2m.places import mapping, read_beside
from r2m_kernels.errors import BadOption, DoesNotFit, InvalidInput, printable

FILE = "config.json"  # of transformers
_MOST = 2**16  # classes
_UNSAID = re.compile(r"LABEL_\d+")  # what transformers calls classes of which nobody has said anything
_FAKE = re.compile(
    r"(deep)?fakes?|spoof(ed|ing)?|forge(d|ry)|synthetic|synthesi[sz]ed|generated|manipulated|altered|tampered|edited|"
    r"artificial|ai|attack"
)


@dataclass(frozen=True)
class Classes:
    """What is known of a classifier's outputs.

    Attributes:
        labels: of each, by index; ``None``: not known.
        fake: the index of the fake's output; ``None``: not known, or there is no such thing.
    """

    labels: tuple[str, ...] | None = None
    fake: int | None = None

    @classmethod
    def called(cls, labels: Sequence[str]) -> Classes:
        """By what they are called."""
        if all(_UNSAID.fullmatch(label) for label in labels):
            return cls()
        fakes = [i for i, label in enumerate(labels) if any(map(_FAKE.fullmatch, re.findall("[a-z]+", label.lower())))]
        return cls(tuple(labels), fakes[0] if len(fakes) == 1 else None)

    @classmethod
    def beside(cls, files: Sequence[Path]) -> Classes:
        """As the configuration in the directory of a checkpoint's files says it; nothing where there is none."""
        return cls.called(_labels(read_beside(files[0].parent / FILE))) if files else cls()

    def said(self, fake: int | None) -> Classes:
        """With what somebody says of the fake's output, which counts more than any file."""
        if fake is None:
            return self
        return Classes(self.labels if self.fake in (None, fake) else None, fake)

    def order(self, other: Classes, count: int) -> list[int] | None:
        """Of the ``count`` outputs of ``other``, which comes first here, second, …; ``None``: nothing is known of it.

        Raises:
            ValueError: they are not the same classes.
        """
        if self.labels and other.labels and len(self.labels) == len(other.labels) == count:
            ours, theirs = ([_plain(label) for label in one] for one in (self.labels, other.labels))
            if sorted(ours) == sorted(theirs) and len(set(ours)) == count:
                return [theirs.index(label) for label in ours]
        if count == 2 and self.fake is not None and other.fake is not None:
            return [0, 1] if self.fake == other.fake else [1, 0]
        if self.labels and other.labels:
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
    known = {name: Classes.beside(view.files).said(said.get(name)) for name, view in experts.items()}
    counts = {name: _outputs(view, heads[name]) for name, view in experts.items()}
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
            views[name] = view.having({one: _rows(view.tensors[one], order) for one in heads[name]})
            turned[name] = order
            notes.append(
                f"{view.label}: its labels are {known[name]}, of {whose} {wanted}; its head's rows were put so"
            )
    return Agreed(views, wanted, turned, tuple(notes))


def _first(
    base: View, experts: Mapping[str, View], known: Mapping[str, Classes], counts: Mapping[str, int]
) -> tuple[Classes, str]:
    """The order of the first expert that has one, or the base's of the same classes; and whose it is."""
    first = next((name for name in experts if known[name] != Classes()), None)
    if first is None:
        return Classes(), ""
    ours = Classes.beside(base.files)
    try:
        same = ours.order(known[first], counts[first]) is not None
    except ValueError:  # a base that told other things apart
        same = False
    return (ours, base.label) if same else (known[first], experts[first].label)


def into_config(text: bytes, classes: Classes, outputs: int) -> bytes:
    """A ``config.json`` that says what the merged head's outputs are; as it was where that is right already."""
    try:
        content = mapping(text, FILE)
        before = _labels(content)
    except InvalidInput:
        return text
    labels = list(classes.labels or ()) or before
    if len(labels) != outputs:  # the base's, of another head
        labels = [f"LABEL_{i}" for i in range(outputs)] if outputs and before else before
    if labels == before:
        return text
    content |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if "num_labels" in content:
        content["num_labels"] = len(labels)
    return (json.dumps(content, indent=2) + "\n").encode()


def _labels(config: Any) -> list[str]:
    """Of a configuration, by index; none where it says none."""
    labels = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(labels, Mapping) or not 0 < len(labels) <= _MOST:
        return []
    listed = [labels.get(str(i)) for i in range(len(labels))]
    return [str(label) for label in listed] if all(isinstance(label, str) for label in listed) else []


def _plain(label: str) -> str:
    """Without what people write in different ways."""
    return re.sub(r"[\W_]+", "", label.casefold())


def _outputs(view: View, names: Sequence[str]) -> int:
    return next((view.specs[name].shape[0] for name in names if view.specs[name].shape), 0)


def _rows(tensor: LazyTensor, order: list[int]) -> LazyTensor:
    """A head's tensor with its rows in another order."""
    return LazyTensor.computed(tensor.spec, lambda: tensor.read()[order])
