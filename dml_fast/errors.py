"""Errors that end a command with one sentence, and the words of other errors for it."""


class UserError(ValueError):
    """Bad input: one sentence that says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.

    Attributes:
        on_all_ranks: whether every process of the run raises it, so that rank 0 alone prints it.
    """

    on_all_ranks = False


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved is intact. The command line exits with code 1.

    Attributes:
        on_all_ranks: as in `UserError`.
    """

    on_all_ranks = False


class CheckpointError(Exception):
    """Several processes could not write or read a checkpoint together; all of them raise it."""


def reason(error: BaseException) -> str:
    """The operating system's words for an error or for what it came from, else its first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """What an error says, without the traceback that some libraries put into it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
