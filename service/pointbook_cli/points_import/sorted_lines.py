"""The lines of a file on disk, sorted by account and time.

Their order in the file does not matter. They are in temporary SQLite databases: unlinked files in the folder of TMPDIR,
which other processes cannot open and which leave nothing behind. Memory does not grow with the file.
"""

import contextlib
import hashlib
import json
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from pointbook.v1 import points_pb2
from pointbook_cli.points_import.points_file import ParsedLine, RefusedLine, content_of, numbered_event_id
from pointbook_server.ledger.model import POINTS_MAX

CACHE_KIB = 8 * 1024
"""The part of a database in memory, which is also sorted in one run."""
PRAGMAS = ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KIB}")
PROGRESS_STEPS = 100_000
"""The number of steps of SQLite's virtual machine between two checks of the stop flag."""
NEVER_MS = 2**62
_SORT_KEY = struct.Struct(">QBQQQ")
"""Time, whether there is a balance, change, balance and expiry: big-endian, so that bytes sort like values."""
TABLES = """
    CREATE TABLE lines (
        number INTEGER PRIMARY KEY,
        account BLOB,
        sort_key BLOB,
        tie_breaker BLOB,
        event_key BLOB,
        identical TEXT,
        content BLOB
    )
"""
REPEATED = """
    CREATE TABLE repeated AS
    SELECT event_key FROM lines WHERE event_key IS NOT NULL GROUP BY event_key HAVING count(*) > 1
"""
IN_ORDER = """
    SELECT number, account, sort_key, CASE WHEN event_key IN (SELECT event_key FROM repeated) THEN event_key END,
        identical, content
    FROM lines ORDER BY account, sort_key, tie_breaker, number
"""


class SortedLine(NamedTuple):
    """A line as it is sent.

    Lines with the same content have equal `account` and `sort_key`. `repeated_id` is set if other lines of the file
    have the same event_id.
    """

    number: int
    account: bytes
    sort_key: bytes
    repeated_id: bytes | None
    update: points_pb2.PointsUpdate


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Consecutive sorted lines.

    `shared` are the accounts and event_ids that other batches may contain too.
    """

    lines: list[SortedLine]
    shared: frozenset[bytes]


class SortedLines:
    """The lines of a file, added in any order and read by account and time.

    Lines of the same account and time are sorted by content, then by their text, never by their position in the file.
    Identical lines without an event_id and a balance are numbered. Raises OSError if the disk is full.
    """

    def __init__(self) -> None:
        self.count = 0
        self._database = open_private_database()
        self._database.execute(TABLES)
        self._database.set_progress_handler(lambda: self._is_stopped, PROGRESS_STEPS)
        self._rows: Iterator[tuple[int, bytes, bytes, bytes | None, str | None, bytes]] | None = None
        self._buffer: list[SortedLine] = []
        self._identical = ("", 0)
        self._is_stopped = False

    def close(self) -> None:
        """Delete all stored data."""
        self._database.close()

    def add(self, lines: Iterable[ParsedLine]) -> None:
        """Store lines of the file."""
        rows = [_to_row(line) for line in lines]
        self.count += len(rows)
        with disk_errors():
            self._database.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def sort(self) -> None:
        """Sort the lines, once all are added."""
        with disk_errors(), self._stoppable():
            self._database.execute(REPEATED)
            self._rows = iter(self._database.execute(IN_ORDER))
            self._fill_buffer(1)

    def stop(self) -> None:
        """Interrupt another thread's call; no more lines are read."""
        self._is_stopped = True

    def read(self, count: int) -> LineBatch | None:
        """Return at most `count` lines, or None at the end.

        The lines of an account are not split unless there are more than `count`.
        """
        with disk_errors(), self._stoppable():
            self._fill_buffer(count + 1)
        if self._is_stopped or not self._buffer:
            return None
        lines = self._buffer[: _end_of_accounts(self._buffer, count)]
        del self._buffer[: len(lines)]
        ids = {line.repeated_id for line in lines if line.repeated_id is not None}
        return LineBatch(lines, frozenset({lines[0].account, lines[-1].account, *ids}))

    def _fill_buffer(self, count: int) -> None:
        while len(self._buffer) < count and self._rows is not None and (row := next(self._rows, None)):
            number, account, sort_key, repeated_id, identical, content = row
            update = points_pb2.PointsUpdate.FromString(content)
            if identical is not None:
                update.event_id = self._number_identical(identical)
            self._buffer.append(SortedLine(number, account, sort_key, repeated_id, update))

    def _number_identical(self, identical: str) -> str:
        """Return the event_id of one of several identical lines, which are consecutive."""
        before, ordinal = self._identical
        self._identical = (identical, ordinal + 1 if identical == before else 1)
        return numbered_event_id(json.loads(identical), self._identical[1])

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            if not self._is_stopped:
                raise


class RefusedLines:
    """The refused lines of a file, by number. Raises OSError if the disk is full."""

    def __init__(self) -> None:
        self._database = open_private_database()
        self._database.execute("CREATE TABLE refused (number INTEGER PRIMARY KEY, content TEXT)")

    def close(self) -> None:
        """Delete all stored data."""
        self._database.close()

    def add(self, line: RefusedLine) -> None:
        """Store a refused line."""
        with disk_errors():
            self._database.execute("INSERT INTO refused VALUES (?, ?)", (line.number, json.dumps(asdict(line))))

    def __iter__(self) -> Iterator[RefusedLine]:
        """Iterate over the refused lines in the order of the file."""
        for (content,) in self._database.execute("SELECT content FROM refused ORDER BY number"):
            values = json.loads(content)
            yield RefusedLine(**{**values, "violations": tuple(map(tuple, values["violations"]))})


def open_private_database() -> sqlite3.Connection:
    """Open an empty temporary database, private to this connection."""
    # Threads use it one at a time.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    for pragma in PRAGMAS:
        database.execute(f"PRAGMA {pragma}")
    database.execute("BEGIN")
    return database


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Convert SQLite's errors to an OSError with a remedy."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"the file cannot be sorted on disk ({error}); set TMPDIR to a folder with more space") from error


def _to_row(line: ParsedLine) -> tuple[int, bytes, bytes, bytes, bytes | None, str | None, bytes]:
    update, event = line.update, line.event
    account = "\0".join((update.merchant_id, *event.account_key))
    identical = None
    if not update.event_id:
        identical = json.dumps(content_of(update.merchant_id, event))
        # The event cannot get another id, so a refusal must not be permanent.
        update.forget_refusal = True
    numbers = _SORT_KEY.pack(
        event.updated_at_ms,
        event.balance is not None,
        # Without a balance, the largest increases come first: they may cover later decreases in the same millisecond,
        # and no later line covers them, so that a second run refuses the same lines.
        POINTS_MAX + (event.delta if event.balance is not None else -event.delta),
        POINTS_MAX + (event.balance or 0),
        NEVER_MS if event.expires_at_ms is None else NEVER_MS // 2 + event.expires_at_ms,
    )
    return (
        line.number,
        account.encode(),
        numbers + event.scene.encode(),
        f"{update.event_id}\0".encode() + hashlib.blake2b(line.raw, digest_size=8).digest(),
        f"{update.merchant_id}\0{update.event_id}".encode() if line.may_be_reused else None,
        identical,
        update.SerializeToString(),
    )


def _end_of_accounts(lines: list[SortedLine], count: int) -> int:
    """Return the largest number of lines up to `count` that ends with an account.

    Return `count` if there is none.
    """
    end = min(count, len(lines))
    if end == len(lines):
        return end
    while end and lines[end].account == lines[end - 1].account:
        end -= 1
    return end or count
