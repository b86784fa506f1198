"""docs/backends.md says what runs, and the tracer tells kernels, products, PyTorch and eigenproblems apart."""

from __future__ import annotations

import pytest
import torch

from bench import trace_backends
from bench.trace_backends import OUTSIDE, Ran, Tracer, one_more
from r2m_kernels import MergeConfig, _native


@pytest.mark.slow
def test_the_page_says_what_runs():
    assert trace_backends.PAGE.read_text() == trace_backends.page(), "run python -m bench.trace_backends"


def test_a_tracer_tells_apart_what_runs():
    matrix, number = torch.ones(2, 40, 40), torch.ones(3)

    def work():
        matrix @ matrix
        matrix.mT.add(1)
        number + number  # about tensors, and no work on them
        torch.linalg.eigh(matrix)

    tracer = Tracer()
    with tracer:
        tracer.operator("named", lambda: (work(), tracer.kernel(work)()))()
        matrix.mul(2)
    assert tracer.trace.ran == {OUTSIDE: Ran(others=1), "named": Ran(1, 1, 1, 2)}
    kinds = [Ran(1, 0, 3).kind, Ran(1, 1).kind, Ran(0, 1, 3).kind, Ran(0, 0, 3, 4).kind]
    assert kinds == ["kernels", "kernels and products", "products", "PyTorch"]


def test_work_that_grows_with_a_group_is_seen(monkeypatch):
    def zeros(bases, experts, coefficients, left, right, scale, outs):
        return torch.stack([out.zero_().max() for out in outs])

    config = MergeConfig.weight_average()
    assert trace_backends.trace(config, "native", 2).of("PyTorch") == []
    monkeypatch.setattr(_native, "combine", zeros)
    before, after = (trace_backends.trace(config, "native", size) for size in (2, 3))
    assert before.of("PyTorch") == ["combine"]
    assert one_more(before, after) == (0, 2, 0)
