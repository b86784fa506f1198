"""Running means and variances of an output that are not the merge's, on their way into its files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from r2m.checkpoints.reader import open_checkpoint
from r2m_kernels.errors import DoesNotFit, printable, quoted
from r2m_kernels.streaming import PartialSink, TensorSpec


def read_statistics(path: str | Path) -> dict[str, Tensor]:
    """Tensors by the output's names.

    Raises:
        InvalidInput: no checkpoint.
        OSError: it cannot be read; ``filename`` is set.
    """
    source = open_checkpoint(path, f"statistics ({printable(str(path))})")
    return {name: source.read(name) for name in source.specs}


def digest(path: str | Path) -> str:
    """SHA-256 of their file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class NewStatistics:
    """A sink that passes everything on to another one, some tensors with other values.

    Args:
        sink: the other one.
        values: by tensor.
    """

    def __init__(self, sink: PartialSink, values: Mapping[str, Tensor]) -> None:
        self._sink, self._values = sink, values

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """As the other one's.

        Raises:
            DoesNotFit: a value for no tensor of the output, or of another shape.
        """
        for name, value in self._values.items():
            if name not in specs or specs[name].shape != tuple(value.shape):
                got = f"{list(specs[name].shape)}" if name in specs else "no such tensor"
                raise DoesNotFit(f"statistics: {quoted(name)}: expected {list(value.shape)} in the output, got {got}")
        self._sink.begin(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        """As the other one's."""
        value = self._values.get(name)
        self._sink.write(name, tensor if value is None else value.to(tensor))

    def write_elements(self, name: str, start: int, elements: Tensor) -> None:
        """As the other one's."""
        value = self._values.get(name)
        new = elements if value is None else value.reshape(-1)[start : start + len(elements)].to(elements)
        self._sink.write_elements(name, start, new)
