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
    assert evaluation["models"].keys() == {"r2m", "fs", "efs", "half", "whole"}
    assert evaluation["models"]["r2m"]["datasets"].keys() == {"in-distribution", "unseen"}
    # The merge is the sweep's point of the same strength: the same weights give the same scores.
    assert evaluation["models"]["r2m"]["datasets"] == evaluation["models"]["whole"]["datasets"]
    assert (tmp_path / "merged.report" / "sweep.png").stat().st_size > 1000
    front = yaml.safe_load((tmp_path / "merged" / "README.md").read_text().split("\n---\n")[0].removeprefix("---"))
    names = [one["dataset"]["name"] for one in front["model-index"][0]["results"]]
    assert names == ["in-distribution", "unseen"]
    experts = json.loads((tmp_path / "merged" / "r2m_report.json").read_text())["experts"]
    assert experts == ["fs", "fr", "efs"]
