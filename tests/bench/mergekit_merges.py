"""mergekit's own merges of one tensor, by its own code; run with the interpreter of ``make bench-peers``.

Usage: mergekit_merges.py DIRECTORY SCALE DENSITY: reads base.safetensors and expert*.safetensors there, of one tensor
each, since mergekit trims tensor by tensor and TIES over all; writes a file a method.
"""

import sys
from pathlib import Path

from mergekit.merge_methods.api import merge_state_dicts
from safetensors.torch import load_file, save_file


def main():
    directory, scale, density = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    experts = {path.stem: load_file(path) for path in sorted(directory.glob("expert*.safetensors"))}
    models = {"base": load_file(directory / "base.safetensors"), **experts}
    one = dict.fromkeys(experts, 1.0)
    kept = dict.fromkeys(experts, density)
    made = {
        "mean": merge_state_dicts(experts, "linear", parameters={"weight": one}),
        "sum": merge_state_dicts(models, "task_arithmetic", base="base", parameters={"weight": one, "lambda": scale}),
        "ties": merge_state_dicts(
            models, "ties", base="base", parameters={"weight": one, "density": kept, "lambda": scale}
        ),
    }
    for name, state in made.items():
        save_file(state, directory / f"{name}.safetensors")


main()
