"""docs/tutorial.md, run as a reader would: its files written, its commands given, in order, in an empty directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = []
    for kind, content in re.findall(r"```(console|python \S+)\n(.*?)```", TUTORIAL.read_text(), re.DOTALL):
        if kind != "console":
            (tmp_path / kind.split()[1]).write_text(content)
            continue
        for line in content.splitlines():
            assert line.startswith("$ ")
            run = subprocess.run(
                line[2:], shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert run.returncode == 0, (line, run.stdout, run.stderr)
            commands.append(line[2:].split()[:2])
    assert len(commands) >= 10
    # What it ends with is all there, and belongs together.
    evaluation = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    models = evaluation["models"]
    assert models.keys() == {"merged", "average", "ties", "half", "fs", "fr", "efs"}
    assert models["merged"]["datasets"].keys() == {"EFS", "FR", "FS"}
    # The numbers mean something: specialists know their own family, far from chance over 200 real and 200 forged ones.
    assert all(models[name]["datasets"][name.upper()]["auc"] > 0.65 for name in ("fs", "fr", "efs"))
    assert (tmp_path / "merged.report" / "sweep.png").stat().st_size > 1000
    front = yaml.safe_load((tmp_path / "merged" / "README.md").read_text().split("\n---\n")[0].removeprefix("---"))
    names = [one["dataset"]["name"] for one in front["model-index"][0]["results"]]
    assert names == ["EFS", "FR", "FS"]
    experts = json.loads((tmp_path / "merged" / "r2m_report.json").read_text())["experts"]
    assert experts == ["fs", "fr", "efs"]
