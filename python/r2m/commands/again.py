"""``r2m add``, ``remove`` and ``sweep``: what a merge left, merged again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from r2m.commands.given import rule
from r2m.commands.merge import merge, tell
from r2m.commands.options import RUN, SectionedCommand, option, read_rank
from r2m.commands.process import settle_memory
from r2m_kernels.config import FILES, STRENGTH

if TYPE_CHECKING:
    from r2m.recipe import Recipe


def _running(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of where and how to compute, as merge has them."""
    names = ("device", "backend", "memory_budget", "offline", "quiet")
    shared = [one for one in merge.params if one.name in names]
    before = getattr(command, "__click_params__", [])  # in which click keeps them, the last one first
    command.__click_params__ = [*reversed(shared), *before]  # type: ignore[attr-defined]
    return command


@click.command(cls=SectionedCommand)
@_running
@click.argument("out", metavar="OUT")
@option(FILES, "--expert", required=True, metavar="[NAME=]PATH", help="The new specialist.")
@option(FILES, "--weight", type=float, help="Of it, where the others have 1 or their own.  [default: as merge]")
@option(FILES, "--rename", multiple=True, metavar="OLD=NEW", help="In its names alone; repeat for each.")
@option(RUN, "--resume", is_flag=True, help="Go on from where the same was cut off.")
def add(out: str, expert: str, weight: float | None, rename: tuple[str, ...], **given: Any) -> None:
    """Merge OUT, the output of a merge, again with one specialist more; OUT is replaced when all is done."""
    from r2m.naming import name_experts
    from r2m.project import read_project, with_expert

    recipe = read_project(out)
    ((name, path),) = name_experts([expert]).items()
    rules: dict[str, str | None] = dict(rule(text) for text in rename)
    _merge_again(out, with_expert(recipe, name, path, weight=weight, rename=rules), **given)


@click.command(cls=SectionedCommand)
@_running
@click.argument("out", metavar="OUT")
@option(FILES, "--expert", required=True, metavar="NAME", help="Which specialist.")
@option(RUN, "--resume", is_flag=True, help="Go on from where the same was cut off.")
def remove(out: str, expert: str, **given: Any) -> None:
    """Merge OUT, the output of a merge, again without a specialist; OUT is replaced when all is done."""
    from r2m.project import read_project, without_expert

    _merge_again(out, without_expert(read_project(out), expert), **given)


def _merge_again(out: str, recipe: Recipe, *, quiet: bool, resume: bool, **options: Any) -> None:
    settle_memory()
    from r2m.execute import merge_files
    from r2m.progress import reporting
    from r2m.project import shard_size

    with reporting(quiet=quiet) as progress:
        report = merge_files(
            out=out,
            **recipe.arguments(),
            max_shard_size=shard_size(out),
            overwrite=True,
            resume=resume,
            reuse=True,
            progress=progress,
            **options,
        )
    tell(report, out, quiet)


@click.command(cls=SectionedCommand)
@_running
@click.argument("out", metavar="OUT")
@option(FILES, "--to", required=True, metavar="DIR", help="The directory to create, with one output per combination.")
@option(STRENGTH, "--rank", metavar="A,B,…", help="Truncation ranks, as merge has them.")
@option(STRENGTH, "--eta", metavar="A,B,…", help="Strengths of the residuals.")
@option(STRENGTH, "--core-scale", metavar="A,B,…", help="Factors of the core.")
@option(STRENGTH, "--row-power", metavar="A,B,…", help="Powers of the weights by row.")
def sweep(out: str, to: str, quiet: bool, **given: Any) -> None:
    """Merge OUT, the output of a merge, with every combination of some options: analyzed once, combined for each."""
    settle_memory()
    from r2m.progress import reporting
    from r2m.project import SWEPT
    from r2m.project import sweep as run

    texts = {field: given.pop(field) for field in SWEPT}
    values = {field: [read_rank(one) for one in text.split(",")] for field, text in texts.items() if text is not None}
    with reporting(quiet=quiet) as progress:
        rows = run(out, values, to, progress=progress, **given)
    if not quiet:
        click.echo(f"{len(rows)} merges in {to}, in {to}/sweep.csv what they are")


COMMANDS = (add, remove, sweep)
