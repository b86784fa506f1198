"""Other people's merges of the same files, by their own code: run with the interpreter of ``make bench-peers``.

    .venv-peers/bin/python -m bench.peers {tsvm,simple_average} BASE EXPERT… OUT

mergekit has a command of its own, ``mergekit-pytorch``, which ``bench/files.py`` calls; fusion-bench merges modules, so
that a checkpoint becomes one here. Imports nothing of r2m_kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Checkpoint(nn.Module):
    """Tensors as parameters, under names that a module may have."""

    def __init__(self, path: str) -> None:
        super().__init__()
        for name, tensor in load_file(path).items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor, requires_grad=False))


def main(arguments: Sequence[str]) -> int:
    """From files to a file."""
    from fusion_bench import BaseModelPool
    from fusion_bench.method import SimpleAverageAlgorithm
    from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging

    method, base, *experts, out = arguments
    models = {f"expert{index}": Checkpoint(path) for index, path in enumerate(experts)}
    if method == "simple_average":
        merged = SimpleAverageAlgorithm().run(BaseModelPool(models))
    elif method == "tsvm":
        merged = TaskSingularVectorMerging(alpha=1.0).run(BaseModelPool({"_pretrained_": Checkpoint(base), **models}))
    else:
        raise SystemExit(f"bench.peers: expected tsvm or simple_average, got {method!r}")
    with torch.no_grad():
        save_file({name.replace("/", "."): value.contiguous() for name, value in merged.state_dict().items()}, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
