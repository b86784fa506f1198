"""A GPU that is not there: tensors that say they lie on one, over the CPU's memory, and what they make the host do.

C++ knows the pretended device as ``meta``, which has all of a device's manners and needs no driver; Python knows it as
``cuda:0``. Every ATen call on its tensors is carried out on their real memory, and Triton kernels run there in the
interpreter: results are right, and what would have been launched, copied, allocated and waited for is counted by the
line of the package that asked for it. What a GPU refuses is refused: operands on two devices, kernels on host memory.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import r2m_kernels
from r2m_kernels import _backends
from r2m_kernels._stream import ring, schedule
from r2m_kernels._triton import launch, truncate

CUDA, META = torch.device("cuda:0"), torch.device("meta")
PACKAGE = Path(r2m_kernels.__file__).parent
MEMORY = 80 * 2**30  # bytes, all of them free
CAPABILITY = (9, 0)  # whose tile sizes the interpreter's launches take as well
# Solvers that look at their error codes.
CHECKED = ("_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "_linalg_check_errors")

KINDS = (
    "waits",  # copies to the host, blocking copies to the device, and calls whose result the host must see
    "triton_launches",
    "aten_kernels",  # calls that compute or fill; a library may start several kernels for one
    "async_copies",  # from the host, which goes on
    "allocations",
    "views",
    "cpu_ops",
    "record_streams",
    "pinned",
)


class Counts:
    """How often, by kind and by line of the package; ``events`` says what it was."""

    def __init__(self) -> None:
        self.kinds: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0))
        self.lines: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}

    def add(self, kind: str, name: str) -> None:
        """One more, of the nearest frame in the package."""
        frame, line = sys._getframe(1), "outside"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                line = f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
                break
            frame = frame.f_back
        self.kinds[kind] += 1
        self.lines[kind][f"{line} {name}"] += 1


class DeviceTensor(Tensor):
    """Memory of the CPU that says it is the GPU's."""

    memory: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> DeviceTensor:
        metadata = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, real.shape, device=META, **metadata)
        tensor.memory = real
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.memory.untyped_storage()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.memory!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation}: tensors of the pretended GPU are computed with inside of pretended_gpu()")


def host(tensor: Tensor) -> Tensor:
    """The memory behind a tensor, wherever it says it is."""
    return tensor.memory if isinstance(tensor, DeviceTensor) else tensor


class _Functions(TorchFunctionMode):
    """Calls as Python makes them: the device gets the name that C++ knows it by."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.pin_memory:
            self._counts.add("pinned", "pin_memory")
            return args[0]
        if function is Tensor.tolist and isinstance(args[0], DeviceTensor):
            return args[0].cpu().tolist()
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        kwargs = {name: _as_meta(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if function is torch.tensor and kwargs.get("device") == META:  # meta tensors would forget the numbers
            return torch.tensor(*args, **{**kwargs, "device": None}).to(META)
        return function(*map(_as_meta, args), **kwargs)


def _as_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return META if value.type == "cuda" else value
    return META if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class _Operations(TorchDispatchMode):
    """Calls as ATen carries them out: done in real memory, and counted."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to tell the compiler so imports it, in seconds."""
        return False

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, operation._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = {id(tensor.memory): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
        asked = kwargs.get("device")
        if not ours and asked != META:
            self._counts.add("views" if operation.is_view else "cpu_ops", name)
            return operation(*args, **kwargs)
        real_args, real_kwargs = tree_map_only(DeviceTensor, host, (args, kwargs))
        if asked is not None:
            real_kwargs["device"] = torch.device("cpu")
        result = operation(*real_args, **real_kwargs)
        if not self._counted(operation, name, tensors, args, kwargs):
            return result  # it lies on the host
        storages = {_storage(tensor) for tensor in ours.values()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in storages:
                self._counts.add("allocations", name)
        return tree_map_only(Tensor, lambda one: ours[id(one)] if id(one) in ours else DeviceTensor(one), result)

    def _counted(self, operation: Any, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
        """Whether the result lies on the device."""
        if name in ("_to_copy", "copy_"):
            target, source = args[0], args[0] if name == "_to_copy" else args[1]
            from_device, asked = isinstance(source, DeviceTensor), kwargs.get("device")
            to_device = isinstance(target, DeviceTensor) if asked is None else asked == META
            if from_device and to_device:
                self._counts.add("aten_kernels", name)
            else:
                waits = from_device or not (kwargs.get("non_blocking") or args[2:3] == (True,))
                self._counts.add("waits" if waits else "async_copies", f"{name} to {'device' * to_device or 'host'}")
            return to_device
        if operation.is_view or name == "_unsafe_view":
            self._counts.add("views", name)
        elif not name.startswith(("empty", "new_empty")):
            self._computed(operation, name, tensors)
        return True

    def _computed(self, operation: Any, name: str, tensors: list[Tensor]) -> None:
        tags, indexes = operation.tags, name.startswith("index")
        foreign = [one for one in tensors if not isinstance(one, DeviceTensor) and one.ndim > 0]
        if foreign and not indexes and not name.endswith("_like"):  # which reads no element
            raise RuntimeError(f"{name}: expected all tensors on the GPU, got one of shape {tuple(foreign[0].shape)}")
        masked = any(one.dtype in (torch.bool, torch.uint8) for one in tensors[1:])
        # Indices of the host are copied to the device first, and where there is a mask it counts the elements.
        sized = masked or foreign if indexes else torch.Tag.dynamic_output_shape in tags
        if sized or torch.Tag.data_dependent_output in tags or name in CHECKED:
            self._counts.add("waits", name)
        if name not in ("_local_scalar_dense", "_linalg_check_errors"):
            self._counts.add("aten_kernels", name)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Inline:
    """A pool of threads that does what it is given at once: modes are a thread's own."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Counts]:
    """Within the block there is a GPU, whose tensors are :class:`DeviceTensor`; what is counted so far."""
    counts, started = Counts(), launch.start

    def start(kernel: Any, grid: tuple[int, ...], config: launch.Config, *arguments: Any, **constants: Any) -> None:
        if any(isinstance(one, Tensor) and not isinstance(one, DeviceTensor) for one in arguments):
            raise RuntimeError(f"{kernel.__name__}: expected tensors of the GPU, got one of the host")
        counts.add("triton_launches", kernel.__name__)
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            started(
                kernel, grid, config, *(host(one) if isinstance(one, Tensor) else one for one in arguments), **constants
            )

    stream = mock.MagicMock(name="stream")

    def recorded(*_: object) -> None:  # its stream is none that PyTorch's own would take
        counts.add("record_streams", "record_stream")

    cuda = {
        "Stream": stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "current_stream": stream,
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "get_device_capability": lambda *_: CAPABILITY,
    }
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(DeviceTensor, "record_stream", recorded),
        mock.patch.object(launch, "start", start),
        mock.patch.object(_backends, "_tried", return_value=""),  # of which a real GPU counts one launch more
        mock.patch.object(schedule, "ThreadPoolExecutor", _Inline),
        mock.patch.object(ring, "ThreadPoolExecutor", _Inline),
        mock.patch.object(truncate, "EXTRA_STEPS", ()),  # ranks of real models are 64 and more, and by default 256
        mock.patch.object(truncate, "MANY", 1),
        _Functions(counts),
        _Operations(counts),
    ):
        yield counts
