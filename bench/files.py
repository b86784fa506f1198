"""Whole commands on the same files: time, CPU time and peak memory of each, interleaved, every one its own process.

    python -m bench.files DIRECTORY [--blocks 4] [--repeats 3] [--peers .venv-peers] [--only NAME…]

Each runs once before it is timed, with modules compiled and files in memory, as where it was used before.
Prints JSON, and leaves what was merged in DIRECTORY for ``bench/run.py`` to compare. Imports nothing heavy: on Linux a
child's peak memory starts with what its parent had when it was made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXPERTS = 3
TENTH = "r2m --rank 0.1 --row-power 0 --whole-up-to 0"


def commands(directory: Path, peers: Path | None, tsvm: bool = False) -> dict[str, list[str]]:
    """Name → command, which writes ``directory / name``."""
    base, experts = directory / "base.safetensors", [directory / f"expert{i}.safetensors" for i in range(EXPERTS)]
    files = [str(path) for path in (base, *experts)]
    merge = [sys.executable, "-m", "r2m", "merge", "--base", str(base), "--overwrite"]
    # By default inputs stay in memory where they fit, which is more than the others take.
    merge += ["--memory-budget", "512MiB"]
    merge += [word for index, path in enumerate(experts) for word in ("--expert", f"e{index}={path}")]

    def to(name: str) -> str:
        return str(directory / name)

    fusion = [str(peers / "bin/python"), "-m", "bench.peers"] if peers else []
    if tsvm:  # one SVD a task vector and two a tensor: minutes on four blocks
        return {"fusion-bench TSV-M, one block": [*fusion, "tsvm", *files, to("tsvm.safetensors")]} if peers else {}
    script = [sys.executable, "-m", "bench.rivals"]
    by_name = {
        "r2m": [*merge, "--out", to("r2m")],
        TENTH: [*merge, *TENTH.split()[1:], "--out", to("r2m_tenth")],
        "r2m --method weight_average": [*merge, "--method", "weight_average", "--out", to("r2m_average")],
        "script: load, average, save": [*script, "average", *files, to("script_average.safetensors")],
        "script: svd_lowrank": [*script, "svd_lowrank", *files, to("script_lowrank.safetensors")],
    }
    if peers:
        for method, weight in (("linear", 1.0), ("task_arithmetic", 0.3)):
            recipe: dict[str, Any] = {
                "merge_method": method,
                "models": [{"model": str(path), "parameters": {"weight": weight}} for path in experts],
                "parameters": {"normalize": method == "linear"},
                "dtype": "float32",
            }
            if method != "linear":
                recipe["base_model"] = str(base)
            path = directory / f"{method}.yaml"
            path.write_text(json.dumps(recipe))  # JSON is YAML
            command = [str(peers / "bin/mergekit-pytorch"), str(path), to(f"mergekit_{method}"), "--quiet"]
            by_name[f"mergekit {method}"] = command
        by_name["fusion-bench simple_average"] = [*fusion, "simple_average", *files, to("fusion_average.safetensors")]
    return by_name


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak bytes of one process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # it is gone, and Popen did not see that
    if status != 0:
        sys.exit(f"{' '.join(command)}: status {process.returncode}\n{log.read_text(errors='replace')[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the commands, by name")
    options = parser.parse_args()
    peers = options.peers if options.peers and (options.peers / "bin/mergekit-pytorch").exists() else None
    write = "from pathlib import Path; from bench.cases import write_checkpoints"
    measured: dict[str, list[dict[str, float]]] = {}
    for folder, blocks, repeats in (("", options.blocks, options.repeats), ("one_block", 1, 1)):
        directory = options.directory / folder
        directory.mkdir(exist_ok=True)
        by_name = commands(directory, peers, tsvm=bool(folder))
        by_name = {name: command for name, command in by_name.items() if name in (options.only or by_name)}
        if by_name:
            code = f"{write}; write_checkpoints(Path({str(directory)!r}), {blocks}, {EXPERTS})"
            subprocess.run([sys.executable, "-c", code], check=True)
        for repeat in range(1 + repeats):
            for name, command in by_name.items():
                shutil.rmtree(directory / name.replace(" ", "_"), ignore_errors=True)  # mergekit's, of the last run
                found = timed(command, directory / "log")
                if repeat:
                    measured.setdefault(name, []).append(found)
    print(json.dumps({"blocks": options.blocks, "experts": EXPERTS, "runs": measured, "peers": peers is not None}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
