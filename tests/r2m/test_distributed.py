"""Several GPUs, rehearsed without one: fakes of nccl and GPUs, and Triton's kernels in their interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from r2m import distributed
from safetensors.torch import save_file

TORCHRUN = {"RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("device", "nccl", "gpus", "expected"),
    [
        ("cuda", True, 2, "nccl on cuda:1"),
        ("cuda", False, 2, "gloo"),
        ("cuda", True, 1, "gloo"),  # two processes on one
        ("cuda:0", True, 2, "gloo"),  # both on the first
        ("cpu", True, 2, "gloo"),
        (None, True, 2, "gloo"),
    ],
)
def test_objects_go_over_nccl_where_every_process_has_a_gpu(
    device: str | None, nccl: bool, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name, value in {**TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    fakes = {
        "is_nccl_available": lambda: nccl,
        "init_process_group": lambda backend, timeout: done.append(backend),
        "get_rank": lambda: 1,
        "destroy_process_group": lambda: done.append("ended"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    with distributed.processes(device) as processes:
        assert (processes.index, processes.size) == (1, 2)
        assert distributed.local_device(device) == ("cuda:1" if device == "cuda" else device)
    group = ["cuda:1", "nccl"] if expected.startswith("nccl") else ["gloo"]
    assert done == [*group, "ended"]


@pytest.mark.slow
def test_processes_touch_no_bit_of_tritons_kernels(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (72, 68), "b": (70, 72), "c": (66, 80), "bias": (72,), "norm": (30,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for place, name in enumerate(("base", "x", "y")):
        change = {key: place * 0.1 * torch.randn(one.shape, generator=generator) for key, one in base.items()}
        save_file({key: one + change[key] for key, one in base.items()}, tmp_path / f"{name}.safetensors")
    merge = ["-m", "r2m", "merge", "--base", "base.safetensors", "--expert", "x=x.safetensors"]
    merge += ["--expert", "y=y.safetensors", "--backend", "triton", "--rank", "0.1", "--quiet", "--out"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MASTER_PORT": "0"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for arguments in ([*merge, "one"], [*launcher, *merge, "two"]):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    reports = [json.loads((tmp_path / out / "r2m_report.json").read_text()) for out in ("one", "two")]
    assert all(report["backend"]["name"] == "triton" for report in reports)
    keys = ("task_gram", "tensors")
    assert [reports[0].get(key) for key in keys] == [reports[1].get(key) for key in keys]
