"""The errors that are the user's to mend: config/cli.py says them in one sentence, any other keeps its traceback.

A message names the key, flag or file, what was found, what is allowed and what to do.
"""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a key, a file, a place."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named and that is not there."""


class UnwritableError(UserError, OSError):
    """A place that the user named and that cannot be written."""


@contextlib.contextmanager
def about(name: str, value: str) -> Iterator[None]:
    """Inside, a UserError about a file gets the `name` of the key or flag in front whose `value` led to that file."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{name} = {value!r} cannot be used: {str(error).rstrip('.')}") from error


def first_line(error: BaseException) -> str:
    """What a library said, in one line without its full stop, to be quoted in a sentence."""
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
