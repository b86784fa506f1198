"""The C++ kernels: every variant that this CPU runs, rounding bit by bit, and which library is taken or refused."""

from __future__ import annotations

import math
import os
import re
import subprocess

import pytest
import torch
from cases import checkpoints, distance, padded, same_bits

from r2m_kernels import BackendUnavailable, InvalidInput, MergeConfig, _backends, analyze, merge, ops
from r2m_kernels._native import library
from r2m_kernels._native.residuals import NativeResiduals
from r2m_kernels._torch.residuals import Residuals, SignMatrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (5, 7), (64, 1030), (1030, 64), (33, 515), (170, 300)]
CPU = torch.device("cpu")


@pytest.fixture(params=library.VARIANTS)
def variant(request, monkeypatch):
    """Every variant in turn; those that this CPU has no instructions for are skipped."""
    index = library.VARIANTS.index(request.param)
    loaded = library.load()
    if index not in loaded.variants:
        pytest.skip(f"this CPU does not run the {request.param} kernels")
    monkeypatch.setattr(loaded, "variant", index)
    return request.param


def fenced(tensor):
    """The same values, contiguous, with NaN before and after: read where they lie, and never beyond."""
    buffer = tensor.new_full((tensor.numel() + 128,), math.nan)
    buffer[64 : 64 + tensor.numel()] = tensor.flatten()
    return buffer[64 : 64 + tensor.numel()].view(tensor.shape)


def inputs(shape, dtype, count=3, around=fenced):
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    experts = [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return around(base.to(dtype)), [around(expert.to(dtype)) for expert in experts]


def residuals_of(shape, dtype, around):
    base, experts = inputs(shape, dtype, around=around)
    mixing = torch.eye(3, dtype=torch.float64) - 0.3
    tau = torch.stack([expert.double() - base.double() for expert in experts])
    exact = torch.einsum("ji,jmn->imn", mixing, tau)
    magnitude = torch.einsum("ji,jmn->imn", mixing.abs(), tau.abs())
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return base, experts, mixing, exact, magnitude, unit


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("around", [fenced, padded], ids=["contiguous", "strided"])
def test_blocks_of_residuals(variant, shape, dtype, around):
    base, experts, mixing, exact, magnitude, unit = residuals_of(shape, dtype, around)
    residuals = NativeResiduals.of(base, experts, mixing)
    rows, columns = slice(shape[0] // 3, None), slice(shape[1] // 4, shape[1] - shape[1] // 5)
    block = residuals.block(rows, columns)
    # One rounding of a difference, and one of each of three fused products.
    assert ((block - exact[:, rows, columns]).abs() <= 5 * unit * magnitude[:, rows, columns]).all()
    if dtype != torch.float64:
        assert torch.equal(residuals.block(rows, columns, torch.bfloat16), block.bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("around", [fenced, padded], ids=["contiguous", "strided"])
def test_sketches_and_energies(variant, shape, dtype, around):
    base, experts, mixing, exact, magnitude, unit = residuals_of(shape, dtype, around)
    residuals = NativeResiduals.of(base, experts, mixing)
    for width in (16, 48):
        signs = SignMatrix.random(7, max(shape), width, residuals.dtype)
        sketch, energy = residuals.sketch(signs)
        dense = signs.dense().double()
        tall = shape[0] >= shape[1]
        long = exact if tall else exact.mT
        bound = dense.abs().T @ (magnitude if tall else magnitude.mT)
        terms = 4 * (max(shape) // width + 1) + 5  # the length of a sum, and the roundings of its terms
        assert ((sketch - dense.T @ long).abs() <= terms * unit * bound).all()
        # Squares are of rounded residuals, which cancel where magnitudes do not.
        squares = exact.square().sum(dim=(1, 2))
        summing = math.prod(shape) * 2.0**-53
        assert ((energy - squares).abs() <= (12 * unit + summing) * magnitude.square().sum(dim=(1, 2))).all()
        ours, theirs = sketch, Residuals.of(base, experts, mixing).sketch(signs)[0]
        assert ((ours - theirs).abs() <= 2 * terms * unit * bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 127, 128, 513, 4099])
def test_gram_and_combine(variant, dtype, elements):
    base, experts = inputs((elements,), dtype, count=5)
    tau = torch.stack([expert.double() - base.double() for expert in experts])
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    gram = ops.task_gram([base], [[expert] for expert in experts], backend="native")[0]
    assert ((gram - tau @ tau.T).abs() <= 16 * unit * tau.abs() @ tau.abs().T).all()
    core = torch.tensor([0.5, 0.0, -0.2, 0.3, 1.0], dtype=torch.float64)
    merged = ops.combine(base, experts, core, out=torch.empty(elements, dtype=torch.float64), backend="native")
    exact = base.double() + core @ tau
    assert ((merged - exact).abs() <= 8 * unit * (base.double().abs() + core.abs() @ tau.abs())).all()


def converted(values, dtype):
    """``values`` through combine with a coefficient of zero: read, widened and rounded, nothing else."""
    out = torch.empty(values.shape, dtype=dtype)
    return ops.combine(values, [values], torch.zeros(1), out=out, backend="native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_widened_exactly_and_comes_back(variant, dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = converted(values, torch.float32)
    finite = ~values.isnan()
    assert torch.equal(wide[finite].view(torch.int32), values.float()[finite].view(torch.int32))
    assert wide[~finite].isnan().all()
    back = converted(wide, dtype)
    assert torch.equal(back[finite].view(torch.int16), values[finite].view(torch.int16))
    assert back[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_is_rounded_to_the_nearest_even(variant, dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    following = torch.nextafter(values.to(dtype), torch.full_like(values, math.inf).to(dtype)).float()
    ties = values + (following - values) / 2
    ties = ties[ties.isfinite()]
    near = [ties, torch.nextafter(ties, torch.full_like(ties, math.inf)), torch.nextafter(ties, -ties.abs() - 1)]
    near = torch.cat([*near, torch.tensor([65519.996, 65520.0, 1e38, -1e38, math.inf, -math.inf, 0.0, -0.0])])
    assert torch.equal(converted(near, dtype).view(torch.int16), near.to(dtype).view(torch.int16))


def test_float64_is_rounded_once(variant):
    tie = 1 + 2.0**-8  # between two bfloat16; float32 cannot hold what lies just above or below
    values = torch.tensor([tie, tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40, 3.0, 1e300], dtype=torch.float64)
    expected = torch.tensor([1.0, 1 + 2.0**-7, 1.0, -1 - 2.0**-7, 3.0, math.inf])
    assert torch.equal(converted(values, torch.bfloat16).float(), expected)
    tie = 1 + 2.0**-11
    values = torch.tensor([tie, tie + 2.0**-40, tie - 2.0**-40, 0.0], dtype=torch.float64)
    assert torch.equal(converted(values, torch.float16).float(), torch.tensor([1.0, 1 + 2.0**-10, 1.0, 0.0]))


@pytest.mark.parametrize("options", [{}, {"svd": "exact"}, {"svd": "textbook"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_is_the_torch_backends(options, dtype, monkeypatch):
    # Without bfloat16 products, so that both backends do the same arithmetic.
    monkeypatch.setattr(library.load(), "multiplies_bfloat16", False)
    base, experts = checkpoints(3, dtype=dtype, shapes={"a": (300, 200), "b": (140, 30, 9), "c": (90,), "d": (33, 47)})
    # Into float32: the difference is that of the arithmetic, and not a rounding to 16 bits.
    native, portable = (
        merge(base, experts, backend=backend, dtype=torch.float32, **options) for backend in ("native", "torch")
    )
    assert distance(native, portable) <= 2e-4 * distance(base, portable)


SIZES = {"wide": (300, 5000), "tall": (5000, 300), "square": (700, 700), "vector": (3_000_000,), "small": (90, 80)}


@pytest.mark.parametrize("config", [MergeConfig(), MergeConfig.weight_average()], ids=["r2m", "weight average"])
@pytest.mark.parametrize("names", [("wide",), ("tall",), tuple(SIZES)], ids=str)
def test_the_same_bits_on_any_number_of_threads(config, names):
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(SIZES[name], generator=generator) for name in names}
    experts = [{n: t + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(2)]
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found.append(merge(base, experts, config, backend="native"))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def compiled(source, path):
    path.with_suffix(".c").write_text(source)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, path.with_suffix(".c")], check=True)
    return path


def test_auto_takes_it_and_says_which_kernels():
    chosen = _backends.choose("auto", CPU)
    assert chosen.name == "native"
    assert chosen.reason == f"the fastest one for cpu ({library.VARIANTS[library.load().variant]} kernels)"
    report = analyze({"w": torch.ones(3, 3)}, [{"w": torch.zeros(3, 3)}]).report()
    assert report["backend"] == {"name": "native", "reason": chosen.reason, "device": "cpu"}


def test_it_runs_on_cpus_alone():
    with pytest.raises(BackendUnavailable, match="backend 'native' runs on CPUs and not on 'cuda'"):
        _backends.choose("native", torch.device("cuda"))


def test_a_library_of_another_abi_is_refused(tmp_path, monkeypatch):
    stale = compiled("int r2m_abi_version(void) { return 0; }", tmp_path / "stale.so")
    monkeypatch.setenv("R2M_NATIVE_LIBRARY", str(stale))
    sentence = f"has ABI 0, and this version of r2m_kernels needs {library.ABI_VERSION}; install the package again"
    with pytest.raises(BackendUnavailable, match=f"backend 'native': the native library '.*stale.so' {sentence}"):
        _backends.choose("native", CPU)
    chosen = _backends.choose("auto", CPU)
    assert chosen.name == "torch"
    assert sentence in chosen.reason


@pytest.mark.parametrize("kind", ["foreign", "lacking", "text", "missing"])
def test_what_is_no_library_of_ours_is_refused(kind, tmp_path, monkeypatch):
    path = tmp_path / "other.so"
    if kind == "foreign":
        compiled("int something_else(void) { return 1; }", path)
    elif kind == "lacking":
        one = (
            f"int r2m_abi_version(void) {{ return {library.ABI_VERSION}; }} int r2m_capabilities(void) {{ return 1; }}"
        )
        compiled(one, path)
    elif kind == "text":
        path.write_text("not a library")
    monkeypatch.setenv("R2M_NATIVE_LIBRARY", str(path))
    sentence = {
        "foreign": "is not the native library of r2m_kernels",
        "lacking": "lacks r2m_[a-z_]+; install the package again",
        "text": "cannot be loaded",
        "missing": "is missing: there is no such file",
    }[kind]
    with pytest.raises(BackendUnavailable, match=sentence):
        ops.orthonormalize(torch.ones(3, 2), backend="native")
    assert re.search(sentence, _backends.choose("auto", CPU).reason)


def test_the_policy(tmp_path, monkeypatch):
    monkeypatch.setenv("R2M_NATIVE", "off")
    assert _backends.choose("auto", CPU).reason == "the native kernels are switched off by R2M_NATIVE=off"
    with pytest.raises(BackendUnavailable, match="backend 'native': the native kernels are switched off"):
        _backends.choose("native", CPU)
    monkeypatch.setenv("R2M_NATIVE", "require")
    assert _backends.choose("auto", CPU).name == "native"
    monkeypatch.setenv("R2M_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendUnavailable, match=r"backend 'native': the native library '.*none\.so' is missing"):
        _backends.choose("auto", CPU)
    assert _backends.choose("torch", CPU).name == "torch"
    monkeypatch.setenv("R2M_NATIVE", "on")
    with pytest.raises(InvalidInput, match="R2M_NATIVE: expected one of 'auto', 'require', 'off', got 'on'"):
        _backends.choose("auto", CPU)


@pytest.mark.parametrize("number", [-1, 0, 1])
@pytest.mark.parametrize("name", library.DECLARED)
def test_the_library_refuses_what_is_no_argument(name, number):
    arguments = [None if kind is library.POINTER else number for kind in library.DECLARED[name]]
    with pytest.raises(RuntimeError, match=f"{name}: bad argument"):
        library.load().call(name, torch.float32, *arguments)
