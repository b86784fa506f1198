"""What runs where: docs/backends.md, from a trace of every method on every backend.

    python -m bench.trace_backends [--check]

Every method merges a tiny network on every backend, Triton's kernels in their interpreter. Noted is which operators it
calls, what each of them runs there, and what is done with tensors outside of operators.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.machine import ROOT
from bench.markdown import render, update
from r2m_kernels import MergeConfig, _backends, merge, truncation
from r2m_kernels._interface import Operators
from r2m_kernels._native import library
from r2m_kernels._stream import run
from r2m_kernels._triton import launch
from r2m_kernels._triton import truncate as triton_truncate
from r2m_kernels.config import OFFERED

PAGE = ROOT / "docs" / "backends.md"
BACKENDS = ("torch", "native", "triton")
# Of a group: a tensor more shows what is done tensor by tensor. Two at least, since one is handed on without a copy.
SIZES = (2, 3)
EXPERTS = 2
# The short side is above the widest sketch that the methods take here.
MATRIX, VECTOR = (24, 32), (40,)
# Options of R²M that bring other operators.
VARIANTS = {
    "rank=1.0": {"rank": 1.0},
    "row_power=0": {"row_power": 0.0},
    "scale='column'": {"scale": "column"},
    "svd='textbook'": {"svd": "textbook"},
}
# What a backend says about its operators, and no work.
SAID = ("traits", "gram_panel_elements")
OPERATORS = tuple(name for name in vars(Operators) if not name.startswith("_") and name not in SAID)
OUTSIDE = ""
NO_WORK = ("empty", "new_empty", "_unsafe_view")
PRODUCTS, FACTORIZATIONS = ("mm", "bmm", "addmm", "baddbmm"), ("linalg_qr",)
EIGENPROBLEMS = ("_linalg_eigh", "_linalg_eigvals", "_linalg_svd")
KINDS = ("kernels", "kernels and products", "products", "PyTorch")


@dataclass
class Ran:
    """What an operator ran, or what ran outside of all.

    Attributes:
        kernels: of this package.
        products: of two large matrices, and factorizations, by the library that torch carries.
        others: ATen operators that compute or copy.
        eigenproblems: each of a batch counts.
    """

    kernels: int = 0
    products: int = 0
    others: int = 0
    eigenproblems: int = 0

    @property
    def aten(self) -> int:
        """ATen operators, but for eigenproblems."""
        return self.products + self.others

    @property
    def kind(self) -> str:
        """Of :data:`KINDS`."""
        if self.kernels:
            return "kernels and products" if self.products else "kernels"
        return "products" if self.products else "PyTorch"


@dataclass
class Trace:
    """Of one merge.

    Attributes:
        ran: operator, or :data:`OUTSIDE`, → what ran.
        modules: operator → where it is implemented, and what it is given for this backend.
    """

    ran: dict[str, Ran] = field(default_factory=dict)
    modules: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, kind: str) -> list[str]:
        """Operators by what they ran."""
        return [name for name in OPERATORS if name in self.ran and self.ran[name].kind == kind]


class Tracer(TorchDispatchMode):
    """Sees ATen operators, and calls that go through :meth:`operator` and :meth:`kernel`; in one thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and dynamo takes seconds to import

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace({OUTSIDE: Ran()})
        self._operator, self._in_kernel = OUTSIDE, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")  # in place or not
        if self._in_kernel or func.is_view or name.startswith(NO_WORK):
            return result
        ran = self.trace.ran[self._operator]
        if name in EIGENPROBLEMS:
            ran.eigenproblems += args[0].shape[:-2].numel()
        elif name in FACTORIZATIONS or (name in PRODUCTS and _is_product(*args[-2:])):
            ran.products += 1
        elif any(map(_large, _tensors(args, kwargs, result))):
            ran.others += 1
        return result

    def kernel(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` as the start of a kernel: what the interpreter does there is no work of ours."""

        def traced(*args: Any, **kwargs: Any) -> Any:
            self.trace.ran[self._operator].kernels += 1
            self._in_kernel = True
            try:
                return call(*args, **kwargs)
            finally:
                self._in_kernel = False

        return traced

    def operator(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` as an operator: what runs inside is its own."""
        parts = [call.func, *call.keywords.values()] if isinstance(call, partial) else [call]
        self.trace.modules[name] = tuple(getattr(part, "__self__", part).__module__ for part in parts)

        def traced(*args: Any, **kwargs: Any) -> Any:
            self.trace.ran.setdefault(name, Ran())
            before, self._operator = self._operator, name
            try:
                return call(*args, **kwargs)
            finally:
                self._operator = before

        return traced


def _tensors(*values: Any) -> Iterator[Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, Tensor))


def _is_product(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are multiplied, one of them large, and not a few experts' tensors are summed up."""
    return (_large(one) or _large(other)) and one.shape[-1] > EXPERTS


def _large(tensor: Tensor) -> bool:
    """Whether it has a side of the network's; others hold numbers about tensors, such as their Gram matrices."""
    return max(tensor.shape, default=0) >= min(MATRIX)


class TracedOperators:
    """A backend's operators, seen by a tracer."""

    def __init__(self, operators: Operators, tracer: Tracer) -> None:
        self._operators, self._tracer = operators, tracer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._operators, name)
        return self._tracer.operator(name, value) if name in OPERATORS else value


@contextmanager
def seen(tracer: Tracer) -> Iterator[None]:
    """Within the block every merge goes through a tracer, in one thread, as a merge of large matrices goes."""

    def choose(name: str, device: torch.device) -> Any:
        chosen = _backends.choose(name, device)
        return replace(chosen, operators=TracedOperators(chosen.operators, tracer))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.object(run, "choose", choose),
            mock.patch.object(truncation, "EXACT_UP_TO", 0),
            mock.patch.object(triton_truncate, "EXTRA_STEPS", ()),  # more of the same
            mock.patch.object(launch, "start", tracer.kernel(launch.start)),
            mock.patch.object(library.Library, "call", tracer.kernel(library.Library.call)),
            # The page is that of any CPU.
            mock.patch.object(library.load(), "multiplies_bfloat16", False),
            tracer,
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def network(size: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and experts with a group of ``size`` matrices, a vector and a statistic."""
    shapes = {f"blocks.{i}.weight": MATRIX for i in range(size)} | {"norm.bias": VECTOR, "norm.running_mean": VECTOR}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = [
        {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(EXPERTS)
    ]
    return base, experts


def trace(config: MergeConfig, backend: str, size: int) -> Trace:
    """What a merge of :func:`network` runs; one power iteration shows as much as several."""
    base, experts = network(size)
    tracer = Tracer()
    with seen(tracer):
        merge(base, experts, config.replace(power_iterations=1, oversampling=0), backend=backend)
    return tracer.trace


def configurations() -> dict[str, MergeConfig]:
    """Rows of the page: every method, and R²M with options."""
    methods = {f"`{name}`": one.make() for name, one in OFFERED.items()}
    return methods | {f"`r2m`, `{name}`": MergeConfig.r2m(**options) for name, options in VARIANTS.items()}


def page() -> str:
    """What docs/backends.md says."""
    methods, tensors, traces = [], [], []
    for name, config in configurations().items():
        of_sizes = [[trace(config, backend, size) for size in SIZES] for backend in BACKENDS]
        traces.append([of_size[-1] for of_size in of_sizes])
        methods.append([name, *(_by_kind(one) for one in traces[-1])])
        further = [one_more(*of_size) for of_size in of_sizes]
        outside = [f"{one.outside}" for one in further]
        tensors.append([name, *outside, f"{further[-1].inside}", *(f"{one.eigenproblems}" for one in further)])
    operators = []
    for name in OPERATORS:
        of_backends = [_implemented(name, [one[place] for one in traces]) for place in range(len(BACKENDS))]
        operators.append([f"`{name}`", *of_backends])
    template = Path(__file__).with_name("backends.md.j2")
    return render(template, backends=BACKENDS, methods=methods, operators=operators, tensors=tensors, experts=EXPERTS)


class Further(NamedTuple):
    """What one matrix more of a group costs: ATen calls, and eigenproblems."""

    outside: int
    inside: int
    eigenproblems: int


def one_more(before: Trace, after: Trace) -> Further:
    """From traces of two sizes."""
    outside = after.ran[OUTSIDE].aten - before.ran[OUTSIDE].aten
    aten, eigenproblems = (
        sum(getattr(one, what) for one in after.ran.values()) - sum(getattr(one, what) for one in before.ran.values())
        for what in ("aten", "eigenproblems")
    )
    return Further(outside, aten - outside, eigenproblems)


def _by_kind(one: Trace) -> str:
    found = {kind: ", ".join(f"`{name}`" for name in one.of(kind)) for kind in KINDS}
    return "<br>".join(f"{kind}: {names}" for kind, names in found.items() if names)


def _implemented(name: str, traces: Iterable[Trace]) -> str:
    """What an operator runs for all methods together, and where it stands."""
    ran = [one.ran[name] for one in traces if name in one.ran]
    modules = {one.modules[name] for one in traces if name in one.ran}
    if not ran:
        return "–"
    (names,) = modules
    files = " with ".join(f"`{name.removeprefix('r2m_kernels.').replace('.', '/')}.py`" for name in names)
    both = Ran(sum(one.kernels for one in ran), sum(one.products for one in ran))
    return f"{both.kind}, {files}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only look whether the page is what runs")
    return update(PAGE, page(), check=parser.parse_args().check, command="python -m bench.trace_backends")


if __name__ == "__main__":
    raise SystemExit(main())
