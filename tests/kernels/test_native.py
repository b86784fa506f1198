"""The C++ kernels: every variant that this CPU runs, rounding bit by bit, and which library is taken or refused."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess

import pytest
import torch
from cases import checkpoints, distance, padded, same_bits

from r2m_kernels import BackendUnavailable, InvalidInput, MergeConfig, _backends, _native, _torch, analyze, merge, ops
from r2m_kernels._native import library
from r2m_kernels._native.residuals import NativeResiduals
from r2m_kernels._torch.residuals import Residuals, SignMatrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (5, 7), (64, 1030), (1030, 64), (33, 515), (170, 300)]
CPU = torch.device("cpu")
# Of this kind of machine: nobody waits for another's.
VARIANTS = [
    name for name in library.VARIANTS if name == "portable" or (name == "neon") == (platform.machine() == "aarch64")
]


@pytest.fixture(params=VARIANTS)
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
        dense = signs.dense(slice(0, max(shape))).double()
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
    exact = (tau.unsqueeze(1) * tau).sum(dim=-1)  # in a tree; a BLAS sums thousands of terms one after another
    assert ((gram - exact).abs() <= 16 * unit * tau.abs() @ tau.abs().T).all()
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


def multiplied(left, right, out):
    depth, rows = left.shape
    matrices = [library.matrices([one]) for one in (left, right, out)]
    library.load().call("r2m_multiply_bfloat16", torch.float32, depth, *matrices[:2], rows, right.shape[1], matrices[2])
    return out


multiplies = pytest.mark.skipif(
    not library.load().multiplies_bfloat16, reason="this CPU has no instructions for bfloat16 products"
)


@multiplies
@pytest.mark.parametrize("around", [fenced, padded], ids=["contiguous", "strided"])
@pytest.mark.parametrize(
    ("depth", "rows", "columns"),
    [(1, 1, 1), (2, 12, 32), (3, 13, 33), (7, 1, 65), (64, 30, 5), (1023, 25, 47), (1024, 12, 64), (2051, 40, 70)],
)
def test_products_of_bfloat16_have_float_sums(depth, rows, columns, around):
    generator = torch.Generator().manual_seed(depth)
    left, right = (around(torch.randn(depth, size, generator=generator).to(torch.bfloat16)) for size in (rows, columns))
    buffer = torch.full((rows + 2, columns + 3), 7.0)
    found = multiplied(left, right, buffer[1:-1, 1 : columns + 1])
    exact, magnitude = left.double().T @ right.double(), left.double().abs().T @ right.double().abs()
    # Of a product nothing is rounded.
    assert ((found - exact).abs() <= depth * 2.0**-24 * magnitude).all()
    found.fill_(7.0)
    assert (buffer == 7.0).all()
    assert multiplied(left, right * math.nan, buffer[1:-1, 1 : columns + 1]).isnan().all()


@multiplies
def test_a_product_of_some_rows_and_columns_has_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1100, size, generator=generator).to(torch.bfloat16) for size in (70, 130))
    whole = multiplied(left, right, torch.empty(70, 130))
    for rows, columns in ((slice(5, 6), slice(64, 97)), (slice(11, 70), slice(1, 130)), (slice(0, 13), slice(0, 31))):
        size = rows.stop - rows.start, columns.stop - columns.start
        assert torch.equal(multiplied(left[:, rows], right[:, columns], torch.empty(size)), whole[rows, columns])
    # More terms that are zero change nothing either: an odd number is one of pairs.
    longer = [torch.cat([one, torch.zeros(1, one.shape[1], dtype=one.dtype)]) for one in (left, right)]
    assert torch.equal(multiplied(*longer, torch.empty(70, 130)), whole)


@pytest.mark.parametrize("fast", [True, False], ids=["of bfloat16", "widened"])
@pytest.mark.parametrize("around", [fenced, padded], ids=["contiguous", "strided"])
def test_factors_in_bfloat16(fast, around, monkeypatch):
    if fast and not library.load().multiplies_bfloat16:
        pytest.skip("this CPU has no instructions for bfloat16 products")
    monkeypatch.setattr(library.load(), "multiplies_bfloat16", fast)
    (m, n), rank = (300, 1100), 37
    base, experts = inputs((m, n), torch.float32)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.stack([around(0.1 * torch.randn(size, generator=generator).to(torch.bfloat16)) for _ in range(3)])
        for size in ((rank, m), (rank, n))
    )
    core = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
    tau = torch.stack([expert.double() - base.double() for expert in experts])
    out, squares = torch.empty(m, n, dtype=torch.float64), []
    operators = _backends.choose("native", CPU).operators
    operators.combine([base], [[one] for one in experts], core, left.mT[None], right[None], None, [out], squares)
    products = left.double().mT @ right.double()
    exact = base.double() + torch.tensordot(core, tau, 1) + products.sum(0)
    magnitude = (
        base.double().abs()
        + torch.tensordot(core, tau.abs(), 1)
        + (left.abs().double().mT @ right.abs().double()).sum(0)
    )
    assert ((out - exact).abs() <= (3 * rank + 8) * 2.0**-24 * magnitude).all()
    assert float(squares[0].sum()) == pytest.approx(float(products.sum(0).square().sum()), rel=1e-5)


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


def group_of(shape, dtype, around=fenced):
    base, experts = inputs(shape, dtype, around=around)
    return [base], [[expert] for expert in experts]


def written_by(operators, name, arguments, shape, dtype, **more):
    """What an operator writes, between sentinels, and how large it says that is."""
    buffer = torch.full((math.prod(shape) + 2,), 7.0, dtype=dtype)
    out = buffer[1:-1].view(shape)
    largest = getattr(operators, name)(*arguments, **more, outs=[out])
    assert float(buffer[0]) == float(buffer[-1]) == 7.0
    assert float(largest) == float(out.abs().double().max())
    return out.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("around", [fenced, padded], ids=["contiguous", "strided"])
def test_gram_matrices_of_rows(variant, shape, dtype, around):
    for count in (1, 3, 6):
        base, experts = inputs(shape, dtype, count, around)
        found = _native.row_grams([base], [[expert] for expert in experts])
        tau = torch.stack([expert.double() - base.double() for expert in experts])
        for i in range(count):
            for j in range(i + 1):
                exact = (tau[i] * tau[j]).sum(1)
                # Differences and products are rounded in double, and so are the sums.
                bound = (2 * shape[1] + 4) * 2.0**-53 * (tau[i] * tau[j]).abs().sum(1)
                assert ((found.rows[0, i * (i + 1) // 2 + j] - exact).abs() <= bound).all()
        assert float(found.base) == pytest.approx(float(base.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coefficients_of_rows(variant, dtype):
    base, experts = inputs((33, 51), torch.float32, 4)
    base[5], experts[2][5] = 0.0, 0.0
    for expert in experts:
        expert[7] = base[7]  # nobody has a residual there
    rows = _native.row_grams([base], [[expert] for expert in experts]).rows
    numbers = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = numbers[0] / numbers[0].sum()
    rule = (numbers[1], torch.eye(4, dtype=torch.float64) - numbers, weights, numbers[3], 0.7, 3.0)
    ours, plain = (operators.row_coefficients(rows, *rule, dtype) for operators in (_native, _torch))
    assert ours.dtype == dtype
    # A power of 3 of square roots of sums of 16 products: rounded in double, then once.
    assert ((ours - plain).abs() <= (2.0**-23 if dtype == torch.float32 else 2.0**-44) * plain.abs().max()).all()
    nobody = rule[0] + 0.7 * rule[1] @ weights
    assert torch.allclose(ours[0, 7].double(), nobody, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("around", [fenced, padded], ids=["contiguous", "strided"])
def test_elements_that_ties_and_dare_leave(variant, shape, dtype, around):
    bases, experts = group_of(shape, dtype, around)
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    # Task vectors are the same to the bit, and so is what is counted of them and kept.
    counts = {}
    for operators in (_native, _torch):
        counts[operators] = torch.zeros(2, 3, 2**16, dtype=torch.int64)
        operators.count_magnitudes(bases, experts, None, counts[operators][0])
        upper = counts[operators][0].argmax(dim=1)
        operators.count_magnitudes(bases, experts, upper, counts[operators][1])
    assert torch.equal(counts[_native], counts[_torch])
    assert int(counts[_native][0].sum()) == 3 * math.prod(shape)
    # No sum of a few 16-bit numbers, times these, cancels to rounding, which has a sign of either.
    weights = torch.tensor([0.50317, 0.21179, 0.28504], dtype=torch.float64)
    thresholds = torch.tensor([0.05, 0.1, 0.0])
    keys = torch.tensor([[3, -(2**62), 2**61 + 5]])
    for name, rule in (("combine_ties", (0.8, thresholds)), ("combine_dare", (0.8, 0.3, keys, 11))):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ours, plain = (
            written_by(operators, name, (bases, experts, weights, *rule), shape, wide)
            for operators in (_native, _torch)
        )
        size = bases[0].double().abs() + sum((e[0].double() - bases[0].double()).abs() for e in experts) / 0.3
        assert ((ours - plain).abs() <= 12 * unit * size).all()
        if wide == torch.float32:  # torch rounds float64 to bfloat16 twice
            rounded = written_by(_native, name, (bases, experts, weights, *rule), shape, torch.bfloat16)
            assert torch.equal(rounded, ours.bfloat16().double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("around", [fenced, padded], ids=["contiguous", "strided"])
def test_sums_means_and_columns(variant, shape, dtype, around):
    bases, experts = group_of(shape, dtype, around)
    base, tau = bases[0].double(), torch.stack([expert[0].double() - bases[0].double() for expert in experts])
    unit, weights = (2.0**-53 if dtype == torch.float64 else 2.0**-24), torch.tensor([0.5, -0.2, 0.7]).double()
    mean = written_by(_native, "mean", (experts, weights), shape, torch.float64)
    thetas = tau + base
    assert ((mean - torch.einsum("j,jmn->mn", weights, thetas)).abs() <= 2.0**-50 * thetas.abs().sum(0)).all()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    change = _native.weighted_sum(bases, experts, weights, wide)
    exact = torch.einsum("j,jmn->mn", weights, tau)
    assert change.dtype == wide
    assert change.shape == (1, *shape)
    assert ((change[0] - exact).abs() <= 5 * unit * tau.abs().sum(0)).all()
    added = written_by(_native, "add", (bases, change), shape, wide)
    assert ((added - (base + change[0])).abs() <= unit * (base.abs() + change[0].abs())).all()
    counts = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    merged = (base + exact).to(wide)
    ours, plain = (
        written_by(operators, "match_columns", (bases, experts, [merged.clone()], counts), shape, wide)
        for operators in (_native, _torch)
    )
    assert ((ours - plain).abs() <= 16 * unit * (base.abs() + 4 * tau.abs().sum(0) + 4 * exact.abs())).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_writes_tells_of_nan_and_inf(variant, bad):
    for position in (0, 130, 299):
        bases, experts = group_of((1, 300), torch.float32)
        experts[1][0][0, position] = bad
        weights, out = torch.full((3,), 1 / 3, dtype=torch.float64), torch.empty(1, 300)
        keys = torch.zeros(1, 3, dtype=torch.int64)
        told = [
            _native.combine(bases, experts, weights, None, None, None, [out]),
            _native.combine_ties(bases, experts, weights, 1.0, torch.zeros(3), [out]),
            _native.combine_dare(bases, experts, weights, 1.0, 0.5, keys, 0, [out]),
            _native.mean(experts, weights, [out]),
        ]
        assert not any(bool(torch.isfinite(one).any()) for one in told)
    large = torch.full((1, 4), 6e4)
    half = torch.empty(1, 4, dtype=torch.float16)
    assert float(_native.combine([large], [[2 * large]], torch.ones(1).double(), None, None, None, [half])) == math.inf


HALVES = torch.zeros(8, 8, dtype=torch.bfloat16)


def calls_with(size, matrices, numbers):
    """Arguments of each function that read nothing, and whose offsets in bytes int64 does not hold."""
    run = (size, size)
    return {
        "r2m_task_gram": (1, matrices, *run, numbers, numbers),
        "r2m_row_grams": (1, matrices, 0, size, numbers, 0, numbers),
        "r2m_row_coefficients": (1, numbers, size, 0, numbers, numbers, numbers, numbers, 1.0, 1.0, numbers),
        "r2m_weigh_rows": (1, numbers, size, 0, numbers, numbers, 1.0, numbers, size, matrices, matrices),
        "r2m_residual": (1, matrices, numbers, size, 0, 0, 0, matrices),
        "r2m_combine": (1, matrices, numbers, 0, 0, size, None, matrices, numbers),
        "r2m_count_magnitudes": (1, matrices, *run, None, numbers),
        "r2m_combine_ties": (1, matrices, numbers, numbers, 1.0, *run, matrices, numbers),
        "r2m_combine_dare": (1, matrices, numbers, numbers, 1.0, 1.0, size, 0, 0, matrices, numbers),
        "r2m_mean": (1, matrices, numbers, *run, matrices, numbers),
        "r2m_scale_columns": (matrices, matrices, numbers, 0, size, matrices, numbers),
        "r2m_weighted_sum": (1, matrices, numbers, 0, size, matrices),
        "r2m_multiply_bfloat16": (size, *[library.matrices([HALVES])] * 2, 0, 0, matrices),
        # These would read or write: in a process whose tests are all done it would end.
        "r2m_column_squares": (2**20, matrices, 0, size, matrices, numbers),
        "r2m_sketch": (1, matrices, numbers, 0, 0, 0, 0, size, 0, numbers, numbers, matrices, numbers),
    }


@pytest.mark.parametrize("size", [2**60 + 1, 2**62, 2**63 - 1])
@pytest.mark.parametrize("name", sorted(set(library.DECLARED) - {"r2m_abi_version", "r2m_capabilities"}))
def test_sizes_whose_bytes_cannot_be_counted_are_refused(name, size):
    matrices, numbers = library.matrices([torch.zeros(8, 8)] * 2), torch.zeros(64, dtype=torch.float64).data_ptr()
    with pytest.raises(RuntimeError, match=f"{name}: bad argument"):
        library.load().call(name, torch.float32, *calls_with(size, matrices, numbers)[name])


def test_strides_whose_bytes_cannot_be_counted_are_refused():
    matrices, numbers = library.matrices([torch.zeros(8, 8)] * 2), torch.zeros(64, dtype=torch.float64).data_ptr()
    for stride in (2**60, 2**62, -(2**63)):
        matrices[1].row_stride = stride
        with pytest.raises(RuntimeError, match="bad argument"):
            library.load().call("r2m_weighted_sum", torch.float32, 1, matrices, numbers, 5, 0, matrices)


@pytest.mark.parametrize(("width", "long"), [(2**61, 8), (16, 2**61), (2**63 - 1, 2**63 - 1)])
def test_sketches_beyond_memory_are_refused(width, long):
    base = torch.zeros(8, 8)
    entries, numbers = library.matrices([base, base]), torch.zeros(64)
    offsets, energy = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="bad argument"):
        library.load().call(
            *("r2m_sketch", torch.float32, 1, entries, numbers.data_ptr(), 8, 0, 8, 0, width, long),
            *(offsets.data_ptr(), numbers.data_ptr(), library.matrices([base]), energy.data_ptr()),
        )


@pytest.mark.parametrize("count", [2**20 + 1, 2**31, 2**62])
def test_more_experts_than_pairs_can_be_counted_of_are_refused(count):
    # No rows: what is not refused reads nothing.
    numbers = [torch.zeros(8, dtype=torch.float64).data_ptr()] * 4
    with pytest.raises(RuntimeError, match="bad argument"):
        library.load().call(
            *("r2m_row_coefficients", torch.float32, count, numbers[0], 0, 0, *numbers, 1.0, 3.0, numbers[0])
        )
