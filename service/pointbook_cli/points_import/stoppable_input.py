"""A file or standard input whose reading can be stopped."""

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2


class StoppableInput(io.FileIO):
    """A file or a pipe that another thread can end while a read waits for data."""

    is_ended = False

    def readinto(self, buffer: Any) -> int | None:
        """Read available data once there is some; nothing once the input is ended."""
        while not self.is_ended:
            if select.select([self], [], [], POLL_SECONDS)[0]:
                return super().readinto(buffer)
        return 0

    def size(self) -> int | None:
        """Return the size of a file; None for a pipe."""
        status = os.fstat(self.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def open_input(file: Path) -> Iterator[StoppableInput]:
    """Open a file; - is standard input."""
    is_standard_input = str(file) == "-"
    with StoppableInput(
        sys.stdin.fileno() if is_standard_input else str(file), closefd=not is_standard_input
    ) as opened:
        yield opened
