"""Truncations of single experts beside an output, in ``OUT.factors``: what a merge with one expert more takes from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from r2m.ownership import is_unfinished
from r2m.places import FileSystemWarning, new_file, opened
from r2m.workplace import resolved
from r2m_kernels.errors import BadFile, printable
from r2m_kernels.streaming import Factors

SUFFIX = ".factors"
# Of the expert and what decides its truncations, and of the tensor.
_NAME = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.safetensors")
_SIDES, _TURNED = ("left", "right", "gap"), ".T"  # the latter where columns, not rows, are contiguous


def directory_of(out: str | Path) -> Path:
    """Where truncations are kept for an output."""
    target = resolved(out)
    return target.with_name(f"{target.name}{SUFFIX}")


def is_there(out: str | Path) -> bool:
    """Whether there is something that a merge into ``out`` may take from, and goes on keeping."""
    directory = directory_of(out)
    return directory.is_dir() and not directory.is_symlink()


class FactorFiles:
    """A :class:`r2m_kernels.streaming.KeptFactors`: a safetensors file for each tensor of each expert.

    A file's name says of what it is. One that was cut off or changed is told and made again, and all may be removed at
    any time.

    Args:
        directory: where; it is made when the first one comes.
        keys: expert → all that decides its truncations, as plain values.

    Raises:
        BadFile: something else is there.
    """

    def __init__(self, directory: Path, keys: Mapping[str, Any]) -> None:
        if os.path.lexists(directory) and (directory.is_symlink() or not directory.is_dir()):
            raise BadFile(f"{directory}: expected a directory of truncations that merges keep, or nothing")
        self._directory = directory
        self._keys = {name: _digest(key) for name, key in keys.items()}
        self._taken: set[tuple[str, str]] = set()  # adding to them takes no lock
        self._made: set[tuple[str, str]] = set()

    def get(self, tensor: str, expert: str) -> Factors | None:
        """See the protocol."""
        path = self._path(tensor, expert)
        if not path.is_file() or path.is_symlink():
            return None
        try:
            with opened(path, path.name) as file:
                content = file.read()
            found = _factors(content)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            told = printable(str(error))[:100]
            text = f"{printable(str(path))}: is not as a merge kept it ({told}); it is made again"
            warnings.warn(text, FileSystemWarning, stacklevel=2)
            return None
        self._taken.add((tensor, expert))
        return found

    def put(self, tensor: str, expert: str, factors: Factors) -> None:
        """See the protocol.

        Raises:
            OSError: it cannot be written; ``filename`` is set.
        """
        self._directory.mkdir(exist_ok=True)
        new_file(self._path(tensor, expert), _content(factors))
        self._made.add((tensor, expert))

    @property
    def counts(self) -> tuple[int, int]:
        """How many were taken by now, and how many made and kept."""
        return len(self._taken - self._made), len(self._made)

    def missing(self, tensors: Iterable[str]) -> int:
        """Of how many nothing is kept, of all experts' in these tensors."""
        return sum(not self._path(tensor, expert).is_file() for tensor in tensors for expert in self._keys)

    def sweep(self) -> None:
        """Remove what is of no expert here, and what killed runs left; others' files stay."""
        for entry in list(os.scandir(self._directory)) if self._directory.is_dir() else ():
            known = _NAME.fullmatch(entry.name)
            with suppress(OSError):
                if known and known[1] not in self._keys.values() and entry.is_file(follow_symlinks=False):
                    os.unlink(entry)
                elif is_unfinished(entry):
                    shutil.rmtree(entry)

    def _path(self, tensor: str, expert: str) -> Path:
        return self._directory / f"{self._keys[expert]}-{_digest(tensor)}.safetensors"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _content(factors: Factors) -> bytes:
    tensors = {"left": factors.left[0], "right": factors.right[0], "gap": factors.gap}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        assert tensor is not None, "a single expert's factors have a gap"
        turned = tensor.ndim == 2 and tensor.stride(0) == 1 and tensor.stride(1) >= len(tensor)
        stored[name + _TURNED * turned] = (tensor.mT if turned else tensor).contiguous()
    about = {"method": factors.method, "ordered": factors.ordered, "basis": factors.basis, "crc": _sum(stored)}
    return save(stored, {"about": json.dumps(about)})


def _factors(content: bytes) -> Factors:
    """What :func:`_content` has made it of; any of several errors where it is not that."""
    stored = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = json.loads(header["__metadata__"]["about"])
    if about["crc"] != _sum(stored):
        raise ValueError("another sum of its bytes than it says")
    left, right, gap = (stored[name + _TURNED].mT if name + _TURNED in stored else stored[name] for name in _SIDES)
    return Factors(
        left.unsqueeze(0), right.unsqueeze(0), about["ordered"] is True, about["basis"], gap, str(about["method"])
    )


def _sum(stored: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes."""
    total = 0
    for name in sorted(stored):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(stored[name].contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total
