"""The group of all commands, and what becomes of their errors.

torch is imported inside the commands, so that ``--help`` is immediate.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import click

from r2m.commands import again, calibrate, evaluate, files, look, merge, methods
from r2m.commands.messages import say, settled
from r2m.commands.process import ENDED, exit_code, no_memory
from r2m.commands.way import WayGroup
from r2m_kernels.errors import DoesNotFit, printable

# A path in somebody's home that a shell passes on as it is written: as the value of an option, or after a name.
_AT_HOME = re.compile(r"((?:--[\w-]+=)?(?:[^=~]+=)?)(~[^/]*/.*)", re.DOTALL)


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from r2m_kernels import __version__

        say(f"r2m {__version__}")
        ctx.exit()


@click.group(
    cls=WayGroup, name="r2m", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
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


for _module in (merge, again, look, evaluate, calibrate, files, methods):
    for _command in _module.COMMANDS:
        r2m.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: without the program's name; default: those of the process.
    """
    with settled():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        words = list(map(_expanded, sys.argv[1:] if arguments is None else arguments))
        result = r2m.main(args=words, prog_name="r2m", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
        else:
            text = printable(error.format_message()) + _advice(error)
            say(f"Error: {text}", err=True)  # without the usage lines: one sentence
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        say("\n".join(["Stopped.", *getattr(error, "__notes__", ())]), err=True)
        return ENDED
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        text = _describe(error) if isinstance(error, OSError) else str(error)
        if no_memory(error):
            text = "the GPU has not enough free memory: less with --memory-budget, or --device cpu"
        if not isinstance(error, DoesNotFit):  # which alone has lines
            text = printable(text)
        more = ["(r2m inspect --all BASE EXPERT… lists every mismatch)"] if getattr(error, "every", "") else []
        say("\n".join([f"Error: {text}", *more, *getattr(error, "__notes__", ())]), err=True)
        return code


def _expanded(argument: str) -> str:
    """With ``~/`` as a shell has it, which leaves it alone behind a ``=``; what is there under that name is meant."""
    match = _AT_HOME.fullmatch(argument)
    if match is None or os.path.lexists(match[2]):
        return argument
    return match[1] + os.path.expanduser(match[2])


def _describe(error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _advice(error: click.ClickException) -> str:
    """What to do where an option was given several values at once, as other programs take them."""
    context = getattr(error, "ctx", None)
    options = context.command.params if context is not None else ()
    experts = any(one.name == "expert" and isinstance(one, click.Option) and one.multiple for one in options)
    if not experts or "unexpected extra argument" not in error.format_message():
        return ""
    return "; each checkpoint has an --expert of its own: --expert A --expert B"
