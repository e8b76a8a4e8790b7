"""The one error that a user can cause and mend."""


class UserError(ValueError):
    """Bad input: one sentence that says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved is intact. The command line exits with code 1."""
