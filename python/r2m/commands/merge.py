"""``r2m merge`` and ``r2m plan``."""

from __future__ import annotations

from typing import Any

import click

from r2m.checkpoints.formats import FORMATS, SAFETENSORS
from r2m.commands.given import job
from r2m.commands.options import RUN, SectionedCommand, flags, option, settle_network
from r2m.commands.process import exit_code, settle_memory
from r2m.presets import PRESETS
from r2m_kernels.config import FILES, FLAGS, METHOD, METHODS


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
@option(FILES, "--overwrite", is_flag=True, help="Replace DIR if a former merge wrote it, or it is empty.")
@option(
    FILES,
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Start another file where one would hold more than this.",
)
@option(
    FILES,
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Floating-point type of the output.  [default: as in the base]",
)
@option(
    FILES,
    "--format",
    type=click.Choice(list(FORMATS)),
    help="Of the output; "
    + "; ".join(f"{name}: {one.title}" for name, one in FORMATS.items() if not one.direct)
    + f".  [default: {SAFETENSORS.name}]",
)
@option(
    FILES,
    "--rename",
    multiple=True,
    metavar="OLD=NEW",
    help="Tensors of all checkpoints whose names begin with OLD begin with NEW, or nothing, instead; repeat for each.",
)
@option(FILES, "--drop", multiple=True, metavar="OLD", help="Tensors whose names begin with OLD are left out.")
@option(
    FILES,
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Names as known detectors have them: " + "; ".join(f"{name}: {one.title}" for name, one in PRESETS.items()),
)
@option(
    FILES,
    "--head",
    metavar="RULE",
    help="What becomes of the classifier: mean of the experts', base, expert:NAME, or refit (refit:logistic) on "
    "features of the merged model.  [default: merged like the rest]",
)
@option(
    FILES, "--head-features", metavar="PATH", help="For refit: a file with tensors features (n, d) and labels (n,)."
)
@option(
    FILES,
    "--head-tensor",
    multiple=True,
    metavar="GLOB",
    help="The classifier's names; repeat for each.  [default: names with head, fc, classifier…]",
)
@option(
    METHOD,
    "--method",
    type=click.Choice(list(METHODS)),
    help="; ".join(f"{name}: {method.title}" for name, method in METHODS.items()) + ".  [default: r2m]",
)
@flags(FLAGS.values())
@option(RUN, "--device", metavar="DEVICE", help="cpu, cuda, cuda:1.  [default: cpu]")
@option(
    RUN,
    "--backend",
    default="auto",
    show_default=True,
    help="Who computes: auto, native (CPUs), triton (GPUs) or torch.",
)
@option(
    RUN,
    "--memory-budget",
    metavar="SIZE",
    help="Working memory of each process, such as 4GiB.  [default: 60 % of what is free]",
)
@option(RUN, "--resume", is_flag=True, help="Go on from where the same merge was cut off.")
@option(RUN, "--dry-run", is_flag=True, help="Show what it would read, write, hold and take, and stop.")
@option(
    RUN,
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=settle_network,
    help="Of hf://owner/name[@revision][/file] checkpoints, only what is in the cache.",
)
@option(RUN, "--quiet", is_flag=True, help="Say nothing unless it fails.")
def merge(**given: Any) -> int | None:
    """Merge checkpoints from files into a new directory: as RECIPE describes it, or --base and --expert."""
    if given.pop("dry_run"):
        return _plan(given, processes=None, machines=1)
    settle_memory()
    from r2m import distributed
    from r2m.execute import merge_files
    from r2m.progress import reporting

    quiet, out = given.pop("quiet"), given["out"]
    overwrite, resume = given.pop("overwrite"), given.pop("resume")
    with distributed.team() as team:
        first = team.index == 0
        try:
            with reporting(quiet=quiet or not first) as progress:
                report = merge_files(**job(given), overwrite=overwrite, resume=resume, team=team, progress=progress)
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
    params=[parameter for parameter in merge.params if parameter.name not in ("dry_run", "resume")],
    epilog="Example: r2m plan --base base.safetensors --expert fs.safetensors --expert fr.safetensors --out merged",
)
@option(RUN, "--processes", type=click.IntRange(1), help="Of torchrun.  [default: 1]")
@option(RUN, "--machines", type=click.IntRange(1), default=1, help="Like this one, for the processes.  [default: 1]")
@option(RUN, "--list", "listed", is_flag=True, help="Also show every piece of work, in the order in which it is done.")
def plan(processes: int | None, machines: int, listed: bool, **given: Any) -> int:
    """Show what a merge would read, write, hold and take; its exit code is 1 where disk or budget do not suffice."""
    return _plan(given, processes=processes, machines=machines, listed=listed)


def _plan(given: dict[str, Any], *, processes: int | None, machines: int, listed: bool = False) -> int:
    from r2m.execute import plan_merge
    from r2m.forecast import work_lines

    found, lines = plan_merge(
        **job({name: value for name, value in given.items() if name not in ("overwrite", "quiet", "resume")}),
        overwrite=given["overwrite"],
        processes=processes,
        machines=machines,
    )
    lines += work_lines(found) if listed else []
    for line in lines if not given["quiet"] else ():
        click.echo(line)
    return 0 if found.enough else 1


def tell(report: dict[str, Any], out: str, quiet: bool) -> None:
    """What a merge did, in three lines, and its warnings."""
    if quiet:
        return
    for line in _summary(report, out):
        click.echo(line)
    for warning in report["warnings"]:
        click.echo(f"Warning: {warning}", err=True)


def _summary(report: dict[str, Any], out: str) -> list[str]:
    from r2m.progress import readable_bytes

    core, residual, output = report["core"], report["residual"], report["output"]
    count = len(core["coefficients"])
    coefficients = ", ".join(f"{name} {value:.3f}" for name, value in core["coefficients"].items())
    size, seconds = readable_bytes(output["bytes"]), output["seconds"]
    ratio, eta = _number(core["norm_ratio_to_mean"]), _number(residual["eta_used"])
    numbers = [f"‖core‖/‖mean‖ {ratio}", f"λ {core['scale_used']:.3g}", f"η {eta}"]
    if residual["norm_ratio_to_core"] is not None:  # made as rows pass otherwise: nobody has seen it
        numbers.append(f"‖residual term‖/‖core‖ {residual['norm_ratio_to_core']:.3g}")
    return [
        f"Merged {count} expert{'s' if count > 1 else ''} into {out}: {size} in {seconds:.1f} s",
        f"core coefficients: {coefficients}",
        ", ".join(numbers),
    ]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"


COMMANDS = (merge, plan)
