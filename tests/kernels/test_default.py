"""The default against another writing of it in float64, from its definition alone, on inputs like fine-tuned ones."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ALIKE, distance

from r2m_kernels import MergeConfig, merge

SHAPES = {
    "patch_embed.proj.weight": (96, 3, 8, 8),
    "patch_embed.depthwise.weight": (96, 1, 3, 3),
    "cls_token": (1, 1, 96),
    "blocks.0.norm1.weight": (96,),
    "blocks.0.attn.qkv.weight": (288, 96),
    "blocks.0.attn.qkv.bias": (288,),
    "blocks.0.attn.proj.weight": (96, 96),
    "blocks.0.mlp.fc1.weight": (384, 96),
    "blocks.0.mlp.fc2.weight": (96, 384),
    "bn.running_mean": (96,),
    "bn.running_var": (96,),
    "head.weight": (2, 96),
    "head.bias": (2,),
}
SMALLEST = "patch_embed.depthwise.weight"
HEAD, STATISTICS = ("head.weight", "head.bias"), ("bn.running_mean", "bn.running_var")
# For Triton's interpreter, which is slow: beyond 64, below which every truncation is exact, and far below.
SIDES = {"randomized": (96, 72), "exact": (24, 20)}
FEW = {"depthwise.weight": (20, 1, 3, 3), "norm.weight": (72,), "head.weight": (2, 30), "head.bias": (2,)}
SMALL = {svd: {"blocks.0.attn.proj.weight": shape, **FEW} for svd, shape in SIDES.items()}


def fine_tuned(count, dtype=torch.float32, shapes=SHAPES, rough=0.02):
    """A base, and experts about 1 % away: some shared, a low-rank part of their own, and noise; the head further."""
    generator = torch.Generator().manual_seed(count)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def change(shape):
        if len(shape) < 2:
            return noise(*shape)
        m, n = shape[0], math.prod(shape[1:])
        own = noise(m, 6) @ torch.diag(0.6 ** torch.arange(6.0, dtype=torch.float64)) @ noise(6, n)
        return (own + rough * noise(m, n)).view(shape)

    base = {name: 0.02 * noise(*shape) for name, shape in shapes.items()}
    for name in STATISTICS:
        if name in base:
            base[name] = 1 + base[name].abs()
    experts = [{} for _ in range(count)]
    for name, tensor in base.items():
        shared = change(tensor.shape)
        for j, expert in enumerate(experts):
            moved = 0.4 * shared + (1 + 0.3 * j) * change(tensor.shape)
            far = 0.5 if name in HEAD else 0.01
            expert[name] = (tensor + far * moved * tensor.norm() / moved.norm()).to(dtype)
    return {name: tensor.to(dtype) for name, tensor in base.items()}, experts


def trunk(state):
    """Without the head, whose update is the longest by far."""
    return {name: tensor for name, tensor in state.items() if name not in HEAD}


def written_again(base, experts, share=0.4, power=3, small=16):
    """The default in float64: nothing of it is shared with the package or its reference.

    Residuals of matrices are cut to a ``share`` of their short side, but for those of up to ``small``, and weigh in
    every row by the ``power`` of their length there; without a power by one number for all rows.
    """
    count = len(experts)
    tau = [{name: (one[name].double() - base[name].double()) for name in base} for one in experts]
    matrices = [name for name in base if base[name].ndim > 1 and name not in HEAD]
    vectors = [name for name in base if base[name].ndim < 2 and name not in (*HEAD, *STATISTICS)]
    mean = {name: sum(one[name] for one in tau) / count for name in base}

    gram = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            gram[i, j] = sum((tau[i][name] * tau[j][name]).sum() for name in matrices)
    values, directions = torch.linalg.eigh(gram)
    top = directions[:, -1]
    coefficients = top * float(top @ gram @ torch.ones(count, dtype=torch.float64)) / count / float(values[-1])
    core = {name: sum(c * one[name] for c, one in zip(coefficients.tolist(), tau, strict=True)) for name in matrices}

    length_of_mean = math.sqrt(sum(float(mean[name].square().sum()) for name in matrices))
    lengths = [math.sqrt(sum(float(one[name].square().sum()) for name in matrices)) for one in tau]
    restored = math.sqrt(sum(lengths) / count / length_of_mean)

    residuals = []
    for one in tau:
        own = {name: one[name] - mean[name] for name in vectors}
        for name in matrices:
            matrix = (one[name] - core[name]).flatten(1)
            side = min(matrix.shape)
            rank = side if side <= small else max(1, math.ceil(round(side * share, 9)))
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            own[name] = (u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]).view(base[name].shape)
        residuals.append(own)
    norms = [math.sqrt(sum(float(one.square().sum()) for one in own.values())) for own in residuals]
    matched = [sum(norms) / count / norm for norm in norms]

    merged = {}
    for name in base:
        update = mean[name]
        if name in matrices or name in vectors:
            own = sum(s * one[name] for s, one in zip(matched, residuals, strict=True)) / count
            if power and name in matrices:
                own = torch.zeros_like(mean[name])
                for number in range(len(own)):
                    rows = [one[name][number] for one in residuals]
                    shares = [(s * float(row.norm())) ** power for s, row in zip(matched, rows, strict=True)]
                    own[number] = sum(share * row for share, row in zip(shares, rows, strict=True)) / sum(shares)
            update = restored * (core[name] if name in matrices else mean[name]) + own
        merged[name] = base[name].double() + update
    return merged


# A randomized truncation near the optimum, and float32's rounding in an exact one.
BARS = {"randomized": 3e-2, "exact": 2e-5}
DEFAULTS = [(backend, count, svd) for backend in ("torch", "native") for count in (2, 3) for svd in BARS]
DEFAULTS += [("triton", 3, "randomized"), ("triton", 2, "exact")]


@pytest.mark.parametrize("options", [{}, ALIKE], ids=["default", "a tenth, rows alike"])
@pytest.mark.parametrize(("backend", "count", "svd"), DEFAULTS, ids=str)
def test_the_default_is_what_its_definition_says(backend, count, svd, options):
    base, experts = fine_tuned(count, shapes=SMALL[svd] if backend == "triton" else SHAPES)
    bar = BARS[svd]
    expected = written_again(base, experts, *((0.1, 0, 0) if options else ()))
    merged = merge(base, experts, backend=backend, svd=svd, **options)
    assert distance(trunk(merged), trunk(expected)) <= bar * distance(trunk(base), trunk(expected))
    for name in HEAD:  # once rounded, from sums that are exact to float64
        assert (merged[name] - expected[name]).abs().max() <= 2.0**-24 * expected[name].abs().max() * 1.001


def test_so_it_is_in_bfloat16():
    base, experts = fine_tuned(3, torch.bfloat16)
    expected = written_again(base, experts)
    merged = merge(base, experts, svd="exact", dtype=torch.float32)
    assert distance(trunk(merged), trunk(expected)) <= 2e-5 * distance(trunk(base), trunk(expected))


@pytest.mark.parametrize("rank", [1, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 3])
def test_equal_specialists_or_one_give_that_specialist_at_any_rank(count, rank):
    base, (expert,) = fine_tuned(1)
    merged = merge(base, [expert] * count, rank=rank)
    for name, tensor in expert.items():  # differences and sums in float32 of numbers near each other
        assert (merged[name] - tensor).abs().max() <= 4 * 2.0**-24 * tensor.abs().max()


def test_order_scaling_and_weights():
    base, experts = fine_tuned(3)
    merged = merge(base, experts, svd="exact")
    update = distance(trunk(base), trunk(merged))
    assert distance(trunk(merge(base, experts[::-1], svd="exact")), trunk(merged)) <= 1e-5 * update
    # Task vectors twice as long give an update twice as long.
    twice = [{name: base[name] + 2 * (one[name] - base[name]) for name in base} for one in experts]
    doubled = {name: base[name] + 2 * (merged[name] - base[name]) for name in base}
    assert distance(trunk(merge(base, twice, svd="exact")), trunk(doubled)) <= 2 * 2e-5 * update
    # One that counts twice is there twice.
    counted = merge(base, experts, svd="exact", weights=(2, 1, 1))
    four = merge(base, [experts[0], *experts], svd="exact")
    assert distance(trunk(counted), trunk(four)) <= 2e-5 * update
    assert distance(trunk(counted), trunk(merged)) > 1e-2 * update


def test_the_default_is_none_of_its_neighbours():
    base, experts = fine_tuned(3, rough=0.2)
    merged = trunk(merge(base, experts))
    least = 0.01 * distance(trunk(base), merged)
    others = ({"rank": 1.0}, {"rank": 0.1}, {"norm_match": False}, {"core_mode": "mean"}, {"head": "merge"})
    for other in (*others, {"row_power": 0.0}, {"row_power": 1.0}):
        assert distance(trunk(merge(base, experts, MergeConfig.r2m(**other))), merged) > least, other
    cut, (before, whole) = merge(base, experts, whole_up_to=0), ({SMALLEST: one[SMALLEST]} for one in (base, merged))
    assert distance(cut, whole) > 0.05 * distance(before, whole)
