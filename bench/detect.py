"""What ``r2m detect`` takes on a thousand pictures beside the scoring of ``r2m evaluate``, and whether they agree.

    python -m bench.detect [--pictures N] [--json FILE]

Both are run in turns in one process, a small convolutional network being the detector; its smallest times count.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from r2m.evaluation import detection, run
from r2m.evaluation.models import load, preprocessing_of
from r2m.evaluation.reading import read_all
from r2m.evaluation.request import Request
from safetensors.torch import save_file
from torch import nn

from bench.machine import machine, write_json

SIDE, ROUNDS = 224, 3
GIVEN = {"detector": "bench.detect:network", "size": SIDE, "mean": "0.5", "std": "0.5"}


def network() -> nn.Module:
    """Four strided convolutions and a head: less work than any detector in use, so that all else shows."""
    torch.manual_seed(0)
    sides = (3, 16, 32, 64, 64)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sides):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sides[-1], 2))


def pictures(directory: Path, count: int) -> None:
    """Photographs' worth of JPEG: smooth with some noise, 320 pixels wide."""
    dice = np.random.default_rng(0)
    for number in range(count):
        small = dice.integers(0, 256, (8, 10, 3), np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((320, 256), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(picture + dice.integers(-6, 7, picture.shape), 0, 255).astype(np.uint8)
        path = directory / "set" / ("fake" if number % 2 else "real") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def measure(count: int) -> dict[str, Any]:
    """Seconds of both, and the largest difference of scores."""
    times: dict[str, list[float]] = {"evaluate": [], "detect": []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        pictures(directory, count)
        checkpoint = directory / "model.safetensors"
        save_file(network().state_dict(), checkpoint)
        place = str(directory / "set")
        asked = Request(data=(place,), **GIVEN)
        data = read_all(asked)
        model, preprocessing = (one("model", str(checkpoint), asked) for one in (_loaded, preprocessing_of))
        for _ in range(ROUNDS):
            started = time.perf_counter()
            scored = run.run_detector("model", model, data.datasets, preprocessing, asked, lambda done: None)
            times["evaluate"].append(time.perf_counter() - started)
            started = time.perf_counter()
            more = {"adapters": False, "videos": False, "quiet": True}
            found = detection.detect(str(checkpoint), [place], Request(**GIVEN), **more)
            detection.lines(found)
            times["detect"].append(time.perf_counter() - started)
        theirs = {str(frame.path): score for rows in scored.rows.values() for frame, score in rows}
        difference = max(abs(row["score"] - theirs[os.path.normpath(row["file"])]) for row in found.rows)
    best = {name: min(seconds) for name, seconds in times.items()}
    return {
        "pictures": count,
        "seconds": times,
        "detect by evaluate": best["detect"] / best["evaluate"],
        "largest difference of scores": difference,
    }


def _loaded(name: str, path: str, asked: Request) -> nn.Module:
    model = load(name, path, asked, adapters=False)
    assert isinstance(model, nn.Module)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.pictures)
    print(
        f"detect / evaluate: {found['detect by evaluate']:.3f}, scores to {found['largest difference of scores']:.1e}"
    )
    if options.json is not None:
        write_json(options.json, {"machine": machine(), **found})


if __name__ == "__main__":
    main()
