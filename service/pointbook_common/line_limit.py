"""A limit on log lines of the same kind.

The first lines of each second are written, the others are counted.
"""

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Generic, TypeVar

K = TypeVar("K")


class LineLimit(Generic[K]):
    """Counts log lines by their kind, of which there are only a few.

    `lines_max` returns how many lines of a kind may be written per second. Once a second, `write_rest` is called for
    each kind that had more, with the number of the others.
    """

    def __init__(self, lines_max: Callable[[K], int], write_rest: Callable[[K, int], None]) -> None:
        self._lines_max = lines_max
        self._write_rest = write_rest
        self._counts: dict[K, int] = {}

    def admits(self, kind: K) -> bool:
        """Count a line, and return whether it may be written."""
        count = self._counts.get(kind, 0)
        if not self._counts:
            # The summary must not carry the context of one call.
            asyncio.get_running_loop().call_later(1.0, self._end_second, context=Context())
        self._counts[kind] = count + 1
        return count < self._lines_max(kind)

    def _end_second(self) -> None:
        counts, self._counts = self._counts, {}
        for kind, count in counts.items():
            if (rest := count - self._lines_max(kind)) > 0:
                self._write_rest(kind, rest)
