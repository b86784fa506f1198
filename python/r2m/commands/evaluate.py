"""``r2m evaluate``."""

from __future__ import annotations

from typing import Any

import click

from r2m.commands.options import RUN, SectionedCommand, option
from r2m.presets import PRESETS

_MODELS, _DATA = "Models", "Data"


@click.command(
    cls=SectionedCommand,
    epilog="Example: r2m evaluate --model r2m=merged --detector clip:clip-vit-large-patch14 --data DFDC.json",
)
@option(
    _MODELS, "--model", "models", multiple=True, metavar="[NAME=]PATH", help="A checkpoint to run; repeat for each."
)
@option(
    _MODELS,
    "--detector",
    metavar="KIND",
    help="What the checkpoints are weights of: transformers; clip:DIR (DF40, DeepfakeBench; DIR: its CLIP's "
    "config.json); timm:NAME; open_clip:NAME; MODULE:FUNCTION, which gives a torch module.",
)
@option(_MODELS, "--preset", type=click.Choice(list(PRESETS)), help="Names of the checkpoints' tensors, as of merge.")
@option(
    _MODELS,
    "--scores",
    multiple=True,
    metavar="[NAME=]CSV",
    help="Finished scores of a model: columns path, label, probability, and video, dataset if there.  Repeat for each.",
)
@option(_MODELS, "--size", type=int, help="Pixels of a side.  [default: as the checkpoint's directory says]")
@option(_MODELS, "--mean", metavar="R,G,B", help="Of the channels.  [default: as the checkpoint's directory says]")
@option(_MODELS, "--std", metavar="R,G,B", help="Of the channels.  [default: as the checkpoint's directory says]")
@option(
    _DATA,
    "--data",
    multiple=True,
    metavar="PATH",
    help="DeepfakeBench's or DF40's JSON, or a folder with real/ and fake/, or one of such.  Repeat for each.",
)
@option(_DATA, "--root", metavar="DIR", help="Of the paths in JSON files.  [default: the file's directory]")
@option(
    _DATA,
    "--split",
    type=click.Choice(["train", "val", "test"]),
    default="test",
    show_default=True,
    help="Of JSON files.",
)
@option(_DATA, "--compression", default="c23", show_default=True, help="Of FaceForensics++ in JSON files.")
@option(
    _DATA, "--label", "labels", multiple=True, metavar="NAME=0|1", help="Of JSON files.  [default: 0 if it has real]"
)
@option(_DATA, "--frames", type=click.IntRange(1), default=32, show_default=True, help="Of a video, at most, spread.")
@option(
    _DATA, "--strict", is_flag=True, help="An image that cannot be read ends it.  [default: it is left out and told]"
)
@option(
    _DATA,
    "--deepfakebench-compat",
    "compat",
    is_flag=True,
    help="The first frames of a video, and videos known by their folder's name alone, as DeepfakeBench has it.",
)
@option(RUN, "--out", metavar="DIR", help="Where evaluation.json and scores-N.csv go.  [default: nowhere]")
@option(RUN, "--overwrite", is_flag=True, help="Replace an evaluation in DIR.")
@option(RUN, "--bootstrap", type=click.IntRange(0), default=1000, show_default=True, help="Resamples of videos.")
@option(RUN, "--seed", type=int, default=0, show_default=True, help="Of the resamples.")
@option(RUN, "--batch", type=click.IntRange(1), default=32, show_default=True, help="Images at a time.")
@option(RUN, "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@option(RUN, "--quiet", is_flag=True, help="No progress.")
def evaluate(**given: Any) -> None:
    """Measure detectors on datasets: accuracy, AUC, EER and AP over frames and videos, several models in one table."""
    from r2m.evaluation.command import evaluate as run

    for line in run(**given):
        click.echo(line)


COMMANDS = (evaluate,)
