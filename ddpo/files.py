"""Files that are there whole or not at all, whatever ends the process or fills the disk."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = "partial_"  # how the names of files and folders begin that are being written or removed


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields where to write the file or folder `path`; it gets its name, and replaces an older one, when all is there.

    What is half-written is removed. Raises OSError if it cannot be written, in place of the errors that safetensors and
    torch have for a full disk; so nothing but writing belongs inside.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + path.name)
    remove(partial)
    try:
        yield partial
        if path.is_dir():  # a folder cannot be replaced in one step
            old = path.with_name(f"{PARTIAL}old_{path.name}")
            remove(old)
            os.replace(path, old)
            os.replace(partial, path)
            remove(old)
        else:
            os.replace(partial, path)
    except BaseException as error:
        remove(partial)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # if nothing else is in it
        if isinstance(error, (SafetensorError, RuntimeError)):
            raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error
        raise


def write_whole(file: Path, text: str) -> None:
    """Write a text file, with a line end behind it, that is never seen half-written."""
    with whole(file) as partial:
        partial.write_text(text + "\n")


def append_whole(file: Path, text: str) -> None:
    """Append a line to a text file, or leave it as it was and raise OSError."""
    data = f"{text}\n".encode()
    with open(file, "ab", buffering=0) as handle:
        size = handle.seek(0, os.SEEK_END)
        try:
            if handle.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        except OSError:
            handle.truncate(size)
            raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed had begun to write or to remove in `folder` and below."""
    for path in sorted(folder.rglob(f"{PARTIAL}*")):
        remove(path)
