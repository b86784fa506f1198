"""What a merge should cost on a GPU: tables of counts and floors. Predicted, not measured; no GPU needed.

    python -m bench.cost_model [--model vit_l_14] [--experts 3] [--rank 0.1] [--dtype float32] [--chip H100]

Without options: the reference job on every chip, and the totals of the other models. A floor is the longest of memory,
arithmetic and host link at the datasheet's rates. "no L2" is the floor if every tile of the inputs that a second
program reads came from memory again.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import resources
from typing import Any

from r2m_kernels._stream.engine import DEVICE_GROUP_BYTES
from r2m_kernels.cost_model import CHIPS, MODELS, Chip, Kind, Model, StepCost, Tile, Tiles, floor_seconds, merge_costs

NOTE = "predicted, not measured"
REFERENCE = "vit_l_14"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def launch_table() -> dict[str, Any]:
    """The tile sizes that the kernels are launched with; read as a file, since Triton need not be installed."""
    return json.loads(resources.files("r2m_kernels").joinpath("_triton", "launch.json").read_text(encoding="utf-8"))


def launch_tiles(table: Mapping[str, Any], target: str, dtype_bytes: int) -> Tiles:
    """What `_triton/launch.py` chooses for aligned inputs of 4 or 2 bytes."""
    nvidia = target.startswith("sm_")
    fast, full = "tf32" if nvidia and dtype_bytes == 4 else "bf16", "tf32x3" if nvidia else "ieee"

    def tile(operator: str, variant: str) -> Tile:
        sizes = table[operator][target][variant]
        return Tile(sizes["rows"], sizes["columns"], sizes["inner"], sizes.get("experts", 1))

    gram = table["task_gram"][target][f"{8 * dtype_bytes}-bit"]
    products = [tile("residual_matmul", variant) for variant in (fast, fast + "/many", full, full + "/many")]
    others = [tile("combine_matrix", full), tile("vectors_gram", "float64"), tile("triangular_product", full)]
    kinds: tuple[Kind, Kind] = ("tf32", "tf32x3") if nvidia else ("bf16", "fp32")
    return Tiles(gram["steps"] * gram["block"], *products, *others, *kinds)


def costs_on(chip: Chip, model: Model, experts: int, rank: float | int, dtype: str) -> list[StepCost]:
    tiles = launch_tiles(launch_table(), chip.target, DTYPE_BYTES[dtype])
    return merge_costs(model, experts, rank, DTYPE_BYTES[dtype], tiles=tiles, group_bytes=DEVICE_GROUP_BYTES)


def table_of(chip: Chip, model: Model, experts: int, rank: float | int, dtype: str) -> Iterator[str]:
    """One job on one chip, a line a step."""
    costs = costs_on(chip, model, experts, rank, dtype)
    yield f"{model.name}, N = {experts}, rank {rank}, {dtype}, on {chip.name} ({NOTE})"
    head = f"{'GB read':>9} {'GB written':>10} {'GFLOP':>8} {'kind':>6} {'launches':>8} {'re-read':>7}"
    yield f"{'step':<33} {head} {'floor ms':>9} {'no L2':>7}"
    for cost in costs:
        yield (
            f"{cost.step:<33} {(cost.bytes_read or cost.link_bytes) / 1e9:>9.2f} {cost.bytes_written / 1e9:>10.2f} "
            f"{cost.flops / 1e9:>8.1f} {cost.kind if cost.flops else '-':>6} {cost.launches:>8} "
            f"{cost.reread_factor:>7.2f} {1e3 * cost.floor_seconds(chip):>9.2f} "
            f"{1e3 * cost.floor_seconds(chip, cached=False):>7.2f}"
        )
    kernels = [cost for cost in costs if not cost.link_bytes]
    total = functools.reduce(StepCost.plus, [replace(cost, step="kernels", kind="fp32") for cost in kernels])
    yield (
        f"{'kernels, ' + NOTE:<33} {total.bytes_read / 1e9:>9.2f} {total.bytes_written / 1e9:>10.2f} "
        f"{total.flops / 1e9:>8.1f} {'':>6} {total.launches:>8} {'':>7} {1e3 * floor_seconds(costs, chip):>9.2f} "
        f"{1e3 * floor_seconds(costs, chip, cached=False):>7.2f}"
    )


def totals_of(chips: list[Chip], models: list[Model], experts: int, rank: float | int) -> Iterator[str]:
    """A line a model and dtype: kernels' floors on every chip, and the transfer's."""
    yield f"kernels' floors / transfer's floor in ms, N = {experts}, rank {rank} ({NOTE})"
    yield f"{'model':<10} {'dtype':<9}" + "".join(f"{chip.name:>18}" for chip in chips)
    for model in models:
        for dtype in ("float32", "bfloat16"):
            cells = []
            for chip in chips:
                costs = costs_on(chip, model, experts, rank, dtype)
                link = sum(cost.floor_seconds(chip) for cost in costs if cost.link_bytes)
                cells.append(f"{1e3 * floor_seconds(costs, chip):.1f} / {1e3 * link:.0f}")
            yield f"{model.name:<10} {dtype:<9}" + "".join(f"{cell:>18}" for cell in cells)


def report(
    model: str | None = None,
    experts: int = 3,
    rank: float | int = 0.1,
    dtype: str = "float32",
    chip: str | None = None,
) -> list[str]:
    """All lines: the model (default: the reference job) on the chip (default: all), then, by default, other models."""
    chips = list(CHIPS.values()) if chip is None else [CHIPS[chip]]
    lines: list[str] = []
    for one in chips:
        lines += [*table_of(one, MODELS[model or REFERENCE], experts, rank, dtype), ""]
    if model is None:
        lines += totals_of(chips, list(MODELS.values()), experts, rank)
    return lines


def rank_option(text: str) -> float | int:
    return float(text) if "." in text else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: the reference job, then totals of all models")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rank", type=rank_option, default=0.1, help="ratio such as 0.1, or an integer")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="float32")
    parser.add_argument("--chip", choices=CHIPS, help="default: all")
    print("\n".join(report(**vars(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
