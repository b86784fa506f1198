"""Writing results: each file is whole or not there, and nothing else in the directory is touched."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import safetensors.torch

from r2m.demo.networks import Detector, new_detector
from r2m_kernels.errors import InvalidInput


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it, so that a former one stays until the new one is whole.

    Raises:
        OSError: the file cannot be written; the former one is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_detector(detector: Detector, path: Path) -> None:
    """Write parameters and buffers, running statistics and counters included, as a safetensors checkpoint."""
    state = {name: tensor.detach().contiguous() for name, tensor in detector.state_dict().items()}
    replace_file(path, safetensors.torch.save(state, metadata={"format": "pt"}))


def load_detector(path: Path) -> Detector:
    """Read a detector back, in evaluation mode.

    Raises:
        InvalidInput: the checkpoint does not hold exactly a detector's tensors.
    """
    detector = new_detector(0)
    try:
        detector.load_state_dict(safetensors.torch.load_file(path), strict=True)
    except RuntimeError as error:
        raise InvalidInput(f"{path}: does not hold the demo's detector: {' '.join(str(error).split())}") from error
    return detector.eval()
