"""What an import may load, and what may import what; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["triton", "matplotlib", "sklearn", "skimage", "transformers", "safetensors", "rich", "click", "r2m"]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statements",
    [
        "from r2m_kernels import merge; import r2m_kernels.merging; assert callable(merge)",
        "import r2m_kernels.merging; from r2m_kernels import merge; assert merge is r2m_kernels.merging.merge",
    ],
)
def test_either_order_works_and_nothing_heavy_is_loaded(statements):
    report = f"{statements}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(report) == "[]"


def test_importing_asks_no_device_and_starts_no_thread():
    code = (
        "import torch, threading; torch.cuda.is_available = torch.cuda.device_count = None; "
        "import r2m_kernels; print(threading.active_count(), torch.cuda.is_initialized())"
    )
    assert run(code) == "1 False"
