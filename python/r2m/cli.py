"""The command ``r2m``: options in, exit code out.

Exit codes: 0 done; 1 the machine refused (no space, no permission); 2 the input or an option cannot be used;
130 Ctrl-C. torch is imported inside the commands, so that ``--help`` is immediate.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from r2m.methods import FLAGS, METHODS
from r2m.presets import PRESETS

if TYPE_CHECKING:
    from r2m.arrangement import Arrangement
    from r2m.recipe import Recipe

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


class _SectionOption(click.Option):
    """An option that ``--help`` lists under a heading."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class _SectionedCommand(click.Command):
    """A command whose ``--help`` groups its options by :attr:`_SectionOption.section`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # the usage line shows arguments
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def _option(section: str, *names: str, **kwargs: Any) -> Callable[[Any], Any]:
    # `default` would make an option that was left out look given; the help shows the defaults of MergeConfig.
    return click.option(*names, cls=_SectionOption, section=section, **kwargs)


def _choice(*choices: str) -> click.Choice[str]:
    return click.Choice(choices)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from r2m_kernels import __version__

        click.echo(f"r2m {__version__}")
        ctx.exit()


def _settle_network(ctx: click.Context, _: click.Parameter, offline: bool) -> None:
    if offline:
        from r2m import hub

        hub.work_offline()


_OFFLINE = click.option(
    "--offline", is_flag=True, expose_value=False, callback=_settle_network, help="Of hf:// paths, the cache alone."
)


@click.group(name="r2m", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def r2m() -> None:
    """Merge detectors that were fine-tuned from one base into one detector, without data (R²M)."""


_FILES, _METHOD, _REAL, _TRUNCATION, _STRENGTH, _RUN = (
    "Files",
    "Method",
    "Real subspace",
    "Residual truncation",
    "Strength of the residuals",
    "Running",
)


@r2m.command(
    cls=_SectionedCommand,
    epilog="Example: r2m merge --base base.safetensors --expert fs.safetensors --expert fr.safetensors --out merged",
)
@click.argument("recipe", required=False)
@_option(
    _FILES,
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace what RECIPE says, such as parameters.rank=0.2; repeat for each.",
)
@_option(_FILES, "--base", metavar="PATH", help="The checkpoint all experts started from.")
@_option(
    _FILES,
    "--expert",
    "experts",
    multiple=True,
    metavar="[NAME=]PATH",
    help="A fine-tuned checkpoint; repeat for each. PATH: a safetensors file, a .pth file, a Hugging Face directory or "
    "hf://owner/name[@revision][/file].",
)
@_option(_FILES, "--out", required=True, metavar="DIR", help="The directory to create.")
@_option(_FILES, "--overwrite", is_flag=True, help="Replace DIR if a former merge wrote it, or it is empty.")
@_option(
    _FILES,
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Start another file where one would hold more than this.",
)
@_option(
    _FILES,
    "--dtype",
    type=_choice("float32", "bfloat16", "float16", "float64"),
    help="Floating-point type of the output.  [default: as in the base]",
)
@_option(
    _FILES,
    "--format",
    "file_format",
    type=_choice("safetensors", "pth"),
    help="Of the output; pth: a state dict of torch.save.  [default: safetensors]",
)
@_option(
    _FILES,
    "--extra",
    type=_choice("error", "average", "drop"),
    help="Tensors that all experts have and the base lacks, such as a head.  [default: error]",
)
@_option(
    _FILES,
    "--keep",
    multiple=True,
    metavar="GLOB",
    help="Tensors that stay the base's, by name; experts may lack them.  Repeat for each.",
)
@_option(
    _FILES,
    "--average",
    multiple=True,
    metavar="GLOB",
    help="Tensors that become the plain mean of the experts'; repeat for each.",
)
@_option(
    _FILES,
    "--rename",
    "renames",
    multiple=True,
    metavar="OLD=NEW",
    help="Tensors of all checkpoints whose names begin with OLD begin with NEW, or nothing, instead; repeat for each.",
)
@_option(
    _FILES, "--drop", "drops", multiple=True, metavar="OLD", help="Tensors whose names begin with OLD are left out."
)
@_option(
    _FILES,
    "--preset",
    type=_choice(*PRESETS),
    help="Names as known detectors have them: " + "; ".join(f"{name}: {one.title}" for name, one in PRESETS.items()),
)
@_option(
    _FILES,
    "--head",
    metavar="RULE",
    help="What becomes of the classifier: mean of the experts', base, expert:NAME, or refit (refit:logistic) on "
    "features of the merged model.  [default: merged like the rest]",
)
@_option(
    _FILES, "--head-features", metavar="PATH", help="For refit: a file with tensors features (n, d) and labels (n,)."
)
@_option(
    _FILES,
    "--head-tensor",
    "head_tensors",
    multiple=True,
    metavar="GLOB",
    help="The classifier's names; repeat for each.  [default: names with head, fc, classifier…]",
)
@_option(
    _METHOD,
    "--method",
    type=_choice(*METHODS),
    help="; ".join(f"{name}: {method.title}" for name, method in METHODS.items()) + ".  [default: r2m]",
)
@_option(
    _METHOD,
    "--scale",
    type=float,
    help="Factor of the sum in task_arithmetic and dare (0.3, usual where it is not tuned), cart, tsv_m and iso_c, and "
    "of the mean in ties (1, not tuned).",
)
@_option(
    _METHOD, "--density", type=float, help="Share of each expert's elements that ties and dare keep.  [default: 0.2]"
)
@_option(_REAL, "--real-rank", type=int, metavar="K", help="Dimension of the Real subspace.  [default: 1]")
@_option(
    _REAL,
    "--center/--no-center",
    default=None,
    help="Subtract the mean task vector before the subspace is computed.  [default: no-center]",
)
@_option(
    _REAL,
    "--residual",
    type=_choice("core", "own"),
    help="What a task vector loses: the core, or its own part in the subspace.  [default: core]",
)
@_option(_REAL, "--core-scale", type=float, help="Factor of the core.  [default: 1]")
@_option(
    _REAL,
    "--core-mode",
    type=_choice("mean", "sum", "restored"),
    help="The core as it is, times the number of experts, or with half of the length that averaging took from it.  "
    "[default: restored]",
)
@_option(
    _REAL,
    "--layer-weight",
    type=_choice("none", "frobenius"),
    help="A tensor's weight in the Gram matrix: 1, or 1/‖its task vectors‖².  [default: none]",
)
@_option(
    _REAL,
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Tensors to keep out of subspace and truncation, by name; repeat for each.",
)
@_option(
    _TRUNCATION,
    "--rank",
    metavar="RANK",
    help="With a point a share of the full rank (0.1; 1.0: all), without one a rank (16); in star a share of the "
    "nuclear norm, 0.4 if left out; in cart, r2m_truncated and r2m_paper 0.1.  [default: 1.0]",
)
@_option(
    _TRUNCATION,
    "--rank-of",
    "ranks",
    multiple=True,
    metavar="GLOB=RANK",
    help="Another rank for these tensors, by name; the first that fits counts.  Repeat for each.",
)
@_option(
    _TRUNCATION,
    "--svd",
    type=_choice("randomized", "textbook", "exact"),
    help="How to truncate.  [default: randomized]",
)
@_option(
    _TRUNCATION, "--power-iterations", type=int, help="Of the truncation: more is closer to the optimum.  [default: 2]"
)
@_option(_TRUNCATION, "--oversampling", type=int, help="Columns of the sketch beyond the rank.  [default: 8]")
@_option(
    _TRUNCATION,
    "--tolerance",
    type=float,
    help="Stop iterating where the kept energy grows by less than this share.  [default: never]",
)
@_option(_TRUNCATION, "--seed", type=int, help="Of the random test matrices.  [default: 0]")
@_option(_STRENGTH, "--eta", type=float, help="How much of the residuals is added.  [default: 1]")
@_option(
    _STRENGTH,
    "--eta-mode",
    type=_choice("relative", "constant", "core_norm", "sum"),
    help="relative: their norm is ETA times the core's; constant: ETA times their mean; core_norm: that "
    "times the core's norm; sum: ETA times their sum.  [default: constant]",
)
@_option(
    _STRENGTH,
    "--norm-match/--no-norm-match",
    default=None,
    help="Scale all experts' residuals to one norm first.  [default: norm-match]",
)
@_option(
    _STRENGTH,
    "--row-power",
    type=float,
    metavar="P",
    help="In each row of a matrix, weigh an expert's residual by the P-th power of its length there; 0: all alike. "
    "Not with --eta-mode relative.  [default: 3]",
)
@_option(
    _STRENGTH,
    "--scale-by",
    type=_choice("none", "layer", "column"),
    help="Lengthen the change of each matrix towards the experts' own: as a whole, or column by column.  "
    "[default: none]",
)
@_option(_RUN, "--device", metavar="DEVICE", help="cpu, cuda, cuda:1.  [default: cpu]")
@_option(
    _RUN,
    "--backend",
    default="auto",
    show_default=True,
    help="Who computes: auto, native (CPUs), triton (GPUs) or torch.",
)
@_option(
    _RUN,
    "--memory-budget",
    metavar="SIZE",
    help="Working memory of each process, such as 4GiB.  [default: 60 % of what is free]",
)
@_option(_RUN, "--resume", is_flag=True, help="Go on from where the same merge was cut off.")
@_option(_RUN, "--dry-run", is_flag=True, help="Show what it would read, write, hold and take, and stop.")
@_option(
    _RUN,
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=_settle_network,
    help="Of hf://owner/name[@revision][/file] checkpoints, only what is in the cache.",
)
@_option(_RUN, "--quiet", is_flag=True, help="Say nothing unless it fails.")
def merge(**given: Any) -> int | None:
    """Merge checkpoints from files into a new directory: as RECIPE describes it, or --base and --expert."""
    if given.pop("dry_run"):
        return _plan(given, processes=None, machines=1)
    _settle_memory()
    from r2m import distributed
    from r2m.execute import merge_files
    from r2m.progress import reporting

    quiet, out = given.pop("quiet"), given["out"]
    overwrite, resume = given.pop("overwrite"), given.pop("resume")
    with distributed.team() as team:
        first = team.member == 0
        try:
            with reporting(quiet=quiet or not first) as progress:
                report = merge_files(**_job(given), overwrite=overwrite, resume=resume, team=team, progress=progress)
        except Exception as error:
            # All processes have the same error, but for the loss of one of them: told once.
            if first or isinstance(error, distributed.LostProcess) or not _is_expected(error):
                raise
            return _exit_code(error)
    if first:
        _tell(report, out, quiet)
    return None


def _tell(report: dict[str, Any], out: str, quiet: bool) -> None:
    if quiet:
        return
    for line in _summary(report, out):
        click.echo(line)
    for warning in report["warnings"]:
        click.echo(f"Warning: {warning}", err=True)


def _job(given: dict[str, Any]) -> dict[str, Any]:
    """Options of ``merge`` as arguments of :func:`r2m.execute.open_job`."""
    from r2m.methods import make_config
    from r2m.naming import name_experts

    files = ("base", "experts", "out", "dtype", "file_format", "max_shard_size")
    names = (*files, "method", "device", "backend", "memory_budget")
    arguments = {name: given[name] for name in names}
    rest = {name: value for name, value in given.items() if name not in names and value not in (None, ())}
    path, changes = rest.pop("recipe", None), rest.pop("changes", ())
    if path is not None:
        return {**arguments, **_described(path, changes, given, rest)}
    for name, flag in (("base", "--base"), ("experts", "--expert")):
        if not arguments[name]:
            raise click.UsageError(f"Missing option '{flag}', or a recipe.")
    if changes:
        raise click.UsageError("--set: changes a recipe, and none is given.")
    arguments["method"] = arguments["method"] or "r2m"
    arguments["file_format"] = arguments["file_format"] or "safetensors"
    if "rank" in rest:
        rest["rank"] = _read_rank(rest["rank"])
    if "ranks" in rest:
        rest["ranks"] = [(glob, _read_rank(rank)) for glob, _, rank in (one.rpartition("=") for one in rest["ranks"])]
    wanted = _arrangement(rest)
    config = make_config(arguments["method"], rest)
    return {**arguments, "experts": name_experts(arguments["experts"]), "config": config, "arrangement": wanted}


_ARRANGEMENT = ("renames", "drops", "preset", "head", "head_tensors", "head_features")


def _arrangement(rest: dict[str, Any]) -> Arrangement:
    """Takes what is about it out of the options."""
    from r2m.arrangement import Arrangement

    given = {name: rest.pop(name) for name in _ARRANGEMENT if name in rest}
    rules: dict[str, str | None] = dict(_rule(text) for text in given.pop("renames", ()))
    rules.update(dict.fromkeys(given.pop("drops", ())))
    return Arrangement(rename=rules, **given)


def _rule(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not old or not separator:
        raise click.UsageError(f"--rename {text}: expected OLD=NEW, such as 'module.='.")
    return old, new


def _described(path: str, changes: Sequence[str], given: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of :func:`r2m.execute.open_job`'s arguments; options may not say it again."""
    from r2m.recipe import read_recipe

    again = [name for name in ("base", "experts", "method") if given[name]] + list(rest)
    if again:
        flag = "--" + FLAGS.get(again[0], again[0]).replace("_", "-")
        raise click.UsageError(f"{flag}: the recipe says that; --set KEY=VALUE changes it.")
    recipe = read_recipe(path, changes)
    output = {name: given[name] for name in ("dtype", "file_format") if given[name]}
    return {**recipe.arguments(), **output}


@r2m.command(
    cls=_SectionedCommand,
    params=[parameter for parameter in merge.params if parameter.name not in ("dry_run", "resume")],
    epilog="Example: r2m plan --base base.safetensors --expert fs.safetensors --expert fr.safetensors --out merged",
)
@_option(_RUN, "--processes", type=click.IntRange(1), help="Of torchrun.  [default: 1]")
@_option(_RUN, "--machines", type=click.IntRange(1), default=1, help="Like this one, for the processes.  [default: 1]")
def plan(processes: int | None, machines: int, **given: Any) -> int:
    """Show what a merge would read, write, hold and take; its exit code is 1 where disk or budget do not suffice."""
    return _plan(given, processes=processes, machines=machines)


def _plan(given: dict[str, Any], *, processes: int | None, machines: int) -> int:
    from r2m.execute import plan_merge

    found, lines = plan_merge(
        **_job({name: value for name, value in given.items() if name not in ("overwrite", "quiet", "resume")}),
        overwrite=given["overwrite"],
        processes=processes,
        machines=machines,
    )
    for line in lines if not given["quiet"] else ():
        click.echo(line)
    return 0 if found.enough else 1


def _running(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of where and how to compute, as merge has them."""
    names = ("device", "backend", "memory_budget", "offline", "quiet")
    shared = [one for one in merge.params if one.name in names]
    before = getattr(command, "__click_params__", [])  # in which click keeps them, the last one first
    command.__click_params__ = [*reversed(shared), *before]  # type: ignore[attr-defined]
    return command


@r2m.command(cls=_SectionedCommand)
@_running
@click.argument("out", metavar="OUT")
@_option(_FILES, "--expert", required=True, metavar="[NAME=]PATH", help="The new specialist.")
@_option(_FILES, "--weight", type=float, help="Of it, where the others have 1 or their own.  [default: as merge]")
@_option(_FILES, "--rename", "renames", multiple=True, metavar="OLD=NEW", help="In its names alone; repeat for each.")
@_option(_RUN, "--resume", is_flag=True, help="Go on from where the same was cut off.")
def add(out: str, expert: str, weight: float | None, renames: tuple[str, ...], **given: Any) -> None:
    """Merge OUT, the output of a merge, again with one specialist more; OUT is replaced when all is done."""
    from r2m.naming import name_experts
    from r2m.project import read_project, with_expert

    recipe = read_project(out)
    ((name, path),) = name_experts([expert]).items()
    rules: dict[str, str | None] = dict(_rule(text) for text in renames)
    _merge_again(out, with_expert(recipe, name, path, weight=weight, rename=rules), **given)


@r2m.command(cls=_SectionedCommand)
@_running
@click.argument("out", metavar="OUT")
@_option(_FILES, "--expert", required=True, metavar="NAME", help="Which specialist.")
@_option(_RUN, "--resume", is_flag=True, help="Go on from where the same was cut off.")
def remove(out: str, expert: str, **given: Any) -> None:
    """Merge OUT, the output of a merge, again without a specialist; OUT is replaced when all is done."""
    from r2m.project import read_project, without_expert

    _merge_again(out, without_expert(read_project(out), expert), **given)


def _merge_again(out: str, recipe: Recipe, *, quiet: bool, resume: bool, **options: Any) -> None:
    _settle_memory()
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
    _tell(report, out, quiet)


@r2m.command(cls=_SectionedCommand)
@_running
@click.argument("out", metavar="OUT")
@_option(_FILES, "--to", required=True, metavar="DIR", help="The directory to create, with one output per combination.")
@_option(_STRENGTH, "--rank", metavar="A,B,…", help="Truncation ranks, as merge has them.")
@_option(_STRENGTH, "--eta", metavar="A,B,…", help="Strengths of the residuals.")
@_option(_STRENGTH, "--core-scale", metavar="A,B,…", help="Factors of the core.")
@_option(_STRENGTH, "--row-power", metavar="A,B,…", help="Powers of the weights by row.")
def sweep(out: str, to: str, quiet: bool, **given: Any) -> None:
    """Merge OUT, the output of a merge, with every combination of some options: analyzed once, combined for each."""
    _settle_memory()
    from r2m.progress import reporting
    from r2m.project import SWEPT
    from r2m.project import sweep as run

    texts = {field: given.pop(field) for field in SWEPT}
    values = {field: [_read_rank(one) for one in text.split(",")] for field, text in texts.items() if text is not None}
    with reporting(quiet=quiet) as progress:
        rows = run(out, values, to, progress=progress, **given)
    if not quiet:
        click.echo(f"{len(rows)} merges in {to}, in {to}/sweep.csv what they are")


@r2m.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option("--rename", "renames", multiple=True, metavar="OLD=NEW", help="As of merge.")
@click.option("--drop", "drops", multiple=True, metavar="OLD", help="As of merge.")
@click.option("--preset", type=_choice(*PRESETS), help="As of merge.")
@_OFFLINE
@click.option("--norms", is_flag=True, help="Read all of them: how far each moved from the first, and how alike.")
def inspect(paths: tuple[str, ...], norms: bool, **given: Any) -> int:
    """Show what checkpoints are, and whether they can be merged: the first as base, the others as experts.

    The exit code is 1 where they cannot.
    """
    from r2m.inspection import inspect as look

    wanted = _arrangement({name: value for name, value in given.items() if value not in (None, ())})
    lines, fit = look(paths, arrangement=wanted, norms=norms)
    for line in lines:
        click.echo(line)
    return 0 if fit else 1


@r2m.command()
@click.argument("out")
@click.option("--evaluation", metavar="DIR", help="Of r2m evaluate, for the card's metrics.")
@click.option(
    "--license", "licence", metavar="ID", help="The merged model's.  [default: the most restrictive of its inputs]"
)
def card(out: str, evaluation: str | None, licence: str | None) -> None:
    """Write the model card of OUT, the output of a merge, again: with SHA-256 of its inputs, and with metrics."""
    import json

    from r2m.card import card as text_of
    from r2m.card import warnings
    from r2m.checkpoints.writer import write_file
    from r2m.output import CARD_FILE
    from r2m_kernels.errors import InvalidInput

    measured = None
    if evaluation is not None:
        path = Path(evaluation) / "evaluation.json"
        try:
            measured = json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise InvalidInput(f"evaluation ({evaluation}): expected a directory that r2m evaluate wrote") from None
    text = text_of(Path(out), evaluation=measured, licence=licence, hashes=True)
    partial = Path(out) / f".{CARD_FILE}.partial"
    write_file(partial, text.encode(errors="backslashreplace"))
    os.replace(partial, Path(out) / CARD_FILE)
    click.echo(f"{out}/{CARD_FILE}")
    for warning in warnings(text):
        click.echo(f"Warning: {warning}", err=True)


@r2m.command()
@click.argument("out")
@click.option("--to", metavar="DIR", help="The directory to create.  [default: OUT.report]")
@click.option("--evaluation", metavar="DIR", help="Of r2m evaluate: ROC curves, scores, models against test sets.")
@click.option("--sweep", "swept", metavar="DIR", help="Of r2m sweep, whose points the evaluation has.")
@click.option(
    "--spectra",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Singular values of the residuals of N matrices, kept and dropped: reads the checkpoints again.",
)
def report(out: str, to: str | None, evaluation: str | None, swept: str | None, spectra: int) -> None:
    """Write a page about OUT, the output of a merge: one HTML file, and for each picture in it a PNG and a CSV."""
    import importlib.util

    from r2m_kernels.errors import InvalidInput

    for package, name in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(package) is None:
            raise InvalidInput(f"report: needs the package {name}: pip install 'r2m_kernels[report]'")
    from r2m.reporting.page import PAGE_FILE, write_page

    target = to or f"{out.rstrip('/')}.report"
    files = write_page(out, target, evaluation=evaluation, swept=swept, spectra=spectra)
    click.echo(f"{target}/{PAGE_FILE}, and {len(files) - 1} files beside it")


_MODELS, _DATA = "Models", "Data"


@r2m.command(
    cls=_SectionedCommand,
    epilog="Example: r2m evaluate --model r2m=merged --detector clip:clip-vit-large-patch14 --data DFDC.json",
)
@_option(
    _MODELS, "--model", "models", multiple=True, metavar="[NAME=]PATH", help="A checkpoint to run; repeat for each."
)
@_option(
    _MODELS,
    "--detector",
    metavar="KIND",
    help="What the checkpoints are weights of: transformers; clip:DIR (DF40, DeepfakeBench; DIR: its CLIP's "
    "config.json); timm:NAME; open_clip:NAME; MODULE:FUNCTION, which gives a torch module.",
)
@_option(_MODELS, "--preset", type=_choice(*PRESETS), help="Names of the checkpoints' tensors, as of merge.")
@_option(
    _MODELS,
    "--scores",
    multiple=True,
    metavar="[NAME=]CSV",
    help="Finished scores of a model: columns path, label, probability, and video, dataset if there.  Repeat for each.",
)
@_option(_MODELS, "--size", type=int, help="Pixels of a side.  [default: as the checkpoint's directory says]")
@_option(_MODELS, "--mean", metavar="R,G,B", help="Of the channels.  [default: as the checkpoint's directory says]")
@_option(_MODELS, "--std", metavar="R,G,B", help="Of the channels.  [default: as the checkpoint's directory says]")
@_option(
    _DATA,
    "--data",
    multiple=True,
    metavar="PATH",
    help="DeepfakeBench's or DF40's JSON, or a folder with real/ and fake/, or one of such.  Repeat for each.",
)
@_option(_DATA, "--root", metavar="DIR", help="Of the paths in JSON files.  [default: the file's directory]")
@_option(
    _DATA, "--split", type=_choice("train", "val", "test"), default="test", show_default=True, help="Of JSON files."
)
@_option(_DATA, "--compression", default="c23", show_default=True, help="Of FaceForensics++ in JSON files.")
@_option(
    _DATA, "--label", "labels", multiple=True, metavar="NAME=0|1", help="Of JSON files.  [default: 0 if it has real]"
)
@_option(_DATA, "--frames", type=click.IntRange(1), default=32, show_default=True, help="Of a video, at most, spread.")
@_option(
    _DATA, "--strict", is_flag=True, help="An image that cannot be read ends it.  [default: it is left out and told]"
)
@_option(
    _DATA,
    "--deepfakebench-compat",
    "compat",
    is_flag=True,
    help="The first frames of a video, and videos known by their folder's name alone, as DeepfakeBench has it.",
)
@_option(_RUN, "--out", metavar="DIR", help="Where evaluation.json and scores-N.csv go.  [default: nowhere]")
@_option(_RUN, "--overwrite", is_flag=True, help="Replace an evaluation in DIR.")
@_option(_RUN, "--bootstrap", type=click.IntRange(0), default=1000, show_default=True, help="Resamples of videos.")
@_option(_RUN, "--seed", type=int, default=0, show_default=True, help="Of the resamples.")
@_option(_RUN, "--batch", type=click.IntRange(1), default=32, show_default=True, help="Images at a time.")
@_option(_RUN, "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@_option(_RUN, "--quiet", is_flag=True, help="No progress.")
def evaluate(**given: Any) -> None:
    """Measure detectors on datasets: accuracy, AUC, EER and AP over frames and videos, several models in one table."""
    from r2m.evaluation.command import evaluate as run

    for line in run(**given):
        click.echo(line)


@r2m.command()
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="[NAME=]PATH…")
@click.option("--to", default="recipe.yaml", show_default=True, metavar="FILE", help="The recipe to write.")
def init(base: str, experts: tuple[str, ...], to: str) -> None:
    """Write a commented recipe for BASE and experts: what they are, and which preset makes them fit."""
    from r2m.starter import starter

    text = starter(base, experts, Path(to))
    try:
        with open(to, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise click.UsageError(f"{to}: exists already; --to names another file.") from None
    click.echo(f"{to}: r2m merge {to} --out merged")


@r2m.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that check them."""
    import json

    from r2m.recipe import schema as of_recipes

    click.echo(json.dumps(of_recipes(), indent=2, ensure_ascii=False))


@r2m.command()
@click.argument("source")
@click.argument("out")
@click.option("--rename", "renames", multiple=True, metavar="OLD=NEW", help="As of merge.")
@click.option("--drop", "drops", multiple=True, metavar="OLD", help="As of merge.")
@click.option("--preset", type=_choice(*PRESETS), help="As of merge.")
@click.option("--dtype", type=_choice("float32", "bfloat16", "float16", "float64"), help="Of floating-point tensors.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@_OFFLINE
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Load a pickled module or a TorchScript archive. This RUNS CODE from the file: only for files you trust.",
)
def convert(source: str, out: str, dtype: str | None, overwrite: bool, allow_pickle: bool, **given: Any) -> None:
    """Write the checkpoint SOURCE to the file OUT, whose ending says how: .safetensors, or .pth for torch.save."""
    from r2m.convert import convert as write
    from r2m.execute import OUTPUT_DTYPES

    wanted = _arrangement({name: value for name, value in given.items() if value not in (None, ())})
    chosen = OUTPUT_DTYPES[dtype] if dtype else None
    click.echo(write(source, out, arrangement=wanted, dtype=chosen, overwrite=overwrite, allow_pickle=allow_pickle))


@r2m.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="Where everything is written.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of data, training and merge.")
@click.option("--quick", is_flag=True, help="Less training: a look at how it runs, not at what it shows.")
def demo(out: str, seed: int, quick: bool) -> None:
    """Train three forgery specialists on real faces, merge them and measure the result, on a CPU."""
    from rich.console import Console

    from r2m.demo import run_demo

    run_demo(Path(out), seed=seed, quick=quick, console=Console())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: without the program's name; default: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "‖" shows "?", where a merge would end
    try:
        code = r2m.main(args=arguments, prog_name="r2m", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
        else:
            click.echo(f"Error: {error.format_message()}", err=True)  # without the usage lines: one sentence
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo("\n".join(["Stopped.", *getattr(error, "__notes__", ())]), err=True)
        return 130
    except Exception as error:
        if not _is_expected(error):
            raise
        text = _describe(error) if isinstance(error, OSError) else str(error)
        click.echo("\n".join([f"Error: {text}", *getattr(error, "__notes__", ())]), err=True)
        return _exit_code(error)


def _settle_memory() -> None:
    """How this process takes and returns large buffers; torch has to be imported after it.

    A merge goes through many: in huge pages they come with a few hundred page faults instead of a hundred thousand. And
    glibc, once it has seen one, would keep freed buffers of up to 32 MiB for later, a seventh of the peak memory. The
    blocks of a few MiB that a panel takes and frees are not given back in between, which was half of the time of a
    process of one thread; and all threads take them from one place, since an arena for each doubled the memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's allocator: madvise(MADV_HUGEPAGE) from 2 MiB on
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for parameter, value in ((_M_MMAP_THRESHOLD, 12 << 20), (_M_TRIM_THRESHOLD, 32 << 20), (_M_ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


def _is_expected(error: Exception) -> bool:
    """Whether an error says what a user needs to know; others are ours, and show where they come from."""
    # Ours come from a loaded module; importing it here would make --help wait for torch.
    errors = sys.modules.get("r2m_kernels.errors")
    return isinstance(error, OSError) or (errors is not None and isinstance(error, errors.R2MError))


def _exit_code(error: Exception) -> int:
    """2: the input or an option cannot be used; 1: the machine refused."""
    distributed = sys.modules.get("r2m.distributed")
    lost = distributed is not None and isinstance(error, distributed.LostProcess)
    return 1 if lost or isinstance(error, OSError) else 2


def _describe(error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _read_rank(text: str) -> str | int | float:
    """``"16"`` is a rank, ``"0.1"`` and ``"1.0"`` are ratios; MergeConfig refuses other text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


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
