"""``r2m merge`` and ``r2m plan``."""

from __future__ import annotations

from typing import Any

import click

from r2m.commands.given import job
from r2m.commands.options import (
    FILES,
    METHOD,
    REAL,
    RUN,
    STRENGTH,
    TRUNCATION,
    SectionedCommand,
    choice,
    option,
    settle_network,
)
from r2m.commands.process import exit_code, settle_memory
from r2m.methods import METHODS
from r2m.presets import PRESETS


@click.command(
    cls=SectionedCommand,
    epilog="Example: r2m merge --base base.safetensors --expert fs.safetensors --expert fr.safetensors --out merged",
)
@click.argument("recipe", required=False)
@option(
    FILES,
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace what RECIPE says, such as parameters.rank=0.2; repeat for each.",
)
@option(FILES, "--base", metavar="PATH", help="The checkpoint all experts started from.")
@option(
    FILES,
    "--expert",
    "experts",
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
    type=choice("float32", "bfloat16", "float16", "float64"),
    help="Floating-point type of the output.  [default: as in the base]",
)
@option(
    FILES,
    "--format",
    "file_format",
    type=choice("safetensors", "pth"),
    help="Of the output; pth: a state dict of torch.save.  [default: safetensors]",
)
@option(
    FILES,
    "--extra",
    type=choice("error", "average", "drop"),
    help="Tensors that all experts have and the base lacks, such as a head.  [default: error]",
)
@option(
    FILES,
    "--keep",
    multiple=True,
    metavar="GLOB",
    help="Tensors that stay the base's, by name; experts may lack them.  Repeat for each.",
)
@option(
    FILES,
    "--average",
    multiple=True,
    metavar="GLOB",
    help="Tensors that become the plain mean of the experts'; repeat for each.",
)
@option(
    FILES,
    "--rename",
    "renames",
    multiple=True,
    metavar="OLD=NEW",
    help="Tensors of all checkpoints whose names begin with OLD begin with NEW, or nothing, instead; repeat for each.",
)
@option(FILES, "--drop", "drops", multiple=True, metavar="OLD", help="Tensors whose names begin with OLD are left out.")
@option(
    FILES,
    "--preset",
    type=choice(*PRESETS),
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
    "head_tensors",
    multiple=True,
    metavar="GLOB",
    help="The classifier's names; repeat for each.  [default: names with head, fc, classifier…]",
)
@option(
    METHOD,
    "--method",
    type=choice(*METHODS),
    help="; ".join(f"{name}: {method.title}" for name, method in METHODS.items()) + ".  [default: r2m]",
)
@option(
    METHOD,
    "--scale",
    type=float,
    help="Factor of the sum in task_arithmetic and dare (0.3, usual where it is not tuned), cart, tsv_m and iso_c, and "
    "of the mean in ties (1, not tuned).",
)
@option(
    METHOD, "--density", type=float, help="Share of each expert's elements that ties and dare keep.  [default: 0.2]"
)
@option(REAL, "--real-rank", type=int, metavar="K", help="Dimension of the Real subspace.  [default: 1]")
@option(
    REAL,
    "--center/--no-center",
    default=None,
    help="Subtract the mean task vector before the subspace is computed.  [default: no-center]",
)
@option(
    REAL,
    "--residual",
    type=choice("core", "own"),
    help="What a task vector loses: the core, or its own part in the subspace.  [default: core]",
)
@option(REAL, "--core-scale", type=float, help="Factor of the core.  [default: 1]")
@option(
    REAL,
    "--core-mode",
    type=choice("mean", "sum", "restored"),
    help="The core as it is, times the number of experts, or with half of the length that averaging took from it.  "
    "[default: restored]",
)
@option(
    REAL,
    "--layer-weight",
    type=choice("none", "frobenius"),
    help="A tensor's weight in the Gram matrix: 1, or 1/‖its task vectors‖².  [default: none]",
)
@option(
    REAL,
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Tensors to keep out of subspace and truncation, by name; repeat for each.",
)
@option(
    TRUNCATION,
    "--rank",
    metavar="RANK",
    help="With a point a share of the full rank (0.1; 1.0: all), without one a rank (16); in star a share of the "
    "nuclear norm, 0.4 if left out; in cart, r2m_truncated and r2m_paper 0.1.  [default: 1.0]",
)
@option(
    TRUNCATION,
    "--rank-of",
    "ranks",
    multiple=True,
    metavar="GLOB=RANK",
    help="Another rank for these tensors, by name; the first that fits counts.  Repeat for each.",
)
@option(
    TRUNCATION,
    "--svd",
    type=choice("randomized", "textbook", "exact"),
    help="How to truncate.  [default: randomized]",
)
@option(
    TRUNCATION, "--power-iterations", type=int, help="Of the truncation: more is closer to the optimum.  [default: 2]"
)
@option(TRUNCATION, "--oversampling", type=int, help="Columns of the sketch beyond the rank.  [default: 8]")
@option(
    TRUNCATION,
    "--tolerance",
    type=float,
    help="Stop iterating where the kept energy grows by less than this share.  [default: never]",
)
@option(TRUNCATION, "--seed", type=int, help="Of the random test matrices.  [default: 0]")
@option(STRENGTH, "--eta", type=float, help="How much of the residuals is added.  [default: 1]")
@option(
    STRENGTH,
    "--eta-mode",
    type=choice("relative", "constant", "core_norm", "sum"),
    help="relative: their norm is ETA times the core's; constant: ETA times their mean; core_norm: that "
    "times the core's norm; sum: ETA times their sum.  [default: constant]",
)
@option(
    STRENGTH,
    "--norm-match/--no-norm-match",
    default=None,
    help="Scale all experts' residuals to one norm first.  [default: norm-match]",
)
@option(
    STRENGTH,
    "--row-power",
    type=float,
    metavar="P",
    help="In each row of a matrix, weigh an expert's residual by the P-th power of its length there; 0: all alike. "
    "Not with --eta-mode relative.  [default: 3]",
)
@option(
    STRENGTH,
    "--scale-by",
    type=choice("none", "layer", "column"),
    help="Lengthen the change of each matrix towards the experts' own: as a whole, or column by column.  "
    "[default: none]",
)
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
        first = team.member == 0
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
def plan(processes: int | None, machines: int, **given: Any) -> int:
    """Show what a merge would read, write, hold and take; its exit code is 1 where disk or budget do not suffice."""
    return _plan(given, processes=processes, machines=machines)


def _plan(given: dict[str, Any], *, processes: int | None, machines: int) -> int:
    from r2m.execute import plan_merge

    found, lines = plan_merge(
        **job({name: value for name, value in given.items() if name not in ("overwrite", "quiet", "resume")}),
        overwrite=given["overwrite"],
        processes=processes,
        machines=machines,
    )
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
