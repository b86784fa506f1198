"""The errors users meet: a closed set. Each message is one sentence: what, where, expected, got."""


class R2MError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        exit_code: of the command that ends with it.
    """

    exit_code = 2


class InvalidInput(R2MError, ValueError):
    """Something given cannot be used; the message says which and why. What is raised is one of the kinds below."""


class BadOption(InvalidInput):
    """An argument, an option or a key of a recipe has a value that cannot be used."""


class BadCheckpoint(InvalidInput):
    """A file is no checkpoint that can be read: damaged, hostile, or of a kind that is not supported."""


class DoesNotFit(InvalidInput):
    """Checkpoints, each good by itself, do not belong together.

    Attributes:
        mismatches: how many tensors are to blame; 0 where it is something else.
        every: the message with all of them, where it has examples alone.
    """

    mismatches = 0
    every = ""


class NotFinite(InvalidInput):
    """A tensor holds NaN or Inf, or would after the merge."""


class BadFile(InvalidInput):
    """A file or directory that is no checkpoint cannot be used: a recipe, a list, a picture, an output in the way."""


class BackendUnavailable(R2MError, RuntimeError):
    """A backend or device asked for by name cannot run here; the message says what to do."""


def printable(text: str) -> str:
    """A text from a file, for a message: what would move the cursor or hide text is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(name: str) -> str:
    """A name from a file in quotation marks, for a message."""
    return f"'{printable(name)}'"


def shown(text: str) -> str:
    """:func:`printable`, line by line: of a text with lines of its own, whose names were made printable one by one."""
    return "\n".join(map(printable, text.split("\n")))
