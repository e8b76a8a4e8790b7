"""Errors that end a command with one sentence, and what to quote of other errors in it."""


class _Printable(Exception):
    """An error whose message can be printed in one line, whatever names it quotes."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(_Printable, ValueError):
    """Wrong input: one sentence that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.

    Attributes:
        on_all_ranks: whether all processes of a run raise it, so that only rank 0 prints it.
    """

    on_all_ranks = False


class TrainingError(_Printable, RuntimeError):
    """Training cannot continue; what was saved is intact. The command line exits with code 1.

    Attributes:
        on_all_ranks: as in `UserError`.
    """

    on_all_ranks = False


class CheckpointError(Exception):
    """Several processes could not write or read a checkpoint together; all of them raise it."""


def reason(error: BaseException) -> str:
    """Return the operating system's message for an error or its cause, else its first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return an error's message without the traceback that some libraries append to it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: str) -> str:
    r"""Return a text in one line: bytes that are not UTF-8 become ``\xe9``, a newline ``\n``."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode's stand-in for a byte
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
