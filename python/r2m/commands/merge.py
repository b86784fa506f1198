"""``r2m merge`` and ``r2m plan``."""

from __future__ import annotations

import shlex
from typing import Any

import click

from r2m.commands.given import recipe_of, take_options
from r2m.commands.messages import done, say
from r2m.commands.options import OFFLINE, QUIET, SectionedCommand, flags, method_name, option
from r2m.commands.process import exit_code, settle_memory
from r2m.commands.way import evaluation_of, following
from r2m.options import OPTIONS, RUN
from r2m.recipe import ARRANGEMENT, OUTPUT
from r2m_kernels.config import FLAGS, METHODS, OFFERED
from r2m_kernels.fields import FILES, METHOD


@click.command(
    cls=SectionedCommand,
    epilog="Example: r2m merge --base base.safetensors --expert fs.safetensors --expert fr.safetensors --out merged",
)
@click.argument("recipe", required=False)
@option(
    FILES,
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace what RECIPE says, such as parameters.rank=0.2; repeat for each.",
)
@option(FILES, "--base", metavar="PATH", help="The checkpoint all experts started from.")
@option(
    FILES,
    "--expert",
    multiple=True,
    metavar="[NAME=]PATH",
    help="A fine-tuned checkpoint; repeat for each. PATH: a safetensors file, a .pth file, a Hugging Face directory or "
    "hf://owner/name[@revision][/file].",
)
@option(FILES, "--out", required=True, metavar="DIR", help="The directory to create.")
@flags(one for one in OPTIONS.values() if one.section == FILES)
@flags(OUTPUT.values())
@option(
    FILES,
    "--rename",
    multiple=True,
    metavar="OLD=NEW",
    help="Tensors of all checkpoints whose names begin with OLD begin with NEW, or nothing, instead; repeat for each.",
)
@option(FILES, "--drop", multiple=True, metavar="OLD", help="Tensors whose names begin with OLD are left out.")
@flags(ARRANGEMENT.values())
@option(
    METHOD,
    "--method",
    type=method_name,
    metavar=f"[{'|'.join([*OFFERED, *METHODS.others])}]",  # a former method is still understood
    help="; ".join(f"{name}: {method.title}" for name, method in OFFERED.items()) + ".  [default: r2m]",
)
@flags(FLAGS.values())
@flags(one for one in OPTIONS.values() if one.section == RUN)
@option(RUN, "--dry-run", is_flag=True, help="Show what it would read, write, hold and take, and stop.")
@OFFLINE
@QUIET
def merge(out: str, quiet: bool, dry_run: bool, **given: Any) -> int | None:
    """Merge checkpoints from files into a new directory: as RECIPE describes it, or --base and --expert."""
    if dry_run:
        return _plan(out, given, quiet=quiet)
    settle_memory()
    from r2m import distributed
    from r2m.merge import merge_files
    from r2m.progress import reporting

    with distributed.processes(given.get("device")) as processes:
        first = processes.index == 0
        try:
            options = take_options(given)
            with reporting(quiet=quiet or not first) as progress:
                report = merge_files(recipe_of(given), out, options, processes=processes, progress=progress)
        except Exception as error:
            # All processes have the same error, but for the loss of one of them: told once.
            code = exit_code(error)
            if first or code is None or isinstance(error, distributed.LostProcess):
                raise
            return code
    if first:
        tell(report, out, quiet)
    return None


@click.command(
    cls=SectionedCommand,
    params=[parameter for parameter in merge.params if parameter.name not in ("dry_run", "resume", "screen")],
    epilog="Example: r2m plan --base base.safetensors --expert fs.safetensors --expert fr.safetensors --out merged",
)
@option(RUN, "--processes", type=click.IntRange(1), default=1, help="Of torchrun.  [default: 1]")
@option(RUN, "--machines", type=click.IntRange(1), default=1, help="Like this one, for the processes.  [default: 1]")
@option(RUN, "--list", "listed", is_flag=True, help="Also show every piece of work, in the order in which it is done.")
def plan(out: str, quiet: bool, processes: int, machines: int, listed: bool, **given: Any) -> int:
    """Show what a merge would read, write, hold and take; its exit code is 1 where disk or budget do not suffice."""
    return _plan(out, given, quiet=quiet, processes=processes, machines=machines, listed=listed)


def _plan(out: str, given: dict[str, Any], *, quiet: bool, listed: bool = False, **shared: Any) -> int:
    from r2m.forecast import work_lines
    from r2m.merge import plan_merge

    options = take_options(given)
    planned, lines = plan_merge(recipe_of(given), out, options, **shared)
    for line in [*lines, *(work_lines(planned) if listed else ())] if not quiet else ():
        say(line)
    if planned.enough and not quiet:
        words = [shlex.quote(given["recipe"])] if given.get("recipe") else ["…"]  # all that was given, again
        say(following("merge", *words, "--out", shlex.quote(out)))
    return 0 if planned.enough else 1


def tell(report: dict[str, Any], out: str, quiet: bool) -> None:
    """What a merge did, in words, its warnings, and what comes next."""
    if quiet:
        return
    from r2m_kernels.errors import printable

    done("\n".join(_summary(report, out)))
    for note in report.get("notes", ()):
        say(f"Note: {printable(note)}", err=True)
    for warning in report["warnings"]:
        say(f"Warning: {printable(warning)}", err=True)


def _summary(report: dict[str, Any], out: str) -> list[str]:
    from r2m_kernels.errors import printable
    from r2m_kernels.progress import readable_bytes
    from r2m_kernels.summary import in_words

    output, count = report["output"], len(report["experts"])
    size, seconds = readable_bytes(output["bytes"]), output["seconds"]
    return [
        f"Merged {count} expert{'s' * (count > 1)} into {printable(out)}: {size} in {seconds:.1f} s",
        *in_words(report),
        *_head(report.get("arrangement", {}).get("head", {})),
        *_adapters(report.get("adapters")),
        *_factors(report.get("factors"), out),
        following("evaluate", shlex.quote(out), "--data", "PICTURES", "--out", shlex.quote(evaluation_of(out))),
    ]


def _head(head: dict[str, Any]) -> list[str]:
    """What became of the classifier, and what was taken for it; nothing where it was merged like the rest."""
    from r2m_kernels.errors import printable

    if head.get("rule") in (None, "merge") or not head["tensors"]:
        return []
    return [f"Classifier ({printable(head['rule'])}): {', '.join(map(printable, head['tensors']))}."]


def _adapters(about: dict[str, Any] | None) -> list[str]:
    """What adapters hold, and what they do not; nothing where there are none."""
    if about is None:
        return []
    from r2m_kernels.errors import printable

    counts = f"{len(about['ranks'])} layers by factors, {len(about['saved'])} modules whole"
    averaged = f"; the mean in all of them: {', '.join(map(printable, about['averaged']))}" if about["averaged"] else ""
    return [f"adapters ({about['kind']}): {counts}{averaged}"]


def _factors(about: dict[str, int] | None, out: str) -> list[str]:
    """What was taken of former merges, and what was not; nothing where nothing is kept."""
    if about is None:
        return []
    from r2m.kept_factors import directory_of
    from r2m_kernels.errors import printable

    more = f", {about['not_kept']} not kept (too large for the budget, or too steep)" if about["not_kept"] else ""
    place = printable(directory_of(out).name)
    return [f"Truncations of single experts: {about['taken']} taken from {place}, {about['made']} made and kept{more}"]


COMMANDS = (merge, plan)
