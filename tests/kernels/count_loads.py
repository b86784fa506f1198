"""Runs operators of the Triton backend in Triton's interpreter and counts what their loops really move.

Loads and stores are counted by the true lanes of the mask, and told apart by address: those of checkpoints ("inputs"),
else by the name of the kernel's argument that they fall into.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from r2m_kernels import _triton
from r2m_kernels._interface import Effort, ResidualGroup
from r2m_kernels._triton import launch, units
from r2m_kernels._triton.gram_start import SKETCH_SCALE, Grams
from r2m_kernels._triton.orthonormalize import Blocks, inner_products
from r2m_kernels._triton.residual_matmul import matrix_group
from r2m_kernels._triton.residuals import Residuals

KEPT = ("form", "sketch", "along", "across", "last")
FROM_GRAMS = ("gram", "gram sketch", "paired", "shifts", "gram last")
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Counter:
    """What the builder's operations moved while it is installed."""

    def __init__(self, inputs):
        self.inputs = [extent(tensor) for tensor in inputs]
        self.arguments = []
        self.loads, self.stores = collections.Counter(), collections.Counter()
        self.dot_flops = self.distinct_input_bytes = 0
        self.launches = []
        self.program = []

    def named(self, addresses):
        """The name of what lies at the addresses of one load or store; all of them lie in one tensor or checkpoint."""
        for start, end in self.inputs:
            if start <= addresses.min() and addresses.max() < end:
                return "inputs"
        for name, (start, end) in self.arguments:
            if start <= addresses.min() and addresses.max() < end:
                return name
        if self.tables is None:  # somewhere inside of the operator
            return "table"
        raise AssertionError("a load or store outside all tensors")

    def moved(self, counts, pointers, mask):
        active, addresses = np.broadcast_arrays(mask.data.astype(bool), pointers.data)
        addresses, size = addresses[active], pointers.get_element_ty().primitive_bitwidth // 8
        if addresses.size:
            name = self.named(addresses)
            counts[name] += addresses.size * size
            if name == "inputs":
                self.program.append((addresses, size))

    def end_program(self):
        if self.program:
            distinct = np.unique(np.concatenate([addresses for addresses, _ in self.program]))
            self.distinct_input_bytes += distinct.size * self.program[0][1]
        self.program = []

    def installed(self):
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        dot, next_program = InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx
        start = launch.start

        def counted_load(builder, pointers, mask, *rest):
            self.moved(self.loads, pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder, pointers, value, mask, *rest):
            self.moved(self.stores, pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def counted_dot(builder, a, b, *rest):
            self.dot_flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(builder, a, b, *rest)

        def counted_program(builder, *index):
            self.end_program()
            return next_program(builder, *index)

        def counted_start(kernel, grid, config, *arguments, **constants):
            names = list(inspect.signature(kernel.fn).parameters)
            self.arguments = [
                (name, extent(value))
                for name, value in zip(names, arguments, strict=False)
                if isinstance(value, torch.Tensor)
            ]
            # Outputs of `combine` lie behind a table too, and a group's table behind that of all shapes.
            self.arguments += [("outputs", extent(tensor)) for tensor in self.outputs]
            self.arguments += [("table", extent(tensor)) for tensor in self.tables or ()]
            self.launches.append({"kernel": kernel.fn.__name__, "grid": grid, "config": dataclasses.asdict(config)})
            start(kernel, grid, config, *arguments, **constants)
            self.end_program()

        return mock.patch.multiple(
            InterpreterBuilder,
            create_masked_load=counted_load,
            create_masked_store=counted_store,
            create_dot=counted_dot,
            set_grid_idx=counted_program,
        ), mock.patch.object(launch, "start", counted_start)


def extent(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def counted(case):
    """An operator, the sizes of its arguments and options → what it moved and multiplied, and its launches."""
    m, n, count, k = case["m"], case["n"], case["experts"], case.get("k", 0)
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = [
        [random(m, n, dtype=DTYPES[case["dtype_bytes"]]) for _ in range(case["tensors"])] for _ in range(count + 1)
    ]
    bases, experts = tensors[0], tensors[1:]
    counter = Counter([tensor for row in tensors for tensor in row])
    counter.outputs = outs = [torch.empty_like(base) for base in bases]
    # Times 2⁻⁵: float16 operands want residuals whose numbers are 1 at most.
    mixing, size = (torch.eye(count, dtype=torch.float64) - 1 / count) / 32, len(bases)
    operator, kept, counter.tables = case["operator"], None, []
    if operator == "truncate":
        counter.tables = None
    if operator in (*KEPT, *FROM_GRAMS):
        group, unit = matrix_group(bases, experts), mixing.float().expand(size, count, count).contiguous()
        kept, counter.tables = Residuals([group], [k]), [group.table]
        kept.form(unit)
        short, long = (blocks.vectors(torch.float16).zero_() for blocks in (kept.short, kept.long))
    if operator in FROM_GRAMS:
        grams = Grams(kept)
        grams.form()
        counter.tables.append(kept.table)
        reached = grams.along(short, paired=True)[1]
    patches = counter.installed()
    with patches[0], patches[1]:
        transpose = case.get("transpose", False)
        if operator == "task_gram":
            _triton.task_gram(bases, experts)
        elif operator == "residual_matmul":
            rhs = random(size, count, m if transpose else n, k)
            _triton.residual_matmul(bases, experts, mixing, rhs, transpose, "tf32x3")
        elif operator == "form":
            kept.form(unit)
        elif operator == "sketch":
            kept.sketch(torch.arange(size))
        elif operator == "along":
            kept.along(short)
        elif operator == "across":
            kept.across(long, short, torch.zeros(10**4, dtype=torch.float64), 1.0)
        elif operator == "last":
            kept.along(short.float(), torch.ones(size, count))
        elif operator == "gram":
            grams.form()
        elif operator == "gram sketch":
            grams.sketch(torch.arange(size), SKETCH_SCALE)
        elif operator == "paired":
            grams.along(short, paired=True)
        elif operator == "shifts":
            grams.shifts(reached, 1.0)
        elif operator == "gram last":
            kept.along(short, torch.ones(size, count))
        elif operator == "truncate":
            tau = torch.stack([torch.stack(expert).double() - torch.stack(bases).double() for expert in experts])
            energies = torch.einsum("ji,jlmn->limn", mixing, tau).square().sum((2, 3))
            group = ResidualGroup(bases, experts, torch.arange(size), energies, k)
            _triton.shifted_truncation([group], mixing, Effort(case["iterations"], 0, None, products=False))
        elif operator == "by_rows":
            weights = torch.full((count,), 1 / count, dtype=torch.float64)
            grams = _triton.row_grams(bases, experts).rows
            rule = (torch.ones(count), mixing, weights, weights, 0.5, 3.0)
            rows = _triton.row_coefficients(grams, *rule, torch.float32)
            _triton.combine(bases, experts, rows, None, None, None, outs)
        elif operator == "combine":
            core = torch.ones(count, dtype=torch.float64)
            core[: case["unread"]] = 0.0
            left, right = (random(size, count, m, k), random(size, count, k, n)) if k else (None, None)
            scale = core if k else None
            if case.get("rounded"):
                left, right, scale = left.bfloat16(), right.bfloat16(), None
            _triton.combine(bases, experts, core, left, right, scale, outs)
        elif operator == "orthonormalize":
            _triton.orthonormalize(random(count * size, m, k))
        elif operator == "unit_rows":
            blocks = Blocks([(count * size, k, m)], torch.device("cpu"))
            vectors, others = (blocks.vectors(dtype).fill_(0.5) for dtype in (torch.float32, torch.float16))
            amounts, others = (torch.zeros(count * size), others) if case["subtracted"] else (None, None)
            units.unit_rows(blocks, vectors, amounts, others)
        elif operator == "quick_pass":
            blocks = Blocks([(count * size, k, m)], torch.device("cpu"))
            rows = blocks.vectors(torch.float16).zero_()
            blocks.of_sorts(rows)[0][:, range(k), range(k)] = 2.0**14
            units.quick_pass(blocks, rows, torch.ones(count * size), case["last"])
        elif operator == "weigh_rows":
            weights = torch.full((count,), 1 / count, dtype=torch.float64)
            left, right = random(size, count, k, m).mT, random(size, count, k, n)
            dtype = torch.bfloat16 if case.get("rounded") else left.dtype
            lengths = _triton.row_lengths(left, right, n <= m, n <= m)
            _triton.weigh_rows(left, lengths, weights, weights, 3.0, weights, dtype)
        elif operator == "inner_products":
            inner_products(random(size, count, k, m), random(size, count, k, n))
    names = ("loads", "stores", "dot_flops", "distinct_input_bytes", "launches")
    return {name: getattr(counter, name) for name in names}
