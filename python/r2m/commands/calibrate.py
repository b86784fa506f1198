"""``r2m calibrate``."""

from __future__ import annotations

import shlex
from typing import Any

import click

from r2m.commands.given import only_given, take_options
from r2m.commands.messages import done, say
from r2m.commands.options import OFFLINE, QUIET, SectionedCommand, flags, option
from r2m.commands.process import settle_memory
from r2m.commands.way import evaluation_of, following
from r2m.evaluation.request import DATA, DETECT, REQUEST, Request
from r2m.options import OPTIONS
from r2m_kernels.errors import BadOption

_LABELLED = ("data", "root", "split", "labels", "subfolders")
_ASKED = (*(name for name in DETECT if name != "threshold"), *_LABELLED)


@click.command(
    cls=SectionedCommand,
    epilog="Example: r2m calibrate merged pictures/ --detector timm:vit_base_patch16_224",
)
@click.argument("out", metavar="OUT")
@click.argument("files", nargs=-1, metavar="[FILE]…")
@flags(REQUEST[name] for name in _ASKED)
@option(
    DATA,
    "--fakes",
    type=float,
    metavar="SHARE",
    help="How many of the pictures that it will see are fakes.  [default: 0.5; with --data as many as there]",
)
@option(
    DATA,
    "--statistics",
    is_flag=True,
    help="First estimate running means and variances of batch normalisation from the pictures, where experts changed "
    "theirs in training.",
)
@option(DATA, "--undo", is_flag=True, help="Take a calibration back: OUT is as it was, byte for byte.")
@flags([OPTIONS[name] for name in ("backend", "memory_budget", "resume")])
@OFFLINE
@QUIET
def calibrate(
    out: str, files: tuple[str, ...], fakes: float | None, statistics: bool, undo: bool, quiet: bool, **given: Any
) -> None:
    """Make probabilities of OUT, the output of a merge, mean what they say, from 32 pictures, or 16 with labels.

    Log-odds are divided by a temperature and a bias is added, both in the classifier's tensors and the same for all
    pictures, so that AUC stays. FILE: pictures without labels, videos and directories of them. OUT is merged again and
    replaced when all is done; its recipe keeps both numbers, and add, remove and sweep leave them out and say so.
    """
    settle_memory()
    from r2m.extras import need

    need("calibrate", "evaluate", "sklearn", "PIL")
    from r2m import calibration
    from r2m.progress import reporting

    asked = only_given({name: given.pop(REQUEST[name].key) for name in _ASKED})
    options = take_options(given)
    if undo and (files or "data" in asked or fakes is not None or statistics):
        raise BadOption("calibrate: --undo: expected nothing with it")
    with reporting(quiet=quiet) as progress:
        if undo:
            report, untold = calibration.undo(out, options=options, progress=progress)
        else:
            request = Request(**asked)
            report, untold = calibration.calibrate(
                out, files, request, fakes=fakes, statistics=statistics, options=options, progress=progress, quiet=True
            )
    for line in untold:
        say(line, err=True)
    if not quiet:
        done("\n".join(_said(out, report)))
        say(following("evaluate", shlex.quote(out), "--data", "PICTURES", "--out", shlex.quote(evaluation_of(out))))


def _said(out: str, report: dict[str, Any]) -> list[str]:
    from r2m_kernels.errors import printable

    one = report["calibration"]
    if one is not None and report.get("statistics"):
        return [
            *_of_head(out, one),
            f"running means and variances from the same pictures: {printable(report['statistics'])}",
        ]
    return _of_head(out, one)


def _of_head(out: str, one: dict[str, Any] | None) -> list[str]:
    from r2m_kernels.errors import printable

    if one is None:
        return [f"{printable(out)}: its calibration is taken back"]
    lines = [f"{printable(out)}: log-odds divided by {one['temperature']:.4g}, then {one['bias']:+.4g}"]
    if one.get("rule"):
        taken = "were" if one["before"] else "are taken to be"
        lines.append(f"by {one['rule']}, on {one['pictures']} pictures of which {one['fakes']:.0%} {taken} fakes")
    if one.get("before"):
        was, now = one["before"], one["after"]
        lines.append(
            f"on these: calibration error {was['ece']:.3f} → {now['ece']:.3f}, F1 at 0.5 {was['f1']:.3f} → "
            f"{now['f1']:.3f} (at the best threshold {now['best_f1']:.3f})"
        )
    return lines


COMMANDS = (calibrate,)
