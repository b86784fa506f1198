"""The formats of checkpoint files: a table. Who opens, writes, names or lists checkpoints asks it.

A format is an entry here and a module of its own with ``open_file(path, what, key)``, which gives a
:class:`r2m.checkpoints.files.TensorFile`, and, unless a merge writes it directly, ``save_file(source, path, names)``.
Those are imported when they are called: this module is for commands that only talk, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2m.checkpoints.files import Checkpoint, TensorFile

HEAD_BYTES = 9  # of a file, by which its format is recognised


@dataclass(frozen=True)
class Format:
    """One of them.

    Attributes:
        name: in recipes and of ``--format``.
        title: what a file of it is.
        suffixes: of its files; ``r2m convert`` goes by them.
        single, index: names in a Hugging Face directory: of the only file, and of what tells which tensor is where.
        output: the file that a merge writes.
        is_mine: whether a file that begins so, with :data:`HEAD_BYTES`, is of this format.
        module: reads it, and writes it.
        direct: whether a merge writes it tensor by tensor, and so can go on after it was cut off. Others are written
            from that when all is merged.
        beside: a directory of the output for what else a merge writes; empty: nothing.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    single: str
    index: str
    output: str
    is_mine: Callable[[bytes], bool]
    module: str
    direct: bool = False
    beside: str = ""

    @property
    def copies(self) -> int:
        """How often a merge has its tensors on the disk in the end."""
        return 1 if self.direct else 2

    def open(self, path: Path, what: str, key: str | None = None) -> TensorFile:
        """Its tensors and where they lie.

        Args:
            path: the file.
            what: how error messages name it.
            key: what the tensors lie under, if the file has it.

        Raises:
            BadCheckpoint: damaged, hostile, or of a kind that is not supported.
            OSError: it cannot be read; ``filename`` is set.
        """
        tensors: TensorFile = self._code.open_file(path, what, key)
        return tensors

    def save(self, source: Checkpoint, path: Path, names: Sequence[str]) -> None:
        """Write a checkpoint as one file, tensors in the order of ``names``, and bring it to the disk.

        The directory is one that nobody else uses yet. Memory does not hold all of it.

        Raises:
            OSError: it cannot be written; ``filename`` is set.
        """
        self._code.save_file(source, path, names)

    @property
    def _code(self) -> Any:
        return importlib.import_module(self.module)


FORMATS = {
    one.name: one
    for one in (
        Format(
            name="safetensors",
            title="safetensors",
            suffixes=(".safetensors",),
            single="model.safetensors",
            index="model.safetensors.index.json",
            output="model.safetensors",
            # The length of a header that the format allows, and where it begins.
            is_mine=lambda head: head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 10**8,
            module="r2m.checkpoints.safetensors_file",
            direct=True,
        ),
        Format(
            name="pth",
            title="a state dict of torch.save",
            suffixes=(".pth", ".pt", ".bin", ".ckpt"),
            single="pytorch_model.bin",
            index="pytorch_model.bin.index.json",
            output="model.pth",
            # A zip archive; before torch 1.6, a pickle.
            is_mine=lambda head: head.startswith((b"PK\x03\x04", b"\x80\x02")),
            module="r2m.checkpoints.torch_file",
        ),
    )
}
SAFETENSORS = FORMATS["safetensors"]  # what a merge writes tensor by tensor
# What a merge writes, and no file is of: a checkpoint, and adapters of PEFT beside it.
ADAPTERS = replace(
    SAFETENSORS, name="adapters", title="safetensors, and each expert as a LoRA of PEFT on it", beside="adapters"
)
OUTPUT_FORMATS = FORMATS | {ADAPTERS.name: ADAPTERS}
SUFFIXES = tuple(suffix for one in FORMATS.values() for suffix in one.suffixes)
INDEXES = tuple(one.index for one in FORMATS.values())
OUTPUTS = tuple(one.output for one in FORMATS.values())


def recognised(head: bytes, name: str) -> Format:
    """The format of a file: by its first bytes or, where no format has such, by its name; else it is safetensors'.

    Args:
        head: its first :data:`HEAD_BYTES`.
        name: the file's.
    """
    by_name = (one for one in FORMATS.values() if name.endswith(one.suffixes))
    return next((one for one in FORMATS.values() if one.is_mine(head)), next(by_name, SAFETENSORS))


def of_suffix(path: Path) -> Format | None:
    """The format that a file to be written has by the ending of its name; ``None``: no format's."""
    return next((one for one in FORMATS.values() if path.suffix in one.suffixes), None)
