"""What an import may load, and what may import what; each in a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import r2m_kernels

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


def test_options_and_methods_are_known_without_torch():
    code = "import sys, r2m_kernels.config, r2m_kernels.checks, r2m_kernels.errors; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_every_public_name_is_there_and_no_other():
    code = (
        "import r2m_kernels; print([n for n in r2m_kernels.__all__ if not hasattr(r2m_kernels, n)], dir(r2m_kernels))"
    )
    missing, _, listed = run(code).partition("] ")
    assert missing == "["
    assert set(r2m_kernels.__all__) <= set(ast.literal_eval(listed))
    with pytest.raises(AttributeError, match="module 'r2m_kernels' has no attribute 'mergers'"):
        _ = r2m_kernels.mergers


def test_inside_the_package_imports_are_relative():
    absolute = [
        f"{path.name}:{node.lineno}"
        for path in Path(r2m_kernels.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "r2m_kernels")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "r2m_kernels" for alias in node.names))
    ]
    assert absolute == []
