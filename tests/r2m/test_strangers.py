"""Files and directories that are no checkpoints are named for what they are, with what to do."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from r2m.checkpoints.reader import open_checkpoint
from safetensors.torch import save_file

from r2m_kernels.errors import BadCheckpoint


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(path: str) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        open_checkpoint(path, "base (x)")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(2))
    return stream.getvalue()


def zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, b"x")
    return stream.getvalue()


FILES = {
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "is a pointer of Git LFS, which stands for the weights; fetch those with git lfs pull",
    ),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body>", "is a web page; download the file itself"),
    "web page without doctype": (b"<html lang=en>" + b" " * 600, "is a web page; download"),
    "cloud error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is an XML text; download"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file of llama.cpp"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(600), "is an ONNX graph"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file of Keras or h5py"),
    "npy": (b"\x93NUMPY\x01\x00v\x00", "is one array of numpy; save a state dict"),
    "npz": (npz(), "is an archive of numpy's arrays; save it with safetensors.numpy.save_file"),
    "zip with checkpoints": (zipped("a/model.pth"), "is an archive with checkpoints in it; unpack it first"),
    "other zip": (zipped("notes.txt"), "is a zip archive without the data.pkl of torch.save"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "is compressed; decompress it first"),
    "tar": (b"a" + bytes(256) + b"ustar" + bytes(400), "is a tar archive"),
    "pickle": (b"\x80\x04\x95" + bytes(60), "is a pickle of Python; save its state_dict()"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "x"}}', "is a JSON text; name the directory it lies in"),
    "zeros": (bytes(4096), "is empty but for zeros: a download that was cut off, perhaps; fetch it again"),
    "text": (b"Entry not found, sorry about that", "is a text; name the weights"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "weights"])
@pytest.mark.parametrize("kind", FILES)
def test_a_strangers_file_is_named(kind: str, name: str) -> None:
    content, expected = FILES[kind]
    Path(name).write_bytes(content)
    assert refusal(name).startswith(f"base (x): {expected}")


DIRECTORIES = {
    "DCP": (("__0_0.distcp", ".metadata"), "is a distributed checkpoint (DCP, FSDP), as "),
    "FSDP": (("pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin", "random_states_0.pkl"), "is a training state of "),
    "DeepSpeed": (("zero_to_fp32.py", "latest", "global_step5/x.pt"), "is a DeepSpeed checkpoint, as "),
    "its parts": (
        ("mp_rank_00_model_states.pt", "zero_pp_rank_0_optim_states.pt"),
        "is a DeepSpeed checkpoint",
    ),
    "LoRA": (("adapter_config.json", "adapter_model.safetensors"), "is an adapter (LoRA): factors beside a model, as "),
    "trainer": (("checkpoint-500/x", "runs/y"), "is a training's output, as checkpoint-500 in it says; name one of "),
    "TensorFlow": (("saved_model.pb", "variables/x"), "is a TensorFlow model, as saved_model.pb in it says"),
    "Keras": (("tf_model.h5", "config.json"), "is a model of Keras, TensorFlow or Flax, as tf_model.h5"),
    "Flax": (("flax_model.msgpack",), "is a model of Keras, TensorFlow or Flax"),
    "ONNX": (("model.onnx", "config.json"), "is an ONNX model, as model.onnx"),
    "GGUF": (("q4.gguf",), "is a model of llama.cpp"),
    "download": (("model.safetensors.incomplete",), "is a download that is not done"),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_strangers_directory_is_named(kind: str) -> None:
    names, expected = DIRECTORIES[kind]
    for name in names:
        path = Path("model", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert refusal("model").startswith(f"base (x): {expected}")


def test_a_checkpoint_beside_such_files_is_read() -> None:
    Path("model/checkpoint-500").mkdir(parents=True)
    for name in ("adapter_config.json", "zero_to_fp32.py", "tf_model.h5"):
        Path("model", name).touch()
    save_file({"a": torch.ones(2)}, "model/model.safetensors")
    assert list(open_checkpoint("model", "base").specs) == ["a"]


def test_a_file_of_adapters_is_named() -> None:
    save_file({f"base_model.model.q.lora_{one}.weight": torch.ones(2, 2) for one in "AB"}, "x.safetensors")
    assert refusal("x.safetensors").startswith("base (x): is an adapter (LoRA): factors beside a model; give its ")
