"""No residual or task vector is ever held whole; checked on every tensor that torch allocates."""

from __future__ import annotations

import pytest
import torch
from cases import ROWS, TRUNCATED
from torch.utils._python_dispatch import TorchDispatchMode

from r2m_kernels import analyze
from r2m_kernels._stream.plan import truncation_rank


class LargestStorage(TorchDispatchMode):
    """Records the largest storage made by any torch operation of this thread, in bytes."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    "options",
    [{}, {"center": True, "residual": "own"}, {"rank": 1.0}, {"svd": "exact"}, {"row_power": 3, "eta_mode": "sum"}],
    ids=["truncated", "own", "full rank", "exact", "rows"],
)
def test_nothing_as_large_as_a_residual_is_stored(options):
    m, n = 4096, 512
    base = {"w": torch.randn(m, n)}
    experts = [{"w": base["w"] + 0.01 * torch.randn(m, n)} for _ in range(2)]
    stored = [base["w"], *(expert["w"] for expert in experts)]
    one_residual = m * n * 4
    with LargestStorage(stored) as seen:
        analysis = analyze(base, experts, TRUNCATED, **options)
    assert 0 < seen.largest < one_residual
    with LargestStorage(stored) as seen:
        analysis.merge()
    assert seen.largest == one_residual  # the merged tensor itself


@pytest.mark.parametrize(
    "shape", [(8, 400_000), pytest.param((60, 60_000), marks=pytest.mark.slow), (60_000, 60), (2, 1_000_000)], ids=str
)
def test_nor_of_short_and_wide_tensors(shape):
    base = {"w": torch.randn(shape)}
    experts = [{"w": base["w"] + 0.01 * torch.randn(shape)} for _ in range(3)]
    with LargestStorage([base["w"], *(expert["w"] for expert in experts)]) as seen:
        analyze(base, experts, TRUNCATED)
    # Pieces of 2¹⁸ elements, or the factors, for three experts and in float64.
    assert seen.largest <= 3 * 8 * max(2**18, max(shape) * truncation_rank(0.1, shape))


def test_the_recorder_sees_a_stored_residual():
    base, expert = torch.randn(300, 300), torch.randn(300, 300)
    with LargestStorage([base, expert]) as seen:
        expert - base
    assert seen.largest == 300 * 300 * 4


def test_nor_by_a_merge_of_whole_residuals():
    base = {"w": torch.randn(8192, 512)}
    experts = [{"w": base["w"] + 0.01 * torch.randn(8192, 512)} for _ in range(2)]
    with LargestStorage([base["w"], *(expert["w"] for expert in experts)]) as seen:
        analysis = analyze(base, experts, ROWS)
    assert 0 < seen.largest < 8192 * 512 * 4
    with LargestStorage([base["w"], *(expert["w"] for expert in experts)]) as seen:
        analysis.merge()
    assert seen.largest == 8192 * 512 * 4  # the merged tensor itself
