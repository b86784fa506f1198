"""``r2m init``, ``schema``, ``convert`` and ``demo``: what writes files of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from r2m.commands.given import only_given
from r2m.commands.messages import done
from r2m.commands.options import OFFLINE, names
from r2m.commands.way import following
from r2m.detector_kinds import WHAT
from r2m.recipe import DTYPES, Arrangement


@click.command()
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="[NAME=]PATH…")
@click.option("--to", default="recipe.yaml", show_default=True, metavar="FILE", help="The recipe to write.")
@click.option("--detector", metavar="KIND", help=WHAT + "  [default: as files beside them say]")
def init(base: str, experts: tuple[str, ...], to: str, detector: str | None) -> None:
    """Write a commented recipe for BASE and experts: what they are, and which preset makes them fit."""
    from r2m.places import new_file
    from r2m.starter import starter
    from r2m_kernels.errors import printable

    text = starter(base, experts, Path(to), detector)
    try:
        new_file(Path(to), text.encode(), replace=False)
    except FileExistsError:
        raise click.UsageError(f"{to}: exists already; --to names another file.") from None
    count = len(experts)
    done(printable(f"{to}: a recipe for a base and {count} expert{'s' * (count > 1)}, which fit"))
    done(following("merge", shlex.quote(to), "--out", "merged"))


@click.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that check them."""
    import json

    from r2m.recipe_file import schema as of_recipes

    click.echo(json.dumps(of_recipes(), indent=2, ensure_ascii=False))


@click.command()
@click.argument("source")
@click.argument("out")
@names
@click.option("--dtype", type=click.Choice(DTYPES), help="Of floating-point tensors.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@OFFLINE
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Load a pickled module or a TorchScript archive. This RUNS CODE from the file: only for files you trust.",
)
def convert(source: str, out: str, dtype: str | None, overwrite: bool, allow_pickle: bool, **given: Any) -> None:
    """Write the checkpoint SOURCE to the file OUT, whose ending says how: .safetensors, or .pth for torch.save."""
    from r2m.convert import convert as write
    from r2m.job import OUTPUT_DTYPES

    arrangement = Arrangement.from_options(only_given(given))
    chosen = OUTPUT_DTYPES[dtype] if dtype else None
    done(write(source, out, arrangement=arrangement, dtype=chosen, overwrite=overwrite, allow_pickle=allow_pickle))


@click.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="Where everything is written.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of data, training and merge.")
@click.option("--quick", is_flag=True, help="Less training, in half of the time: worse detectors.")
def demo(out: str, seed: int, quick: bool) -> None:
    """Train three forgery specialists on real faces, merge them and measure the result, on a CPU."""
    from rich.console import Console

    from r2m.demo import run_demo

    run_demo(Path(out), seed=seed, quick=quick, console=Console())


COMMANDS = (init, schema, convert, demo)
