"""The compile gate: does it cover every configuration that can be chosen, and does it see what it should refuse?

Kernels are compiled in processes of their own, since in this one they are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import forked
import pytest
import torch

from bench import compile_check
from r2m_kernels._triton import launch

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(code, *arguments):
    """A script's output, in a child that has not imported Triton yet."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    with forked.start(arguments, code, environment) as child:
        out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return json.loads(out)


def choosable(target):
    """Every configuration that a pure function of `launch` can return, as (kernel, configuration)."""
    found = set()
    for aligned in (True, False):
        found.add(("combine_vector_kernel", launch.combine_vector(target, aligned)))
        found.add(("combine_rows_kernel", launch.combine_vector(target, aligned)))
        found.add(("form_residuals_kernel", launch.form_residuals(target, aligned)))
        found.add(("vectors_gram_kernel", launch.vectors_gram(target, aligned)))
        found.add(("factor_products_kernel", launch.factor_products(target, aligned)))
        found.add(("unit_rows_kernel", launch.unit_rows(target, aligned)))
        for count in range(1, 17):
            found.add(("combine_rounded_kernel", launch.combine_rounded(target, aligned, count)))
        for compute in (torch.float32, torch.float64):
            for rank in (16, 410):
                found.add(("residual_product_kernel", launch.residual_product(target, compute, aligned, rank)))
            found.add(("combine_matrix_kernel", launch.combine_matrix(target, compute, aligned)))
            found.add(("triangular_product_kernel", launch.triangular_product(target, compute, aligned)))
        for dtype in DTYPES:
            compute = torch.promote_types(dtype, torch.float32)
            for count in range(1, 17):
                found.add(("task_gram_kernel", launch.task_gram(target, dtype, count, aligned)))
                found.add(("row_grams_kernel", launch.task_gram(target, dtype, count, aligned)))
                for precision in ("tf32x3", "ieee"):
                    config = launch.residual_matmul(target, compute, precision, aligned, count)
                    found.add(("residual_matmul_kernel", config))
    found.add(("inverse_factor_kernel", launch.inverse_factor()))
    found.add(("residual_gram_kernel", launch.residual_gram(target)))
    found.add(("units_gram_kernel", launch.units_gram(target)))
    found.add(("units_factor_kernel", launch.units_factor(target)))
    found.add(("units_product_kernel", launch.units_product(target)))
    return found | {("sum_tiles_kernel", launch.sums()), ("row_coefficients_kernel", launch.sums())}


def test_every_configuration_that_can_be_chosen_is_compiled():
    code = """
import dataclasses, json, sys
from bench import compile_check
found = {target: compile_check.launches(target) for target in sys.argv[1:]}
print(json.dumps({key: [(one.kernel.__name__, dataclasses.asdict(one.config)) for one in found[key]] for key in found}))
"""
    # Element by element kernels choose among the same few, whichever they are.
    elementwise = {field.name for field in fields(launch.VectorConfig)}

    def named(kernel, config):
        return "elementwise" if set(config) == elementwise else kernel, tuple(sorted(config.items()))

    sources = "\n".join(path.read_text() for path in Path(launch.__file__).parent.glob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    for target, caught in run(code, *launch.TARGETS).items():
        assert {kernel for kernel, _ in caught} == kernels, target
        covered = {named(kernel, config) for kernel, config in caught}
        wanted = {named(kernel, asdict(config)) for kernel, config in choosable(target)}
        assert wanted <= covered, target
        assert covered <= wanted, target  # nor is anything compiled that never runs


def test_every_entry_of_the_table_is_reachable_and_well_formed():
    table = launch.table()
    sizes = {
        "task_gram": launch.GramConfig,
        **dict.fromkeys(("combine_vector", "form_residuals", "unit_rows"), launch.VectorConfig),
    }
    for operator, targets in table.items():
        assert tuple(targets) == launch.TARGETS
        known = {field.name for field in fields(sizes.get(operator, launch.MatmulConfig))}
        for target, variants in targets.items():
            for tiles in variants.values():
                assert set(tiles) <= known
                assert any(
                    kernel == f"{operator}_kernel" and tiles.items() <= asdict(config).items()
                    for kernel, config in choosable(target)
                )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "tiles", "failure"),
    [
        ("sm_80", {"columns": 256, "warps": 4}, "spills"),
        ("sm_90", {"stages": 8}, "bytes of shared memory"),
        ("sm_100", {"rows": 32}, "has no matrix instruction"),  # its unit wants 64 rows
        ("sm_90", {"rows": 32}, "matrix instruction of single warps"),  # as a warp group's does
        ("sm_90", {"inner": 16, "rows": 16, "columns": 32}, "has no 128-bit load"),
    ],
)
def test_the_gate_refuses_what_it_should(target, tiles, failure):
    code = """
import copy, json, sys
from bench import compile_check
from r2m_kernels._triton import launch
from bench import compile_check
target, tiles, table = sys.argv[1], json.loads(sys.argv[2]), copy.deepcopy(launch.table())
table["residual_product"][target]["fp16"].update(tiles)
launch.table = lambda: table
chosen = [
    found for found in compile_check.launches(target)
    if found.kernel.__name__ == "residual_product_kernel" and found.config.precision == "fp16" and found.config.aligned
    and {name: getattr(found.config, name) for name in table["residual_product"][target]["fp16"]} == \
        table["residual_product"][target]["fp16"]
    and not any(found.constants[name] for name in ("ACROSS", "PAIRED", "LENGTHS"))
]
print(json.dumps([compile_check.failures(row) for row in compile_check.inspected(target, chosen)]))
"""
    (found,) = run(code, target, json.dumps(tiles))
    assert any(failure in one for one in found), found


def test_what_passed_with_these_sources_is_not_compiled_again(tmp_path, monkeypatch, capsys):
    passed = {"kernel": "k", "target": "sm_90", "config": {"aligned": False}, "registers": 1, "seconds": 0.0}
    passed |= {"spill_bytes": 0, "shared_bytes": 0, "mma": 0, "warp_mma": 0, "wide_loads": 0, "declares_mma": False}
    failed = {"kernel": "k", "target": "gfx942", "config": {}, "error": "x"}
    path, asked = tmp_path / "rows.json", []

    def check(targets, processes):
        asked.extend(targets)
        return [{**passed, "target": target} for target in targets]

    monkeypatch.setattr(compile_check, "check", check)
    monkeypatch.setattr(launch, "INTERPRETED", False)

    def compiled(*targets):
        asked.clear()
        options = [word for target in targets for word in ("--target", target)]
        monkeypatch.setattr(sys, "argv", ["compile_check", "--json", str(path), *options])
        assert compile_check.main() == 0
        return list(asked)

    path.write_text(json.dumps({"sources": compile_check.sources(), "kernels": [passed, failed]}))
    assert compiled("sm_90") == []
    assert "sm_90 1 before, 0 failures" in capsys.readouterr().out
    assert compiled("sm_90", "gfx942") == ["gfx942"]
    assert compiled() == ["sm_80", "sm_100"]
    assert compiled("sm_90") == compiled() == []  # what was not asked for is not forgotten
    kernels = tmp_path / "_triton"
    kernels.mkdir()
    for source in Path(launch.__file__).parent.glob("*.*"):
        (kernels / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(launch, "__file__", str(kernels / "launch.py"))
    assert compiled("sm_90") == []
    (kernels / "launch.json").write_bytes((kernels / "launch.json").read_bytes() + b"\n")
    assert compiled("sm_90") == ["sm_90"]
    assert compiled("sm_90", "sm_80") == ["sm_80"]  # nor are another version's rows kept
