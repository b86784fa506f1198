"""The operators as PyTorch sees them: schemas, tensors without data, compiled and exported programs, the same bits."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch
from cases import padded
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import r2m_kernels
from r2m_kernels import InvalidInput, _operators, _triton, ops

BACKENDS = ["torch", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = [entry.name for entry in _operators.OPERATORS]


def arguments(name, shape=(6, 5), dtype=torch.float32):
    """Of an operator, without its backend."""
    generator = torch.Generator().manual_seed(0)
    m, n = shape

    def random(*size, dtype=torch.float64):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    base = random(m, n, dtype=dtype)
    experts = [base + random(m, n, dtype=dtype) for _ in range(2)]
    core, mixing, weights = random(2), random(2, 2), random(2).abs()
    weights = weights / weights.sum()
    compute = torch.promote_types(dtype, torch.float32)
    out = [torch.empty_like(base)] if name.endswith(".out") else []
    factors = [random(2, m, 3, dtype=compute), random(2, 3, n, dtype=compute), weights]
    return {
        "task_gram": ([base, base[:2]], [experts[0], experts[0][:2], experts[1], experts[1][:2]]),
        "residual_matmul": (base, experts, mixing, random(2, n, 3, dtype=compute), False, "ieee"),
        "orthonormalize": (random(2, m + n, n, dtype=dtype),),
        "combine": (base, experts, core, *out, *factors),
        "combine_rows": (base, experts, core, mixing, weights, weights, 0.7, 3.0, *out),
        "match_columns": (base, experts, experts[0].to(compute), weights, *out),
    }[name.removesuffix(".out")]


def elsewhere(given, device):
    """Tensors of the same shapes, without data where a device is ``meta`` or one is not there."""
    return tree_map_only(torch.Tensor, lambda one: torch.empty(one.shape, dtype=one.dtype, device=device), given)


def result(name, given, backend):
    """What an operator returns or writes."""
    found = _operators.CALLS[name](*given, backend)
    return next(one for one in given[::-1] if isinstance(one, torch.Tensor)) if found is None else found


CHECKED = [
    pytest.param(name, backend, dtype, marks=pytest.mark.slow if slow else ())
    for name in NAMES
    for backend in BACKENDS
    for dtype in DTYPES
    for slow in [dtype != torch.float32 or backend != "native"]
]


@pytest.mark.parametrize(("name", "backend", "dtype"), CHECKED, ids=str)
def test_opcheck(name, backend, dtype):
    torch.library.opcheck(_operators.CALLS[name], (*arguments(name, dtype=dtype), backend))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_lie_as_tensors_without_data_say(backend, transpose):
    # A compiled program takes a result by the strides that it was promised.
    base, experts, mixing, rhs, *_ = arguments("residual_matmul", (9, 7))
    rhs = torch.randn(2, 9, 4) if transpose else rhs
    tall = torch.randn(2, 4, 50).mT
    for name, given in (("residual_matmul", (base, experts, mixing, rhs, transpose)), ("orthonormalize", (tall,))):
        with FakeTensorMode() as mode:
            promised = _operators.CALLS[name](*tree_map_only(torch.Tensor, mode.from_tensor, given))
        found = _operators.CALLS[name](*given, backend=backend)
        assert (found.shape, found.dtype, found.stride()) == (promised.shape, promised.dtype, promised.stride())


def test_on_a_gpu_results_lie_as_kernels_write_them():
    y = torch.randn(3, 40, 6)
    with FakeTensorMode():
        promised = ops.orthonormalize(torch.empty(y.shape, device="cuda"), backend="triton")
    assert promised.device.type == "cuda"
    assert promised.stride() == _triton.orthonormalize(y).stride()
    base, experts, mixing, rhs, *_ = arguments("residual_matmul", (9, 7))
    found = _triton.residual_matmul([base], [[one] for one in experts], mixing, rhs.unsqueeze(0))[0]
    with FakeTensorMode():
        given = elsewhere((base, experts, mixing, rhs), "cuda")
        promised = _operators.CALLS["residual_matmul"](*given, backend="triton")
    assert (promised.shape, promised.stride()) == (found.shape, found.stride())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "device"), [("auto", "meta"), ("triton", "cuda"), ("native", "cpu")])
def test_tensors_without_data(name, backend, device):
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        promised = result(name, elsewhere(arguments(name), device), backend)
    real = result(name, arguments(name), "torch")
    assert (promised.shape, promised.dtype) == (real.shape, real.dtype)
    of_gram = "meta" if device == "meta" else "cpu"
    assert promised.device.type == (of_gram if name == "task_gram" else device)


def test_tensors_without_data_are_checked_as_others():
    base, core = torch.empty(4, 3, device="meta"), torch.empty(2, device="meta")
    with pytest.raises(InvalidInput, match=r"^core: expected shape \(1,\), got \(2,\)$"):
        ops.combine(base, [base], core)
    with pytest.raises(InvalidInput, match=r"^backend: expected one of 'auto', .* got 'tritn'; did you mean 'triton'"):
        ops.orthonormalize(base, backend="tritn")
    with pytest.raises(InvalidInput, match=r"^tensors of all experts: expected 4, got 3$"):
        torch.ops.r2m.task_gram([base, base], [base, base, base])


def everything(base, experts, core, mixing, weights, left, right, backend):
    """All operators, by the functions for people, one made of another's result."""
    gram = ops.task_gram([base], [[one] for one in experts], backend=backend)[0]
    merged = ops.combine(base, experts, core, left, right, weights, backend=backend)
    by_rows = ops.combine_rows(base, experts, core, mixing, weights, weights, 0.7, 3.0, backend=backend)
    matched = ops.match_columns(base, experts, by_rows + merged, weights, backend=backend)
    products = ops.residual_matmul(base, experts, mixing, right.mT, backend=backend)
    ops.combine(base, experts, core, out=merged, backend=backend)
    return gram, merged, by_rows, matched, ops.orthonormalize(products, backend=backend) + products


def of_everything(shape):
    base, experts, core, left, right, weights = arguments("combine", shape)
    return base, experts, core, torch.eye(2, dtype=torch.float64) - 0.4, weights, left, right


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the compiler's own imports
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_one_graph_for_all_shapes_with_the_bits_of_eager(backend, inductor):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if inductor else "aot_eager")
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for shape in ((6, 5), (40, 7), (7, 40), (300, 200)):
        given = (*of_everything(shape), backend)
        for found, expected in zip(compiled(*given), everything(*given), strict=True):
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # the first shape's is the last


def test_a_program_for_a_gpu_is_captured_without_one():
    with FakeTensorMode():
        given = elsewhere(of_everything((40, 30)), "cuda")
        program = torch.export.export(Module("triton"), given)
    targets = [str(node.target) for node in program.graph.nodes if "r2m" in str(node.target)]
    expected = [f"r2m.{name}" for name in NAMES if name not in ("combine_rows.out", "match_columns.out")]
    assert sorted({name.removesuffix(".default") for name in targets}) == sorted(expected)
    devices = [node.meta["val"].device.type for node in program.graph.nodes if "combine_rows" in node.name]
    assert devices == ["cuda"]


class Module(torch.nn.Module):
    """A small one that calls them."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, base, experts, core, mixing, weights, left, right):
        return everything(base, experts, core, mixing, weights, left, right, self.backend)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.slow)])
def test_an_exported_program_is_stored_and_run(backend):
    given = of_everything((40, 30))
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(backend), given), file)
    file.seek(0)
    found = torch.export.load(file).module()(*given)
    assert all(map(torch.equal, found, everything(*given, backend)))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_thread_has_switched_on_does_not_reach_an_operator(name):
    given = arguments(name, (30, 20))
    expected = result(name, given, "torch").clone()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert torch.equal(result(name, given, "torch"), expected)
    with torch.inference_mode():
        found = result(name, given, "torch")
        assert torch.equal(found, expected)
        assert not found.is_inference()


def test_inputs_of_any_layout_give_the_same_bits_compiled():
    torch._dynamo.reset()
    base, experts, mixing, rhs, *_ = arguments("residual_matmul", (40, 30))
    tall = padded(rhs.mT.contiguous()).mT  # strides that a library's product takes as they are
    given = (padded(base), [padded(one.T.contiguous()).T for one in experts], mixing, tall)
    compiled = torch.compile(ops.residual_matmul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given, backend="torch"), ops.residual_matmul(*given, backend="torch"))


def test_a_second_copy_has_operators_of_its_own():
    name, path = "another_copy", r2m_kernels.__file__
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(Path(path).parent)])
    copy = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(copy)
        one = torch.ones(2, 2)
        assert copy.ops.combine is not ops.combine
        found = torch.ops.another_copy.combine(one, [one], one[0, :1])
        assert torch.equal(found, torch.ops.r2m.combine(one, [one], one[0, :1]))
    finally:
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
            del sys.modules[loaded]
