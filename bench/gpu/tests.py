"""Do the tests in ``tests/gpu`` pass? They run under pytest in a process of their own, with its builtin plugins only.

python -m bench.gpu --only tests
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.record import Record, Session, table
from bench.machine import ROOT


def run(session: Session, record: Record) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        report, log = Path(temporary) / "report.xml", Path(temporary) / "log"
        options = ["-c", "tests/gpu/pytest.ini", "--rootdir", "tests/gpu", "-p", "no:cacheprovider", "-q"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", "--durations=5", "tests/gpu"]
        environment = {
            **os.environ,
            "R2M_GPU_TESTS": "interpreter" if session.rehearsal else "cuda",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        with log.open("wb") as output:
            try:
                limit = max(1.0, session.left() - 2)
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False, timeout=limit
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        text = log.read_text(encoding="utf-8", errors="replace")
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
                record.content["rows"].append(
                    {
                        "test": f"{case.get('classname')}::{case.get('name')}",
                        "outcome": "passed" if problem is None else problem.tag,
                        "detail": None if problem is None else (problem.text or problem.get("message") or "")[-1500:],
                    }
                )
    record.content |= {"exit_code": code, "output_tail": text[-6000:]}
    if code != 0:
        print(text[-5000:], flush=True)
        if code is None:
            record.content["left_out"] = f"tests were stopped after {limit:.0f} s"
    outcomes = [row["outcome"] for row in record.content["rows"]]
    names = ("passed", "failure", "error", "skipped")
    table(["tests", *names], [[len(outcomes), *[outcomes.count(name) for name in names]]])
    # No test may be passed over on a GPU; and a run that found none has shown nothing.
    whole = bool(outcomes) and (session.rehearsal or "skipped" not in outcomes)
    return record.close(code == 0 and whole, finished=code is not None)
