"""A repository loaded by Hugging Face's `kernels` and timed by its command; run by test_hub_kernel.py where that is.

``zoo_kernel.py PATH DIR``: what was found, as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from kernels.cli.benchmark import run_benchmark

root, directory = Path(sys.argv[1]), Path(sys.argv[2])
backends = [str(backend) for backend in Build.open(root).general.backends]
for variant in (root / "build").iterdir():
    Metadata.read_from_file(variant / "metadata.json").digest.validate(
        Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    )
kernel = get_local_kernel(root)
base = {"w": torch.zeros(30, 40)}
merged = kernel.merge(base, {"a": {"w": base["w"] + 1}})
run_benchmark(str(root), branch=None, version=None, iterations=1, warmup=1, output=str(directory / "timed.json"))
timed = json.loads((directory / "timed.json").read_text())["results"]
found = {
    "backends": backends,
    "module": kernel.Analysis.__module__,
    "merged": merged["w"].unique().tolist(),
    "installed one": "r2m_kernels" in sys.modules,
    "verified": {one["workload"]: one["verified"] for one in timed},
}
print(json.dumps(found))
