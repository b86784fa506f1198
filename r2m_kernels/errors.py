"""The errors users meet. Each message is one sentence: what, where, expected, got."""


class R2MError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInput(R2MError, ValueError):
    """An argument, a checkpoint or a file cannot be used; the message says which and why."""


class BackendUnavailable(R2MError, RuntimeError):
    """A backend asked for by name cannot run here; the message says what to do."""


def shown(name: str) -> str:
    """A name from a file in quotation marks, for a message: what would move the cursor or hide text is escaped."""
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name) + "'"
