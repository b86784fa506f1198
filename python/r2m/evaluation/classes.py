"""Which names of folders and labels say real, and which fake: by whole words, never by a part of one.

``RealVisXL`` and ``unreal`` are generators, not reals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from r2m.evaluation.data import FAKE, REAL
from r2m.labels import FAKE_WORD, NOT_WORD, REAL_WORD

# Names of folders that say what is in them, after numbers and _NEUTRAL words are gone: 0_real, real_images. Fewer than
# words of labels: a folder called GAN or diffusion may be a group of generators.
FOLDERS: Mapping[str, int] = {
    **dict.fromkeys(("real", "reals", "nature", "original", "originals", "pristine", "genuine", "authentic"), REAL),
    **dict.fromkeys(("fake", "fakes", "ai", "synthetic", "generated", "manipulated", "forged"), FAKE),
    **dict.fromkeys(("deepfake", "deepfakes"), FAKE),
}
# Sets that name folders so hold images, each for itself: folders in them are categories, not videos.
_STILLS = re.compile(r"\d+_\w+|ai|nature")
_NEUTRAL = re.compile(r"(image|img|photo|picture|face|frame|video|sequence|sample)s?|data|class|label")
_BREAK = re.compile(r"[^a-z]+")
_NUMBERS: Mapping[Any, int] = {0: REAL, 1: FAKE, "0": REAL, "1": FAKE, "0.0": REAL, "1.0": FAKE}


def of_folder(name: str, said: Mapping[str, int]) -> int | None:
    """0 where a folder's name says real, 1 where it says fake; None where it says neither.

    Args:
        name: of the folder alone.
        said: what somebody says of names, which counts more.
    """
    if name in said:
        return said[name]
    classes = {FOLDERS.get(word) for word in _words(name)}
    return classes.pop() if len(classes) == 1 else None


def holds_stills(name: str) -> bool:
    """Whether sets that call a folder of reals or fakes so have images in it, and no videos."""
    return _STILLS.fullmatch(name.lower()) is not None


def of_label(label: object, said: Mapping[str, int]) -> int | None:
    """The same of a label in a list: a number, or a name of which the last word counts (``FF-real``, ``DFDC_Fake``)."""
    if str(label) in said:
        return said[str(label)]
    if isinstance(label, bool | int | float) or str(label) in _NUMBERS:
        return _NUMBERS.get(label)
    *before, last = _words(str(label)) or [""]
    found = REAL if REAL_WORD.fullmatch(last) else FAKE if FAKE_WORD.fullmatch(last) else None
    if found is not None and before and NOT_WORD.fullmatch(before[-1]):
        return FAKE if found == REAL else REAL
    return found


def _words(name: str) -> list[str]:
    words = [word for word in _BREAK.split(name.casefold()) if word]
    return [word for word in words if not _NEUTRAL.fullmatch(word)]
