"""Temperature and bias of a calibration, folded into the classifier on its way into the output's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from r2m.log_odds import Calibration
from r2m_kernels.errors import DoesNotFit, NotFinite, printable, quoted
from r2m_kernels.heads import classifier
from r2m_kernels.streaming import PartialSink, TensorSpec


class CalibratedHead:
    """A sink that passes everything on to another one, the classifier as a calibration has it.

    Its weights are divided by T. Of two outputs z is the difference, so that the bias of each gets half of b. What is
    computed is in float64, and rounded once.

    Args:
        sink: the other one.
        calibration: what is folded in.
        names: of the classifier's tensors; none: they are found.
    """

    def __init__(self, sink: PartialSink, calibration: Calibration, names: Sequence[str] = ()) -> None:
        self._sink, self._calibration, self._names = sink, calibration, names
        self._added: dict[str, Tensor | None] = {}  # to what is divided, by tensor

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """As the other one's.

        Raises:
            DoesNotFit: no linear classifier of one or two outputs, or a bias is needed that it does not have.
        """
        names = list(self._names) or classifier(specs)
        shapes = {name: specs[name].shape for name in names if name in specs}
        matrices = [shape for shape in shapes.values() if len(shape) > 1]
        vectors = [name for name, shape in shapes.items() if len(shape) == 1]
        outputs = matrices[0][0] if len(matrices) == 1 else 0
        fits = outputs in (1, 2) and all(shapes[name] == (outputs,) for name in vectors) and len(vectors) <= 1
        if not fits or (not vectors and self._calibration.bias != 0):
            listed = ", ".join(f"{printable(name)} {list(shape)}" for name, shape in shapes.items()) or "none"
            raise DoesNotFit(
                "temperature, head_bias: expected a classifier of one matrix with 1 or 2 outputs and its bias, got "
                f"{listed}"
            )
        bias = self._calibration.bias
        added = torch.tensor([bias] if outputs == 1 else [-bias / 2, bias / 2], dtype=torch.float64)
        self._added = {name: added if name in vectors else None for name in shapes}
        self._sink.begin(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        """As the other one's."""
        self._sink.write(name, self._folded(name, 0, tensor.reshape(-1)).reshape(tensor.shape))

    def write_elements(self, name: str, start: int, elements: Tensor) -> None:
        """As the other one's."""
        self._sink.write_elements(name, start, self._folded(name, start, elements))

    def _folded(self, name: str, start: int, elements: Tensor) -> Tensor:
        if name not in self._added:
            return elements
        divided, added = elements.double() / self._calibration.temperature, self._added[name]
        if added is not None:
            divided = divided + added[start : start + len(elements)].to(divided.device)
        folded = divided.to(elements.dtype)
        if not bool(folded.isfinite().all()):
            raise NotFinite(
                f"temperature, head_bias: tensor {quoted(name)} exceeds the range of {folded.dtype} with them"
            )
        return folded
