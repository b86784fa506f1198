"""Texts from the files of ``templates/``, where names come from strangers: each kind of text has its own escapes."""

from __future__ import annotations

import functools
import re
from typing import Any

import jinja2
from markupsafe import Markup

from r2m_kernels.errors import printable


def render(name: str, **values: Any) -> str:
    """The text of a template.

    In HTML everything is escaped; ``None`` is a dash. In Markdown what the template puts through ``line`` is a text,
    and cannot begin another line, a cell of a table, a link or HTML.

    Args:
        name: a file of ``templates/``.
        values: what it needs, and no less.

    Raises:
        LookupError: something that it needs is not there.
    """
    try:
        return _environment().get_template(name).render(values)
    except jinja2.UndefinedError as error:
        raise LookupError(str(error)) from error


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("r2m"),
        autoescape=jinja2.select_autoescape(("html",)),
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "line": markdown_text,
        "short": lambda number: f"{number:.4g}",
    }
    return environment


def markdown_text(text: str) -> str:
    """A text as Markdown shows it, on one line."""
    return re.sub(r"([\\`*\[\]<>|~])", r"\\\1", printable(text))


@jinja2.pass_eval_context
def _shown(context: jinja2.nodes.EvalContext, value: Any) -> Any:
    """A value in HTML before it is escaped."""
    if not context.autoescape or isinstance(value, Markup):
        return value
    return "–" if value is None else printable(value) if isinstance(value, str) else value
