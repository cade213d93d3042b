"""The errors that are the user's to mend: config/cli.py says them in one sentence, any other keeps its traceback.

A message names the key, flag or file, what was found, what is allowed and what to do.
"""


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a key, a file, a place."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named and that is not there."""


class UnwritableError(UserError, OSError):
    """A place that the user named and that cannot be written."""


def first_line(error: BaseException) -> str:
    """What a library said, in one line without its full stop, to be quoted in a sentence."""
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
