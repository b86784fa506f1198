"""What an import may load, and what may import what; each in a process of its own."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

import r2m_kernels

HEAVY = ["triton", "matplotlib", "sklearn", "skimage", "transformers", "safetensors", "rich", "click", "r2m"]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ORDERS = [
    "from r2m_kernels import merge; import r2m_kernels.merging; assert callable(merge)",
    "import r2m_kernels.merging; from r2m_kernels import merge; assert merge is r2m_kernels.merging.merge",
]
# A process that imports torch takes seconds: each tells all that is asked.
TOLD = """
import json, sys, threading, torch
torch.cuda.is_available = torch.cuda.device_count = None  # nobody asks for a device
{statements}
import r2m_kernels
print(json.dumps({{
    "loaded": list(sys.modules),
    "threads": threading.active_count(),
    "initialized": torch.cuda.is_initialized(),
    "missing": [name for name in r2m_kernels.__all__ if not hasattr(r2m_kernels, name)],
    "listed": dir(r2m_kernels),
}}))
"""


@pytest.mark.parametrize("statements", ORDERS)
def test_either_order_works_loads_nothing_heavy_asks_no_device_and_starts_no_thread(statements):
    told = json.loads(run(TOLD.format(statements=statements)))
    assert not {*HEAVY} & {*told["loaded"]}
    assert (told["threads"], told["initialized"]) == (1, False)
    assert told["missing"] == []
    assert {*r2m_kernels.__all__} <= {*told["listed"]}


def test_a_name_that_is_not_there_is_told():
    with pytest.raises(AttributeError, match="module 'r2m_kernels' has no attribute 'mergers'"):
        _ = r2m_kernels.mergers


def test_options_and_methods_are_known_without_torch():
    code = "import sys, r2m_kernels.config, r2m_kernels.checks, r2m_kernels.errors; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_inside_the_package_imports_are_relative():
    absolute = [
        f"{path.name}:{node.lineno}"
        for path in Path(r2m_kernels.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "r2m_kernels")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "r2m_kernels" for alias in node.names))
    ]
    assert absolute == []


COPIES = """
import builtins, importlib.util, json, sys
import torch
from pathlib import Path
for name in [name for name in sys.modules if name.split(".")[0] in ("r2m", "r2m_kernels")]:
    del sys.modules[name]
imported = builtins.__import__
def refusing(name, where=None, *rest):
    importer = str((where or {}).get("__name__"))
    if name.split(".")[0] in ("numpy", "r2m_kernels") and importer.startswith(("first", "second")):
        raise ImportError(f"{importer} imports {name}")
    return imported(name, where, *rest)
builtins.__import__ = refusing
def no_numpy(*_, **__):
    raise RuntimeError("Numpy is not available")
torch.Tensor.numpy = no_numpy
copies = []
for place in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location(Path(place).name, f"{place}/__init__.py")
    copies.append(sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec)))
    spec.loader.exec_module(copies[-1])
base = {"w": torch.zeros(30, 40, dtype=torch.bfloat16), "v": torch.zeros(300)}
experts = [{name: tensor + one for name, tensor in base.items()} for one in (1, 2)]
for copy in copies:
    merged = copy.merge(base, experts, rank=0.5, memory_budget=1)  # so little that factors go to the disk
    assert torch.allclose(merged["v"], torch.full((300,), 1.5)), merged
    assert copy.analyze(base, experts).report()["experts"]
    assert copy.ops.task_gram([base["v"]], [[one["v"]] for one in experts]).tolist() == [[[300, 600], [600, 1200]]]
registered = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names() if name.endswith("::task_gram")}
places = [copy.Analysis.__module__ for copy in copies]
print(json.dumps([places, "r2m_kernels" in sys.modules, sorted(registered - {"r2m"})]))
"""


def test_copies_under_other_names_work_side_by_side_without_numpy(tmp_path):
    copies = [tmp_path / "first", tmp_path / "second"]
    for copy in copies:
        shutil.copytree(Path(r2m_kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with forked.start([str(copy) for copy in copies], COPIES) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert json.loads(out) == [["first.merging", "second.merging"], False, ["first", "second"]]
