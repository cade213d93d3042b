"""How far long work is: a bar on a terminal, and lines in a file."""

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self

from tqdm import tqdm

SECONDS = 30  # between lines
WORTH_SAYING = 10  # seconds; with less left there is no line


class Progress:
    """Progress of `total` pieces, called `unit`, of the work `what`; show = False shows nothing.

    Where standard error is a terminal there is a bar. Where standard output is a file or a pipe there is a line after
    the first pieces, and then at most one every 30 seconds, unless the rest takes no longer than a few seconds:
    "sampling: 32 of 64 samples, 2.7 samples/s, 0:00:12 left".
    """

    def __init__(self, what: str, total: int, unit: str = "samples", show: bool = True):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.on_terminal = show and sys.stderr.isatty()
        self.in_file = show and not sys.stdout.isatty()
        self.bar = tqdm(total=total, desc=what, leave=False, disable=not self.on_terminal)
        self.start = time.monotonic()
        self.next_line = self.start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def now(self, what: str) -> None:
        """Rename what is being done, on the bar."""
        self.bar.set_description(what)

    def update(self, count: int = 1) -> None:
        """`count` more pieces are done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        begun = self.in_file and self.done > 0
        if begun and now >= self.next_line and self.left(now - self.start) >= WORTH_SAYING:
            self.next_line = now + SECONDS
            print(self.line(now - self.start), flush=True)

    def left(self, seconds: float) -> float:
        """How many seconds the rest takes if what is done took `seconds`."""
        return (self.total - self.done) * seconds / self.done

    def over(self, pieces: Iterable) -> Iterator:
        """The same pieces, each done when the next one is asked for."""
        with self:
            for piece in pieces:
                yield piece
                self.update()

    def line(self, seconds: float) -> str:
        """What is done after `seconds`, how fast, and when the rest will be at that speed."""
        rate = self.done / max(seconds, 1e-9)
        left = datetime.timedelta(seconds=round(self.left(seconds)))
        return f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left} left"
