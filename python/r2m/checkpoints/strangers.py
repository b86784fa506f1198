"""Files and directories that are taken for checkpoints and are none: what they are, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from r2m.checkpoints.adapter_config import UNLOADED
from r2m_kernels.errors import printable

HEAD_BYTES = 512  # of a file, by which it is recognised


class _Kind(NamedTuple):
    """What begins so.

    Attributes:
        begins: a pattern at the start of a file.
        what: it is.
        todo: instead.
    """

    begins: bytes
    what: str
    todo: str


# What it is, what to do.
_ADAPTER = (
    "an adapter (LoRA): factors beside a model",
    f"give its directory as an expert (--expert) beside the base it was made for, or {UNLOADED}",
)
_DOWNLOAD = "download the file itself (its size is on its page)"
_KINDS = (
    _Kind(
        rb"version https://(git-lfs\.github\.com|hawser\.github\.com)/",
        "a pointer of Git LFS, which stands for the weights",
        "fetch those with git lfs pull, or from the Hub with hf://owner/name",
    ),
    _Kind(rb"(?i)\s*(<!doctype|<html|<head|<!--)", "a web page", f"{_DOWNLOAD} (a login or an error, perhaps)"),
    _Kind(rb"\s*<\?xml", "an XML text", f"{_DOWNLOAD} (an error message, perhaps)"),
    _Kind(rb"GGUF", "a GGUF file of llama.cpp, whose weights are quantised as a rule", "take what it was made from"),
    _Kind(rb"\x89HDF\r\n\x1a\n", "an HDF5 file of Keras or h5py", "save the model with PyTorch, or convert it first"),
    _Kind(
        rb"\x08[\x01-\x14]\x12.{1,64}?(pytorch|onnx|tf2onnx|skl2onnx|keras2onnx)|\x08[\x01-\x14]:",
        "an ONNX graph, which has its weights under names of its own",
        "take the checkpoint that it was exported from",
    ),
    _Kind(rb"\x93NUMPY", "one array of numpy", "save a state dict, names to tensors, with safetensors or torch.save"),
    _Kind(rb".{4}TFL3", "a TensorFlow Lite model", "take the checkpoint that it was exported from"),
    _Kind(rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd", "compressed", "decompress it first"),
    _Kind(rb"7z\xbc\xaf\x27\x1c|Rar!", "an archive", "unpack it first"),
    _Kind(rb".{257}ustar", "a tar archive", "unpack it first (torch 0.1 saved so: load and save it with torch 1)"),
    _Kind(rb"\x80[\x03-\x05]", "a pickle of Python", "save its state_dict() with torch.save or safetensors"),
    _Kind(rb"\x7fELF|MZ|#!", "a program", "name the weights"),
    _Kind(rb"\x89PNG|\xff\xd8\xff|%PDF", "a picture or a document", "name the weights"),
    _Kind(rb"\s*[{\[]", "a JSON text", "name the directory it lies in, if it is an index, or the weights"),
    _Kind(rb"\x00{512}", "empty but for zeros: a download that was cut off, perhaps", "fetch it again"),
    _Kind(rb"[\t\r\n\x20-\x7e]{16,}\Z", "a text", "name the weights"),
)
# Of files in a zip archive.
_ZIPPED = (
    (re.compile(r".*\.npy"), "an archive of numpy's arrays", "save it with safetensors.numpy.save_file, by names"),
    (re.compile(r"model\.weights\.h5"), "a Keras model", "save the model with PyTorch, or convert it first"),
    (re.compile(r".*\.(pth|pt|bin|ckpt|safetensors)"), "an archive with checkpoints in it", "unpack it first"),
)
# Of names in a directory: what of them says it, what it is, what to do. Of these even the files that look like
# checkpoints are parts of something else.
_PARTS = (
    (
        r"\.metadata|.*\.distcp",
        "a distributed checkpoint (DCP, FSDP)",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR model.pth makes a file of it",
    ),
    (
        r"pytorch_model_fsdp(_\d+)?",
        "a training state of accelerate with FSDP",
        "accelerate merge-weights DIR/pytorch_model_fsdp_0 OUT makes one file of it",
    ),
    (
        r"zero_to_fp32\.py|.*_model_states\.pt|.*_optim_states\.pt|global_step\d+",
        "a DeepSpeed checkpoint",
        "its zero_to_fp32.py (python zero_to_fp32.py DIR OUT) makes a state dict of it",
    ),
    (r"adapter_(config\.json|model\.(safetensors|bin))", *_ADAPTER),
)
_OTHERS = (
    (r"saved_model\.pb|.*\.ckpt(-\d+)?\.index", "a TensorFlow model", "convert it to PyTorch first"),
    (
        r".*\.(h5|keras|msgpack)",
        "a model of Keras, TensorFlow or Flax",
        "convert it to PyTorch first (transformers: from_pretrained(DIR, from_tf=True).save_pretrained(OUT))",
    ),
    (r".*\.onnx", "an ONNX model", "take the checkpoint that it was exported from"),
    (r".*\.gguf", "a model of llama.cpp", "take the checkpoint that it was made from"),
    (r"checkpoint-\d+", "a training's output", "name one of the checkpoints in it, such as DIR/NAME"),
    (r".*\.(crdownload|part|incomplete|aria2)", "a download that is not done", "fetch it again"),
)


def of_file(head: bytes) -> str:
    """What a file is that begins with ``head``, as a clause; empty where that is not known."""
    for kind in _KINDS:
        if re.match(kind.begins, head, re.DOTALL):
            return f"is {kind.what}; {kind.todo}"
    return ""


def of_archive(names: Sequence[str]) -> str:
    """The same of a zip archive with entries of these names."""
    for pattern, what, todo in _ZIPPED:
        if any(pattern.fullmatch(name) for name in names):
            return f"is {what}; {todo}"
    return "is a zip archive without the data.pkl of torch.save; unpack it first, if weights are in it"


def of_parts(names: Sequence[str], directory: str) -> str:
    """What a directory is whose files are parts of something else, as a clause; empty where it is nothing known.

    Args:
        names: of the files and directories in it.
        directory: what it is called.
    """
    return _of_directory(_PARTS, names, directory)


def of_others(names: Sequence[str], directory: str) -> str:
    """The same of a directory without any file of a known format."""
    return _of_directory(_OTHERS, names, directory)


def of_tensors(names: Iterable[str]) -> str:
    """The same of a file with tensors of these names."""
    if all(re.search(r"(^|\.)lora_(A|B|up|down|embedding_[AB]|magnitude_vector)(\.|$)", name) for name in names):
        return "is {}; {}".format(*_ADAPTER)
    return ""


def _of_directory(kinds: Iterable[tuple[str, str, str]], names: Sequence[str], directory: str) -> str:
    for pattern, what, todo in kinds:
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            todo = todo.replace("DIR", printable(directory)).replace("NAME", printable(found))
            return f"is {what}, as {printable(found)} in it says; {todo}"
    return ""
