"""Tests of the real kernels on a GPU; the one place that says where they run and how large the cases are.

    R2M_GPU_TESTS=cuda python -m pytest -c tests/gpu/pytest.ini --rootdir tests/gpu -p no:cacheprovider tests/gpu

``python -m bench.gpu`` does that. ``R2M_GPU_TESTS=interpreter`` (with ``TRITON_INTERPRET=1``) rehearses them on CPU
tensors with tiny shapes: it shows that the tests run, not that the kernels are right on a GPU.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

MODE = os.environ.get("R2M_GPU_TESTS", "")
# Without the variable nothing here is collected: `make test` walks over tests/, and has no GPU, other options and the
# interpreter, in which tests/kernels runs the same operators.
collect_ignore_glob = [] if MODE in ("cuda", "interpreter") else ["*"]
if MODE == "interpreter":
    sys.path.append(str(Path(__file__).parents[1] / "kernels"))
    importlib.import_module("interpreter").lose_no_time()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if MODE == "cuda" else "cpu")


@pytest.fixture(scope="session")
def tiny() -> bool:
    """Whether cases must be small enough for the interpreter."""
    return MODE != "cuda"


@pytest.fixture(scope="session")
def shapes(tiny) -> list[tuple[int, int]]:
    """Even sides, odd sides, wide: the short ones beyond 64, up to which truncation is exact."""
    return [(72, 80), (67, 71)] if tiny else [(384, 256), (257, 131), (192, 1000)]
