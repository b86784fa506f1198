"""Is this version right and fast on this GPU? One JSON file for each part, and at the end what was predicted beside it.

    python -m bench.gpu [--seconds 570] [--out DIR] [--only PART] [--rehearsal]

In this order: smoke (what the GPU gives, every operator on small cases; two minutes that are worth having alone),
operators beside their roofs, those of a default merge first, merges as people run them, where their time goes and what
profilers and sanitizers say, the default beside rivals, tests, tuner. The last of it is a table of predicted beside
measured times.

Files go to ``--out``, by default ``$OUT`` or ``bench/results``. Every part is a process of its own, so that neither a
crash nor a lost GPU takes the next one along, has a share of the time, and leaves its file however it ends. The exit
code is 0 if all parts ran and passed, 1 if not, 3 where there is no GPU.

``--rehearsal`` walks through all of it on tiny cases and CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``):
it shows that the programs run, takes no times, and writes to a temporary directory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

try:
    import torch
except ImportError:
    print("bench.gpu: this Python has no torch; choose one that has, as in make gpu PYTHON=…", file=sys.stderr)
    raise SystemExit(3) from None

from bench.gpu import summary
from bench.gpu.record import Record, Session
from bench.machine import RESULTS, ROOT, write_json
from r2m_kernels._triton import launch

# Part → module with `run(session, record) -> bool`, and the share of the time after which it ends, counted from the
# start. What one part does not need is the next one's.
PARTS = {
    "smoke": ("bench.gpu.smoke", 0.20),
    "operators": ("bench.gpu.operators", 0.34),
    "usual": ("bench.gpu.usual", 0.58),
    "tools": ("bench.gpu.tools", 0.72),
    "merges": ("bench.gpu.merges", 0.82),
    "tests": ("bench.gpu.tests", 0.96),
    "tuner": ("bench.tune", 1.0),
}
NO_GPU = 3
GRACE = 12.0  # seconds between a part's deadline, which it keeps itself, and its end by force


def one_part(part: str, session: Session) -> bool:
    """In this process; whatever is raised ends up in the part's file."""
    record = Record(session, part)
    print(f"\n== {part}: {session.left():.0f} s at most", flush=True)
    if session.rehearsal:
        sys.path.append(str(ROOT / "tests" / "kernels"))
        importlib.import_module("interpreter").lose_no_time()
    try:
        return importlib.import_module(PARTS[part][0]).run(session, record)
    except Exception as failure:
        record.content["error"] = "".join(traceback.format_exception(failure)).strip()[-3000:]
        record.close(False, finished=False)
        print(f"FAILED: {part}: {record.content['error']}", flush=True)
        return False


def all_parts(out: Path, seconds: float, rehearsal: bool) -> dict[str, str]:
    """Part → "passed", or what is wrong with it."""
    start, verdicts = time.monotonic(), {}
    for part, (_, share) in PARTS.items():
        path = out / f"gpu_{part}.json"
        path.unlink(missing_ok=True)  # an older run's
        deadline = start + share * seconds - GRACE
        left = deadline - time.monotonic()
        if left < 15:
            write_json(path, {"part": part, "finished": False, "passed": False, "error": "no time was left for it"})
            verdicts[part] = "not run: no time was left"
            continue
        command = [sys.executable, "-m", "bench.gpu", "--only", part, "--until", str(deadline), "--out", str(out)]
        try:
            code = subprocess.run(
                command + ["--rehearsal"] * rehearsal, cwd=ROOT, check=False, timeout=left + GRACE
            ).returncode
            problem = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            code, problem = None, f"was ended by force after {left + GRACE:.0f} s"
        content = _content(path)
        if code == 0 and content.get("passed"):
            verdicts[part] = "passed"
            continue
        verdicts[part] = "failed" if content.get("finished") else f"not finished: {content.get('left_out') or problem}"
        if not content.get("finished") and "error" not in content and not content.get("left_out"):
            write_json(path, {"part": part, **content, "finished": False, "passed": False, "error": problem})
    return verdicts


def _content(path: Path) -> dict[str, object]:
    try:
        content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="for everything, or for the one part; 570, a rehearsal 1800")
    parser.add_argument("--out", type=Path, help="default: $OUT, or bench/results")
    parser.add_argument("--only", choices=PARTS, help="run one part, in this process")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # the same as a moment of time.monotonic()
    parser.add_argument("--rehearsal", action="store_true", help="tiny cases in Triton's interpreter, no times")
    options = parser.parse_args()
    # Nothing is timed there, and machines without a GPU are slow in different degrees.
    seconds = options.seconds or (1800.0 if options.rehearsal else 570.0)
    if options.rehearsal != launch.INTERPRETED:
        verb = "needs" if options.rehearsal else "cannot run with"
        print(f"bench.gpu{' --rehearsal' * options.rehearsal} {verb} TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if not options.rehearsal and not torch.cuda.is_available():
        print("bench.gpu: no GPU here that torch can use, so nothing was run and nothing was written.", file=sys.stderr)
        return NO_GPU
    with tempfile.TemporaryDirectory(prefix="r2m-rehearsal-") as temporary:
        default = Path(temporary) if options.rehearsal else Path(os.environ.get("OUT") or RESULTS)
        out = (options.out or default).resolve()
        if options.only:
            session = Session(out, options.until or time.monotonic() + seconds, options.rehearsal)
            return 0 if one_part(options.only, session) else 1
        verdicts = all_parts(out, seconds, options.rehearsal)
        summary.show(out)
        files = sorted(out.glob("*.json"))
        print(f"\n{len(files)} files in {out}" + ", which is temporary" * options.rehearsal)
        for part, verdict in verdicts.items():
            print(f"  {part:10} {verdict}")
    return 0 if all(verdict == "passed" for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
