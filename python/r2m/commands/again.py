"""``r2m add``, ``remove`` and ``sweep``: what a merge left, merged again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import click

from r2m.commands.given import read_methods, read_value, take_options
from r2m.commands.merge import tell
from r2m.commands.messages import done, say
from r2m.commands.options import OFFLINE, QUIET, SectionedCommand, flags, option
from r2m.commands.process import settle_memory
from r2m.commands.way import evaluation_of, following
from r2m.options import OPTIONS
from r2m.points import GRID
from r2m_kernels.config import FLAGS
from r2m_kernels.errors import BadOption, printable
from r2m_kernels.fields import FILES, METHOD, STRENGTH
from r2m_kernels.options import flag

if TYPE_CHECKING:
    from r2m.recipe import Recipe

_LISTED = 8  # points, as words of a command
_RUNNING = [OPTIONS[name] for name in ("device", "backend", "memory_budget")]


def _swept(command: Any) -> Any:
    """An option for each that may be swept over."""
    for key in reversed(GRID):
        command = option(STRENGTH, flag(key), metavar="A,B,…", help=FLAGS[key].sentence)(command)
    return command


@click.command(cls=SectionedCommand)
@click.argument("out", metavar="OUT")
@option(
    FILES, "--expert", required=True, multiple=True, metavar="[NAME=]PATH", help="A new specialist; repeat for each."
)
@option(FILES, "--weight", type=float, help="Of each, where the others have 1 or their own.  [default: as merge]")
@option(FILES, "--rename", multiple=True, metavar="OLD=NEW", help="In their names alone; repeat for each.")
@flags([*_RUNNING, OPTIONS["screen"], OPTIONS["resume"], OPTIONS["keep_factors"]])
@OFFLINE
@QUIET
def add(out: str, expert: tuple[str, ...], weight: float | None, rename: tuple[str, ...], **given: Any) -> None:
    """Merge OUT, the output of a merge, again with a specialist more; OUT is replaced when all is done."""
    from r2m.naming import name_experts
    from r2m.recipe import Expert, read_rule

    rules = dict(map(read_rule, rename))

    def with_all(recipe: Recipe) -> Recipe:
        for name, path in name_experts(expert).items():
            recipe = recipe.with_expert(name, Expert(path, rules), weight)
        return recipe

    _merge_again(out, with_all, **given)


@click.command(cls=SectionedCommand)
@click.argument("out", metavar="OUT")
@option(FILES, "--expert", required=True, multiple=True, metavar="NAME", help="Which specialist; repeat for each.")
@flags([*_RUNNING, OPTIONS["resume"], OPTIONS["keep_factors"]])
@OFFLINE
@QUIET
def remove(out: str, expert: tuple[str, ...], **given: Any) -> None:
    """Merge OUT, the output of a merge, again without a specialist; OUT is replaced when all is done."""
    _merge_again(out, lambda recipe: reduce(lambda left, name: left.without_expert(name), expert, recipe), **given)


def _merge_again(out: str, changed: Callable[[Recipe], Recipe], *, quiet: bool, **given: Any) -> None:
    settle_memory()
    from r2m import former
    from r2m.merge import merge_files
    from r2m.output import held
    from r2m.progress import reporting
    from r2m.relink import refuse_lost

    former.recipe_of(out)  # where it is none, nothing is made beside it
    with held(out) as workplace:  # what two of these read at once, one would write without the other's
        options = replace(take_options(given), max_shard_size=former.shard_size(out), overwrite=True, reuse=True)
        try:
            before = former.recipe_of(out)
            recipe = changed(before)
        except BadOption:
            if not (options.resume and workplace.ended):
                raise
            report = former.report_of(out)  # cut off when all was done
            workplace.clear()
        else:
            refuse_lost(recipe, out, new=recipe.experts.keys() - before.experts.keys())
            with reporting(quiet=quiet) as progress:
                report = merge_files(recipe, out, options, progress=progress, workplace=workplace)
    tell(report, out, quiet)


@click.command(cls=SectionedCommand)
@click.argument("out", metavar="OUT")
@option(FILES, "--to", required=True, metavar="DIR", help="The directory to create, with one output per combination.")
@option(
    METHOD,
    "--method",
    "methods",
    metavar="A,B,…",
    help="Compare methods, each with options of its own after colons: ties:density=0.1,tsv_m,r2m. What OUT's recipe "
    "says of weights and of tensors by name holds for all.  [default: OUT's]",
)
@_swept
@flags(_RUNNING)
@OFFLINE
@QUIET
def sweep(out: str, to: str, methods: str | None, quiet: bool, **given: Any) -> None:
    """Merge OUT, the output of a merge, by several methods or with every combination of some options.

    Values of an option go to the methods that use it. What has one analysis in common is analyzed once and combined for
    each; a sweep that was cut off goes on when the same command is given again.
    """
    settle_memory()
    from r2m.progress import reporting
    from r2m.sweep import sweep as run
    from r2m_kernels.errors import printable

    texts = {field: given.pop(field) for field in GRID}
    values = {field: [read_value(field, one) for one in text.split(",")] for field, text in texts.items() if text}
    asked = read_methods(methods) if methods is not None else ()
    with reporting(quiet=quiet) as progress:
        rows = run(out, values, to, take_options(given), methods=asked, progress=progress)
    if not quiet:
        done(printable(f"{len(rows)} merges in {to}, in {to}/sweep.csv what they are"))
        points = [word for row in rows for word in ("--model", shlex.quote(_as_model(to, row["point"])))]
        scored = ["--data", "PICTURES", "--out", shlex.quote(evaluation_of(to))]
        done(following("evaluate", *(points if len(rows) <= _LISTED else [*points[:2], "--model", "…"]), *scored))


def _as_model(to: str, point: str) -> str:
    """A point as ``r2m evaluate`` takes it, under a name without =."""
    return f"{point.removeprefix('method=').replace('=', '-')}={to}/{point}"


@click.command()
@click.argument("out", metavar="OUT")
@click.argument("places", nargs=-1, metavar="[NAME=PATH]…")
def relink(out: str, places: tuple[str, ...]) -> int:
    """Say where inputs of OUT, the output of a merge, are by now: base=PATH, or an expert's name.

    Without places, list those that are not where OUT says; the exit code is 1 where there are some. Paths are kept
    relative to OUT as far as they lie in the directory that OUT is in: that directory can be moved as a whole.
    """
    from r2m import former
    from r2m.relink import lost
    from r2m.relink import relink as run

    pairs = [one.partition("=") for one in places]
    wrong = next((one for one, (name, _, path) in zip(places, pairs, strict=True) if not name or not path), None)
    if wrong is not None:
        raise BadOption(f"{wrong}: expected NAME=PATH, where NAME is base or an expert's")
    if not pairs:
        gone = lost(former.recipe_of(out))
        for name, path in gone.items():
            say(printable(f"{name} is not at {path}"))
        return 1 if gone else 0
    run(out, {name: path for name, _, path in pairs})
    done(printable(f"{out}: {', '.join(name for name, _, _ in pairs)}"))
    return 0


COMMANDS = (add, remove, sweep, relink)
