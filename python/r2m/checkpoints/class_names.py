"""What a classifier's outputs stand for, wherever configurations and training scripts keep it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from r2m_kernels.errors import BadFile, printable

MOST = 2**16  # classes
# Keys, small and without what joins their words: labels by index, and the other way round. The first that is there
# counts; who gives a mapping under one of them may have it either way.
_BY_INDEX = (
    *("id2label", "idtolabel", "idx2label", "idxtolabel", "index2label", "indextolabel"),
    *("idx2class", "idxtoclass", "indextoclass", "labelnames", "classnames", "classes", "classlabels", "labels"),
)
_BY_LABEL = (
    *("label2id", "labeltoid", "label2idx", "labeltoidx", "labeltoindex"),
    *("classtoidx", "class2idx", "class2id", "classtoindex", "classindices"),
)
_KEYS = frozenset(_BY_INDEX + _BY_LABEL)
_LONGEST = 20  # letters of a key that is looked at
UNSAID = re.compile(r"LABEL_\d+")  # what transformers calls classes of which nobody has said anything
_INNER = "pretrained_cfg"  # of timm, which counts like what is beside it


def is_key(name: object) -> bool:
    """Whether labels are kept under a key."""
    return isinstance(name, str) and len(name) <= _LONGEST and _plain(name) in _KEYS


def entries(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Of all that a file holds, and of the mappings in it, what is under such a key."""
    kept = {name: value for name, value in content.items() if isinstance(value, list | tuple | Mapping)}
    found: dict[str, Any] = {name: value for name, value in kept.items() if is_key(name)}
    for name, value in kept.items():
        if name not in found and isinstance(name, str) and isinstance(value, Mapping):
            inner = {key: one for key, one in value.items() if isinstance(one, list | tuple | Mapping) and is_key(key)}
            found |= {name: inner} if inner else {}
    return found


def labels(config: Mapping[Any, Any], what: str) -> list[str]:
    """By index, as a configuration or a file's entries have them; none where they say none.

    Raises:
        BadFile: they say two things.
    """
    inner = config.get(_INNER)
    found = _labels([config, inner] if isinstance(inner, Mapping) else [config], what)
    if not found:  # another model's, where the configuration itself has some
        found = _labels([one for name, one in config.items() if isinstance(one, Mapping) and not is_key(name)], what)
    return found


def not_understood(config: Mapping[Any, Any]) -> str:
    """The key of labels that cannot be read; empty: no such key."""
    said = [key for key, value in config.items() if is_key(key) and isinstance(value, list | Mapping) and value]
    return next((key for key in said if not _labels([{key: config[key]}], "")), "")


def without(config: Mapping[str, Any], kept: tuple[str, ...]) -> dict[str, Any]:
    """A configuration without labels, in it and in the mappings in it, but under the keys to be kept."""
    return {
        name: without(value, kept) if isinstance(value, Mapping) and not is_key(name) else value
        for name, value in config.items()
        if name in kept or not (is_key(name) and isinstance(value, list | Mapping))
    }


def listed(said: Any) -> list[str]:
    """Labels by index, from a list or from a mapping of indices; numbers are labels, too."""
    if isinstance(said, Mapping):
        said = [said.get(str(i), said.get(i)) for i in range(len(said))] if len(said) <= MOST else []
    known = isinstance(said, list | tuple) and len(said) <= MOST and all(isinstance(one, str | int) for one in said)
    return list(map(str, said)) if known else []


def _labels(places: list[Mapping[Any, Any]], what: str) -> list[str]:
    readers: tuple[Callable[[Any], list[str]], ...] = (listed, _inverted)
    found: list[list[str]] = []
    for keys, (first, second) in ((_BY_INDEX, readers), (_BY_LABEL, readers[::-1])):
        found += [first(value) or second(value) for key in keys for value in _under(places, key)]
    said = [one for one in found if one and not all(map(UNSAID.fullmatch, one))]
    turned = next((one for one in said[1:] if one != said[0] and sorted(one) == sorted(said[0])), None)
    if turned is not None:
        both = " and as ".join(printable(", ".join(one[:8])) for one in (said[0], turned))
        raise BadFile(f"{what}: has its labels as {both}; expected one order")
    return next(iter(said or filter(None, found)), [])


def _under(places: list[Mapping[Any, Any]], key: str) -> Iterator[Any]:
    for one in places:
        yield from (value for name, value in one.items() if is_key(name) and _plain(name) == key)


def _inverted(indices: Any) -> list[str]:
    """Labels by index, from a mapping of labels to indices."""
    if not isinstance(indices, Mapping) or len(indices) > MOST:
        return []
    if sorted(map(str, indices.values())) != sorted(map(str, range(len(indices)))):
        return []
    known = all(isinstance(label, str) for label in indices)
    return sorted(indices, key=lambda label: int(indices[label])) if known else []


def _plain(key: str) -> str:
    return re.sub(r"[\W_]+", "", key.casefold())
