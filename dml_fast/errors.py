"""The one error that a user can cause and mend."""


class UserError(ValueError):
    """Bad input: one sentence that says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved is intact. The command line exits with code 1."""


def reason(error: BaseException) -> str:
    """The operating system's words for an error or for what it came from, else its first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)
