"""The errors users meet. Each message is one sentence: what, where, expected, got."""


class R2MError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInput(R2MError, ValueError):
    """An argument, a checkpoint or a file cannot be used; the message says which and why."""


class BackendUnavailable(R2MError, RuntimeError):
    """A backend asked for by name cannot run here; the message says what to do."""
