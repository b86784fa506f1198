"""Names shortened to what differs: the same on every table and picture, and never two alike."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from r2m_kernels.errors import printable

LONGEST = 26  # letters of a name that is given no other limit
_BETWEEN = " ._-/\\:"  # words
_WORDS = re.compile(rf"[^{re.escape(_BETWEEN)}]+|[{re.escape(_BETWEEN)}]+")


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
    """Names without the words that all end or begin with; what stays has a letter, for a number alone says nothing."""
    whole = {name: name for name in names}
    if len(names) < 2:
        return whole
    # Backwards and forwards: first the ends, which paths have as a suffix, then the beginnings.
    words = [_WORDS.findall(name)[::-1] for name in names]
    for _ in range(2):
        count = _in_common(words)
        while count and not all(any(map(str.isalpha, "".join(one[count:]))) for one in words):
            count -= 1
        words = [one[count:][::-1] for one in words]
    cut = {name: "".join(one[::-1]).strip(_BETWEEN) for name, one in zip(names, words, strict=True)}
    return cut if len(set(cut.values())) == len(cut) and all(cut.values()) else whole


def _in_common(words: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    alike = (len(set(column)) == 1 for column in zip(*words, strict=False))
    return sum(itertools.takewhile(bool, alike))


def _told_apart(short: dict[str, str]) -> dict[str, str]:
    """Names that print alike, with numbers."""
    seen: set[str] = set()
    for name, text in short.items():
        candidates: Iterable[str] = (f"{text} #{number}" for number in itertools.count(2))
        short[name] = next(one for one in itertools.chain([text], candidates) if one not in seen)
        seen.add(short[name])
    return short
