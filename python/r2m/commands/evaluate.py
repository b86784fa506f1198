"""``r2m evaluate`` and ``detect``."""

from __future__ import annotations

import shlex
from typing import Any

import click

from r2m.commands.given import only_given
from r2m.commands.messages import done, say
from r2m.commands.options import SectionedCommand, flags, option
from r2m.commands.process import DONE, INPUT
from r2m.commands.way import following
from r2m.evaluation.request import DATA, DETECT, MODELS, REQUEST, Request
from r2m.options import RUN


@click.command(
    cls=SectionedCommand,
    epilog="Example: r2m evaluate merged --model other.pth --detector timm:vit_base_patch16_224 --data PICTURES",
)
@click.argument("merged", nargs=-1, metavar="[NAME=]OUT…")
@flags(one for name, one in REQUEST.items() if name != "merged")
@option(RUN, "--out", metavar="DIR", help="Where evaluation.json and scores-N.csv go.  [default: nowhere]")
@option(RUN, "--overwrite", is_flag=True, help="Replace an evaluation in DIR.")
@option(RUN, "--quiet", is_flag=True, help="No progress.")
def evaluate(out: str | None, overwrite: bool, quiet: bool, **given: Any) -> None:
    """Measure detectors on datasets: AUC, accuracy and more over frames and videos, several models in one table.

    OUT is the output of a merge; it is measured beside its specialists, where they are still there.
    """
    from r2m.extras import need

    need("evaluate", "evaluate", "sklearn", "PIL")
    from r2m.evaluation.command import evaluate as run

    request = Request(**only_given({name: given[one.key] for name, one in REQUEST.items()}))
    table, notes = run(request, out, overwrite=overwrite, quiet=quiet)
    done("\n".join(table))
    for note in notes:  # beside a table that is for a file
        say(note, err=request.table != "text")
    if out is not None and len(request.merged) == 1 and request.table == "text":
        path = request.merged[0].rpartition("=")[2]
        say(following("report", shlex.quote(path), "--evaluation", shlex.quote(out)))


@click.command(
    cls=SectionedCommand,
    epilog="Example: r2m detect merged suspicious.png clip.mp4 --detector timm:vit_base_patch16_224",
)
@click.argument("model")
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@flags(REQUEST[name] for name in DETECT)
@option(MODELS, "--adapters", is_flag=True, help="MODEL is the output of merge --format adapters: their mean logit.")
@option(DATA, "--videos", is_flag=True, help="The pictures of one directory are frames of one video.")
@option(RUN, "--json", "as_json", is_flag=True, help="A line of JSON for each picture and each video.")
@option(RUN, "--quiet", is_flag=True, help="No progress.")
def detect(
    model: str, files: tuple[str, ...], adapters: bool, videos: bool, as_json: bool, quiet: bool, **given: Any
) -> int:
    """Say of pictures, videos and directories of them how fake the detector MODEL takes them to be.

    Faces are looked at as they are in the pictures: cut them out first, as they were for training. Scores are those of
    evaluate; a video's is the mean of its frames'. What cannot be read is told, and the exit code is then 2.
    """
    import json

    from r2m.extras import need

    need("detect", "evaluate", "sklearn", "PIL")
    from r2m.evaluation import detection

    asked = only_given({name: given[REQUEST[name].key] for name in DETECT})
    found = detection.detect(model, files, Request(**asked), adapters=adapters, videos=videos, quiet=quiet)
    done("\n".join(map(json.dumps, found.rows) if as_json else detection.lines(found)))
    for line in detection.errors(found):
        say(f"Error: {line}", err=True)
    return INPUT if found.failed else DONE


COMMANDS = (evaluate, detect)
