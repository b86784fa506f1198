"""Names shortened to what differs: the same on every table and picture of a page, and never two alike."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from r2m_kernels.errors import printable

LONGEST = 26  # letters of a name that is given no other limit
_EDGE = re.compile(r"[^0-9A-Za-z]")


def shorten(*groups: Sequence[str], limit: int = LONGEST) -> dict[str, str]:
    """What of each name tells it from the others.

    Args:
        groups: names that resemble one another, such as those of specialists; what all of a group begin or end with is
            left out, up to where a word begins or ends.
        limit: letters that a name should have at most; more where two would become one.

    Returns:
        name → its short one, printable; all different.
    """
    names = list(dict.fromkeys(itertools.chain.from_iterable(groups)))
    short = {name: printable(name) for name in names}
    for group in groups:
        cut = _without_ends(list(dict.fromkeys(group)))
        taken = {text for name, text in short.items() if name not in cut}
        if not taken & set(cut.values()):
            short |= {name: printable(text) for name, text in cut.items()}
    longest = max(map(len, short.values()), default=0)
    for width in range(limit, longest + 1):
        clipped = {name: clip(text, width) for name, text in short.items()}
        if len(set(clipped.values())) == len(clipped):
            return clipped
    return _told_apart(short)


def clip(text: str, limit: int) -> str:
    """Both ends of a text that is too long."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def _without_ends(names: Sequence[str]) -> dict[str, str]:
    if len(names) < 2:
        return {name: name for name in names}
    start = _whole_words(_common(names))
    rest = [name[start:] for name in names]
    end = _whole_words(_common([name[::-1] for name in rest]))
    cut = [name[: len(name) - end] for name in rest]
    return dict(zip(names, cut if all(cut) else rest if all(rest) else names, strict=True))


def _common(names: Sequence[str]) -> str:
    """How all of them begin."""
    letters = zip(*names, strict=False)  # up to the shortest
    return "".join(one[0] for one in itertools.takewhile(lambda one: len({*one}) == 1, letters))


def _whole_words(common: str) -> int:
    """How much of what names have in common ends where a word does."""
    return max((found.end() for found in _EDGE.finditer(common)), default=0)


def _told_apart(short: dict[str, str]) -> dict[str, str]:
    """Names that print alike, with numbers."""
    seen: set[str] = set()
    for name, text in short.items():
        candidates: Iterable[str] = (f"{text} #{number}" for number in itertools.count(2))
        short[name] = next(one for one in itertools.chain([text], candidates) if one not in seen)
        seen.add(short[name])
    return short
