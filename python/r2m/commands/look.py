"""``r2m inspect``, ``card`` and ``report``: what checkpoints are, and what a merge made."""

from __future__ import annotations

import shlex
from typing import Any

import click

from r2m.commands.given import only_given
from r2m.commands.messages import done, say
from r2m.commands.options import OFFLINE, names
from r2m.commands.way import following
from r2m.recipe import Arrangement


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@names
@OFFLINE
@click.option("--norms", is_flag=True, help="Read all of them: how far each moved from the first, and how alike.")
@click.option("--all", "every", is_flag=True, help="List every tensor that does not fit, not examples alone.")
def inspect(paths: tuple[str, ...], norms: bool, every: bool, **given: Any) -> int:
    """Show what checkpoints are, and whether they can be merged: the first as base, the others as experts.

    The exit code is 1 where they cannot.
    """
    from r2m.inspection import inspect as look

    arrangement = Arrangement.from_options(only_given(given))
    lines, fit = look(paths, arrangement=arrangement, norms=norms, every=every)
    for line in lines:
        say(line)
    if fit and len(paths) > 1:
        say(following("init", *map(shlex.quote, paths)))
    return 0 if fit else 1


@click.command()
@click.argument("out")
@click.option("--evaluation", metavar="DIR", help="Of r2m evaluate, for the card's metrics.")
@click.option(
    "--license", "licence", metavar="ID", help="The merged model's.  [default: the most restrictive of its inputs]"
)
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    metavar="DATASET=ID:TASK[:METRIC]",
    help="A dataset of the evaluation is this one of the Hub, a benchmark with that task; its AUC, or another "
    "metric, goes into .eval_results/, which leaderboards read.  Repeat for each.",
)
@click.option("--source", metavar="URL", help="Where those numbers can be looked up.")
@click.option("--overwrite", is_flag=True, help="Replace a card that somebody has changed, too.")
def card(
    out: str,
    evaluation: str | None,
    licence: str | None,
    benchmarks: tuple[str, ...],
    source: str | None,
    overwrite: bool,
) -> None:
    """Write the model card of OUT, the output of a merge, again: with SHA-256 of its inputs, and with metrics."""
    from r2m.card import warnings, write_card
    from r2m.records import read_evaluation
    from r2m.results import Benchmark
    from r2m_kernels.errors import printable

    text, written = write_card(
        out,
        overwrite=overwrite,
        evaluation=None if evaluation is None else read_evaluation(evaluation),
        benchmarks=[Benchmark.read(one) for one in benchmarks],
        source=source,
        licence=licence,
    )
    done("\n".join(printable(f"{out}/{name}") for name in written))
    for warning in warnings(text):
        say(f"Warning: {warning}", err=True)


@click.command()
@click.argument("out")
@click.option("--to", metavar="DIR", help="The directory to create.  [default: OUT.report]")
@click.option(
    "--evaluation",
    metavar="DIR",
    help="Of r2m evaluate: how well it detects.  [default: the one beside OUT that has it among its models]",
)
@click.option(
    "--sweep", "swept", metavar="DIR", help="Of r2m sweep.  [default: the one whose points the evaluation has]"
)
@click.option(
    "--spectra",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Singular values of the residuals of N matrices, kept and dropped: reads the checkpoints again.",
)
@click.option("--overwrite", is_flag=True, help="Replace a former page; what is of no page is kept, and named.")
def report(out: str, to: str | None, evaluation: str | None, swept: str | None, spectra: int, overwrite: bool) -> None:
    """Write a page about OUT, the output of a merge: one HTML file, and beside it each picture as PNG, PDF and CSV.

    It begins with how well OUT detects, beside what it was merged from, where an evaluation says so.
    """
    from r2m.extras import need

    need("report", "report", "matplotlib", "sklearn")
    from r2m.reporting.beside import evaluations_beside
    from r2m.reporting.page import PAGE_FILE, write_page
    from r2m_kernels.errors import printable

    target = to or f"{out.rstrip('/')}.report"
    if evaluation is None:
        found = evaluations_beside(out)
        evaluation = found[0] if len(found) == 1 else None
        if evaluation is not None:
            say(printable(f"Evaluation: {evaluation}, which has {out} among its models"))
        elif found:
            say(printable(f"Evaluations of {out}: {', '.join(found)}; none is shown without --evaluation DIR"))
    files = write_page(out, target, evaluation=evaluation, swept=swept, spectra=spectra, overwrite=overwrite)
    done(f"{printable(target)}/{PAGE_FILE}, which any browser opens, and {len(files) - 1} files beside it")
    measured = () if evaluation is None else ("--evaluation", shlex.quote(evaluation))
    say(following("card", shlex.quote(out), *measured))


COMMANDS = (inspect, card, report)
