"""The children that tests fork are processes of their own, and what they were promised to be."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Child

Start = Callable[..., Child]

REPORT = """
import json, os, resource, signal, sys
found = {
    "imported": sorted({"torch", "triton", "huggingface_hub", "r2m.merge"} & set(sys.modules)),
    "arguments": sys.argv[1:],
    "directory": os.getcwd(),
    "variable": os.environ.get("R2M_OF_A_TEST"),
    "limit": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "threads": len(os.listdir("/proc/self/task")),
    "pid": os.getpid(),
}
print(json.dumps(found))
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


def test_a_child_has_imports_and_all_that_it_was_given(start: Start, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"environment": {"R2M_OF_A_TEST": "x"}, "limits": {resource.RLIMIT_FSIZE: 5000}}
    with start("a", "--b", script=REPORT, **given) as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (3, "to stderr\n")
    assert json.loads(out) == {
        "imported": ["r2m.merge", "torch"],
        "arguments": ["a", "--b"],
        "directory": str(tmp_path),
        "variable": "x",
        "limit": 5000,
        "interrupt": True,
        "threads": 1,
        "pid": child.pid,
    }
    assert child.pid != os.getpid()
    # Nothing of that is the next one's.
    out, _ = start(script=REPORT).communicate(timeout=60)
    assert json.loads(out)["variable"] is None
    assert json.loads(out)["limit"] == resource.RLIM_INFINITY


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_of_signals(start: Start, number: int) -> None:
    with start(script="print('here', flush=True); import time; time.sleep(100)") as child:
        assert child.stdout.readline() == "here\n"
        assert child.poll() is None
        child.send_signal(number)
        assert child.wait(60) == -number
