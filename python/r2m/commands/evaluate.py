"""``r2m evaluate``."""

from __future__ import annotations

from typing import Any

import click

from r2m.commands.given import only_given
from r2m.commands.messages import done, say
from r2m.commands.options import SectionedCommand, flags, option
from r2m.evaluation.request import REQUEST, Request
from r2m.options import RUN


@click.command(
    cls=SectionedCommand,
    epilog="Example: r2m evaluate --model r2m=merged --detector clip:clip-vit-large-patch14 --data DFDC.json",
)
@flags(REQUEST.values())
@option(RUN, "--out", metavar="DIR", help="Where evaluation.json and scores-N.csv go.  [default: nowhere]")
@option(RUN, "--overwrite", is_flag=True, help="Replace an evaluation in DIR.")
@option(RUN, "--quiet", is_flag=True, help="No progress.")
def evaluate(out: str | None, overwrite: bool, quiet: bool, **given: Any) -> None:
    """Measure detectors on datasets: AUC, accuracy and more over frames and videos, several models in one table."""
    from r2m.extras import need

    need("evaluate", "evaluate", "sklearn", "PIL")
    from r2m.evaluation.command import evaluate as run

    request = Request(**only_given({name: given[one.key] for name, one in REQUEST.items()}))
    table, notes = run(request, out, overwrite=overwrite, quiet=quiet)
    done("\n".join(table))
    for note in notes:  # beside a table that is for a file
        say(note, err=request.table != "text")


COMMANDS = (evaluate,)
