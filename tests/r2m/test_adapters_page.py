"""docs/adapters.md, run as a reader would, where PEFT is: its files written, its commands given, in order."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from libraries import PYTHON, environment

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    # PyPI's torchvision holds operators for another build of torch, which PEFT's imports would miss.
    (tmp_path / "site").mkdir()
    lines = (f"torch.library.define('torchvision::{name}', '(Tensor d) -> Tensor')" for name in ("nms", "qnms"))
    (tmp_path / "site" / "sitecustomize.py").write_text("\n".join(["import torch", *lines]))
    told = {}
    for kind, content in re.findall(r"```(console|python \S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if kind != "console":
            (tmp_path / kind.split()[1]).write_text(content)
            continue
        for line in content.splitlines():
            assert line.startswith("$ ")
            program, *words = line[2:].split()
            variables = environment()
            if program == "python":
                variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), variables["PYTHONPATH"]])
            command = [str(PYTHON), *(["-m", "r2m"] if program == "r2m" else []), *words]
            run = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
            assert run.returncode == 0, (line, run.stdout, run.stderr)
            told[" ".join([program, *words[:1]])] = run.stdout
    assert "adapter LoRA of PEFT" in told["r2m inspect"]
    differences = dict(line.split() for line in told["python again.py"].splitlines())
    assert differences.keys() == {"fs", "fr", "merged"}
    assert max(map(float, differences.values())) < 1e-4  # of logits of some units: rounding
    models = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())["models"]
    assert list(models) == ["merged", "ensemble", "ensemble/fr", "ensemble/fs"]
    looks_like = models["ensemble"]["looks_like"]  # by kind of forgery
    assert looks_like
    assert all(sum(shares.values()) == pytest.approx(1) for shares in looks_like.values())
