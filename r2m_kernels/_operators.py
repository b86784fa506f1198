"""The operators as PyTorch's dispatcher has them, ``torch.ops.r2m``: one entry of :data:`OPERATORS` each.

An entry is a kernel, whose signature is the schema, what it returns for tensors without data (FakeTensor, meta), and
its derivative. Arguments are flat: tensors, lists of tensors, numbers and texts. :mod:`.ops` has the functions for
people.
"""

# Annotations are read by `infer_schema`, so they are not texts.
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _derivatives, checks, tensor_checks
from ._stream import parallel
from ._stream.blocks import empty_rows
from ._stream.tensors import FLOATING, compute_dtype


def _free_namespace() -> str:
    """``r2m``; of a second copy of the package its name, and of one that is imported anew one with a number."""
    name = "r2m" if __package__ == "r2m_kernels" else re.sub(r"\W", "_", str(__package__))
    number, free = 1, name
    while hasattr(getattr(torch.ops, free), "task_gram"):
        number, free = number + 1, f"{name}_{number + 1}"
    return free


NAMESPACE = _free_namespace()
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
# A result depends on strides where a library's product does, and is a tensor that nobody else has.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class Operator(NamedTuple):
    """An operator.

    Attributes:
        name: in ``torch.ops.r2m``; ``NAME.out`` writes to a tensor that is given.
        kernel: checks its arguments and computes.
        fake: the same checks, and a result of the right shape, dtype, device and strides.
        derivative: of the arguments' gradients from the result's; ``None``: asking for it is an error.
    """

    name: str
    kernel: Callable[..., Any]
    fake: Callable[..., Any]
    derivative: _derivatives.Derivative | None = None

    @property
    def writes(self) -> bool:
        """Whether it writes to ``out``."""
        return self.name.endswith(".out")

    @property
    def schema(self) -> str:
        """From the kernel's signature."""
        return torch.library.infer_schema(self.kernel, mutates_args=("out",) if self.writes else ())


def task_gram(base: Sequence[Tensor], experts: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """``experts``: N · L tensors, all of one expert after all of the one before."""
    _check_task_gram(base, experts, backend)
    size = len(base)
    groups = [experts[start : start + size] for start in range(0, len(experts), size)]
    tasks = _backends.choose(backend, base[0].device).operators.task_gram(base, groups).tasks
    return tasks if tasks.is_cpu else tasks.cpu()


def _task_gram_fake(base: Sequence[Tensor], experts: Sequence[Tensor], backend: str = "auto") -> Tensor:
    _check_task_gram(base, experts, backend)
    count = len(experts) // len(base)
    device = "meta" if base[0].device.type == "meta" else "cpu"
    return torch.empty(len(base), count, count, dtype=torch.float64, device=device)


def _check_task_gram(base: Sequence[Tensor], experts: Sequence[Tensor], backend: str) -> None:
    checks.choice("backend", backend, _backends.NAMES)
    checks.not_empty("base", base)
    checks.not_empty("experts", experts)
    size = len(base)
    checks.same_length("tensors of all experts", experts, -(-len(experts) // size) * size)
    for index, tensor in enumerate(base):
        _check_inputs(tensor, experts[index::size], f" {index}")
        tensor_checks.same_device(f"base tensor {index}", tensor, base[0].device)


def residual_matmul(
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool = False,
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    _check_residual_matmul(base, experts, mixing, rhs, transpose, precision, backend)
    operators, group = _backends.choose(backend, base.device).operators, [[expert] for expert in experts]
    return _laid_out(operators.residual_matmul([base], group, mixing, rhs.unsqueeze(0), transpose, precision)[0])


def _residual_matmul_fake(
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool = False,
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    _check_residual_matmul(base, experts, mixing, rhs, transpose, precision, backend)
    outer = math.prod(base.shape[1:]) if transpose else base.shape[0]
    return _columns((len(experts), outer, rhs.shape[2]), compute_dtype([base, *experts, rhs]), base.device)


def _check_residual_matmul(
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool,
    precision: str,
    backend: str,
) -> None:
    checks.choice("backend", backend, _backends.NAMES)
    checks.choice("precision", precision, PRECISIONS)
    _check_matrix(base, experts)
    count = len(experts)
    tensor_checks.same_shape("mixing", mixing, (count, count))
    inner = base.shape[0] if transpose else math.prod(base.shape[1:])
    tensor_checks.ndim("rhs", rhs, 3)
    tensor_checks.same_shape("rhs", rhs, (count, inner, rhs.shape[2]))
    tensor_checks.floating("rhs", rhs)


def orthonormalize(y: Tensor, backend: str = "auto") -> Tensor:
    _check_orthonormalize(y, backend)
    return _laid_out(_backends.choose(backend, y.device).operators.orthonormalize(y))


def _orthonormalize_fake(y: Tensor, backend: str = "auto") -> Tensor:
    _check_orthonormalize(y, backend)
    return _columns(y.shape, compute_dtype([y]), y.device)


def _check_orthonormalize(y: Tensor, backend: str) -> None:
    checks.choice("backend", backend, _backends.NAMES)
    tensor_checks.floating("y", y)
    tensor_checks.tall("y", y)


def _allocating(write: Callable[..., None]) -> Callable[..., Tensor]:
    """What writes to ``out``, with a new tensor like the base in its place: its arguments are all others."""
    signature = inspect.signature(write)
    place = [*signature.parameters].index("out")

    def made(base: Tensor, *others: Any) -> Tensor:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)  # whatever the base's strides
        write(base, *others[: place - 1], out, *others[place - 1 :])
        return out

    taken = [one for name, one in signature.parameters.items() if name != "out"]
    made.__signature__ = signature.replace(parameters=taken, return_annotation=Tensor)  # type: ignore[attr-defined]
    return made


def combine_out(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    out: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    _check_combine(base, experts, core, out, left, right, scale, backend)
    operators = _backends.choose(backend, base.device).operators
    left, right = (None if factor is None else factor.unsqueeze(0) for factor in (left, right))
    operators.combine([base], [[expert] for expert in experts], core, left, right, scale, [out])


def _check_combine(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    out: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    checks.choice("backend", backend, _backends.NAMES)
    _check_inputs(base, experts)
    count = len(experts)
    tensor_checks.same_shape("core", core, (count,))
    if not (left is right is scale is None):
        checks.all_or_none("left, right and scale", [tensor is not None for tensor in (left, right, scale)])
    if left is not None and right is not None and scale is not None:
        tensor_checks.matrix_like("base", base)
        tensor_checks.ndim("left", left, 3)
        rows, rank = base.shape[0], left.shape[2]
        tensor_checks.same_shape("left", left, (count, rows, rank))
        tensor_checks.same_shape("right", right, (count, rank, math.prod(base.shape[1:])))
        tensor_checks.same_shape("scale", scale, (count,))
    _check_output(base, out)


def combine_rows_out(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    mixing: Tensor,
    weights: Tensor,
    scales: Tensor,
    eta: float,
    power: float,
    out: Tensor,
    backend: str = "auto",
) -> None:
    _check_combine_rows(base, experts, core, mixing, weights, scales, eta, power, out, backend)
    core, mixing, weights, scales = map(_double, (core, mixing, weights, scales))
    operators = _backends.choose(backend, base.device).operators
    bases, group, dtype = [base], [[expert] for expert in experts], compute_dtype([base, *experts])

    def write(target: Tensor) -> None:
        coefficients = operators.row_coefficients(
            operators.row_grams(bases, group).rows, core, mixing, weights, scales, eta, power, dtype
        )
        operators.combine(bases, group, coefficients, None, None, None, [target])

    _write(out, write)


def _check_combine_rows(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    mixing: Tensor,
    weights: Tensor,
    scales: Tensor,
    eta: float,
    power: float,
    out: Tensor,
    backend: str = "auto",
) -> None:
    checks.choice("backend", backend, _backends.NAMES)
    _check_matrix(base, experts)
    count = len(experts)
    tensor_checks.same_shape("core", core, (count,))
    tensor_checks.same_shape("mixing", mixing, (count, count))
    tensor_checks.same_shape("weights", weights, (count,))
    tensor_checks.same_shape("scales", scales, (count,))
    checks.number("eta", eta)
    checks.number("power", power, minimum=0.0)
    _check_output(base, out)


def match_columns_out(
    base: Tensor, experts: Sequence[Tensor], merged: Tensor, counts: Tensor, out: Tensor, backend: str = "auto"
) -> None:
    _check_match_columns(base, experts, merged, counts, out, backend)
    change = merged.to(compute_dtype([base, *experts]), copy=True, memory_format=torch.contiguous_format)
    operators = _backends.choose(backend, base.device).operators
    group, counts = [[expert] for expert in experts], _double(counts)

    def write(target: Tensor) -> None:
        operators.match_columns([base], group, [change], counts, [target])

    _write(out, write)


def _check_match_columns(
    base: Tensor, experts: Sequence[Tensor], merged: Tensor, counts: Tensor, out: Tensor, backend: str = "auto"
) -> None:
    checks.choice("backend", backend, _backends.NAMES)
    _check_matrix(base, experts)
    tensor_checks.floating("merged", merged)
    tensor_checks.same_shape("merged", merged, base.shape)
    tensor_checks.same_device("merged", merged, base.device)
    tensor_checks.same_shape("counts", counts, (len(experts),))
    _check_output(base, out)


OPERATORS = (
    Operator("task_gram", task_gram, _task_gram_fake),
    Operator("residual_matmul", residual_matmul, _residual_matmul_fake),
    Operator("orthonormalize", orthonormalize, _orthonormalize_fake),
    Operator("combine", _allocating(combine_out), _allocating(_check_combine), _derivatives.of_combine),
    Operator("combine.out", combine_out, _check_combine),
    Operator("combine_rows", _allocating(combine_rows_out), _allocating(_check_combine_rows)),
    Operator("combine_rows.out", combine_rows_out, _check_combine_rows),
    Operator("match_columns", _allocating(match_columns_out), _allocating(_check_match_columns)),
    Operator("match_columns.out", match_columns_out, _check_match_columns),
)


def _double(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype == torch.float64 else numbers.double()


def _check_matrix(base: Tensor, experts: Sequence[Tensor]) -> None:
    _check_inputs(base, experts)
    tensor_checks.matrix_like("base", base)


def _check_inputs(base: Tensor, experts: Sequence[Tensor], index: str = "") -> None:
    shape, device = base.shape, base.device
    if base.dtype in FLOATING and experts:
        for one in experts:
            if one.shape != shape or one.dtype not in FLOATING or one.device != device:
                break
        else:
            return
    checks.not_empty("experts", experts)
    tensor_checks.floating(f"base tensor{index}", base)
    for j, expert in enumerate(experts):
        what = f"tensor{index} of expert {j}"
        tensor_checks.floating(what, expert)
        tensor_checks.same_shape(what, expert, shape)
        tensor_checks.same_device(what, expert, device)


def _check_output(base: Tensor, out: Tensor) -> None:
    if out.dtype in FLOATING and out.shape == base.shape and out.device == base.device:
        return
    tensor_checks.floating("out", out)
    tensor_checks.same_shape("out", out, base.shape)
    tensor_checks.same_device("out", out, base.device)


def _columns(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty (…, m, k): contiguous on a CPU; on a GPU as its kernels write vectors, side by side and padded."""
    if device.type in ("cpu", "meta"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    *leading, length, count = shape
    return empty_rows((*leading, count), length, dtype, device).mT


def _laid_out(result: Tensor) -> Tensor:
    """A result in the layout of :func:`_columns`, whoever computed it."""
    if result.is_cpu:
        return result if result.is_contiguous() else result.contiguous()
    wanted = _columns(result.shape, result.dtype, result.device)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def _write(out: Tensor, write: Callable[[Tensor], None]) -> None:
    """``write`` fills a contiguous tensor with elements: ``out``, or one that is copied to it."""
    if out.numel():
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        write(target)
        if target is not out:
            out.copy_(target)


def _autograd_of(entry: Operator, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What is called above autograd: the kernel at once, where neither a gradient nor anybody else is to be asked.

    ``torch.library.register_autograd`` goes back to the dispatcher for the kernel, which takes as long again.
    """
    derivative = entry.derivative or _derivatives.none_of(entry.name)
    call, after, below = _overload(entry.name), torch._C._after_autograd_keyset, torch._C._AutoDispatchBelowAutograd

    def beneath(keys: Any, *args: Any) -> Any:
        with below():
            return call.redispatch(keys & after, *args)

    def above(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if entry.writes:
                raise NotImplementedError(_derivatives.without(f"{entry.name.removesuffix('.out')} with out="))
            return _derivatives.tracked(functools.partial(beneath, keys), derivative, args)
        if keys.raw_repr() in PLAIN:
            with below():  # what the kernel calls is called without autograd: more is gained than this takes
                return kernel(*args)
        return beneath(keys, *args)

    return above


def _plain_keys() -> frozenset[int]:
    """Of calls with tensors on a CPU or GPU and nothing else: no mode, subclass, transform or lazy sign."""
    keys = torch._C.DispatchKey
    pairs = ((keys.CPU, keys.AutogradCPU), (keys.CUDA, keys.AutogradCUDA))
    return frozenset((torch._C.DispatchKeySet(one) | torch._C.DispatchKeySet(other)).raw_repr() for one, other in pairs)


PLAIN = _plain_keys()


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    add: Callable[..., None] = library.impl
    for entry in OPERATORS:
        library.define(entry.name + entry.schema, tags=TAGS)  # type: ignore[no-untyped-call]
        kernel = parallel.kernel(entry.kernel)
        add(entry.name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{entry.name}", entry.fake, lib=library)
        add(entry.name, _autograd_of(entry, kernel), "Autograd", with_keyset=True)
    return library


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")


LIBRARY = _register()  # what is registered ends with it
CALLS: dict[str, Callable[..., Tensor]] = {entry.name: _overload(entry.name) for entry in OPERATORS}
