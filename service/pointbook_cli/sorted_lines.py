"""The lines of a file on disk, read back by account and time, so that their order in the file does not matter.

Everything is in temporary databases of SQLite: files in the folder that TMPDIR names, without a name from the moment
they are opened, so that no one else reads them and nothing stays behind. Memory does not grow with the file.
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
from pointbook_cli.points_file import Line, Refused, content_of, numbered_event_id
from pointbook_server.ledger.model import POINTS_MAX

CACHE_KIB = 8 * 1024
"""How much of a database stays in memory, and is sorted at a time."""
PRAGMAS = ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KIB}")
STEPS = 100_000
"""After how many steps of its work SQLite looks whether it is stopped."""
NEVER_MS = 2**62
_PLACE = struct.Struct(">QBQQQ")
"""Time, whether there is a balance, change, balance and expiry, which sort as their bytes do."""
TABLES = """
    CREATE TABLE lines (
        number INTEGER PRIMARY KEY, account BLOB, place BLOB, tie BLOB, name BLOB, identical TEXT, content BLOB
    )
"""
REPEATED = """
    CREATE TABLE repeated AS SELECT name FROM lines WHERE name IS NOT NULL GROUP BY name HAVING count(*) > 1
"""
IN_ORDER = """
    SELECT number, account, place, CASE WHEN name IN (SELECT name FROM repeated) THEN name END, identical, content
    FROM lines ORDER BY account, place, tie, number
"""


class SortedLine(NamedTuple):
    """A line as it is sent.

    `account` and `place` are equal where lines have the same content; `repeated_name` is there where other lines of the
    file have the same event_id.
    """

    number: int
    account: bytes
    place: bytes
    repeated_name: bytes | None
    update: points_pb2.PointsUpdate


@dataclass(frozen=True, slots=True)
class Batch:
    """Some lines that follow each other; `shared` are the accounts and event_ids that other batches may have too."""

    lines: list[SortedLine]
    shared: frozenset[bytes]


class SortedLines:
    """Takes the lines of a file in any order, and then gives them back by account and time.

    Of the same account and time, lines come by their content, and by their text where even that is equal: never by
    their place in the file. Lines without an event_id and without a balance are numbered here among identical ones.
    Raises OSError where the disk is full.
    """

    def __init__(self) -> None:
        self.count = 0
        self._database = open_private_database()
        self._database.execute(TABLES)
        self._database.set_progress_handler(lambda: self._is_stopped, STEPS)
        self._rows: Iterator[tuple[int, bytes, bytes, bytes | None, str | None, bytes]] | None = None
        self._ahead: list[SortedLine] = []
        self._identical = ("", 0)
        self._is_stopped = False

    def close(self) -> None:
        """Delete everything."""
        self._database.close()

    def add(self, lines: Iterable[Line]) -> None:
        """Keep lines of the file."""
        rows = [_to_row(line) for line in lines]
        self.count += len(rows)
        with disk_errors():
            self._database.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def sort(self) -> None:
        """Sort the lines, after the last was added."""
        with disk_errors(), self._stoppable():
            self._database.execute(REPEATED)
            self._rows = iter(self._database.execute(IN_ORDER))
            self._read_ahead(1)

    def stop(self) -> None:
        """End what another thread is doing here; there are no more lines then."""
        self._is_stopped = True

    def read(self, count: int) -> Batch | None:
        """Return the next lines, at most so many, or None at the end.

        An account is not divided unless it has more lines than that.
        """
        with disk_errors(), self._stoppable():
            self._read_ahead(count + 1)
        if self._is_stopped or not self._ahead:
            return None
        lines = self._ahead[: _end_of_accounts(self._ahead, count)]
        del self._ahead[: len(lines)]
        names = {line.repeated_name for line in lines if line.repeated_name is not None}
        return Batch(lines, frozenset({lines[0].account, lines[-1].account, *names}))

    def _read_ahead(self, count: int) -> None:
        while len(self._ahead) < count and self._rows is not None and (row := next(self._rows, None)):
            number, account, place, repeated_name, identical, content = row
            update = points_pb2.PointsUpdate.FromString(content)
            if identical is not None:
                update.event_id = self._number(identical)
            self._ahead.append(SortedLine(number, account, place, repeated_name, update))

    def _number(self, identical: str) -> str:
        """Name one of identical lines, which come one after the other."""
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


class Refusals:
    """The refused lines of a file, by their numbers. Raises OSError where the disk is full."""

    def __init__(self) -> None:
        self._database = open_private_database()
        self._database.execute("CREATE TABLE refused (number INTEGER PRIMARY KEY, content TEXT)")

    def close(self) -> None:
        """Delete everything."""
        self._database.close()

    def add(self, refused: Refused) -> None:
        """Keep a refused line."""
        with disk_errors():
            self._database.execute("INSERT INTO refused VALUES (?, ?)", (refused.number, json.dumps(asdict(refused))))

    def __iter__(self) -> Iterator[Refused]:
        """Return all refused lines in the order of the file."""
        for (content,) in self._database.execute("SELECT content FROM refused ORDER BY number"):
            values = json.loads(content)
            yield Refused(**{**values, "violations": tuple(map(tuple, values["violations"]))})


def open_private_database() -> sqlite3.Connection:
    """Open an empty database that only this connection can reach, and that ends with it."""
    # Threads use it in turns.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    for pragma in PRAGMAS:
        database.execute(f"PRAGMA {pragma}")
    database.execute("BEGIN")
    return database


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise SQLite's errors as an OSError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"the file cannot be sorted on disk ({error}); TMPDIR names a folder with more space") from error


def _to_row(line: Line) -> tuple[int, bytes, bytes, bytes, bytes | None, str | None, bytes]:
    update, event = line.update, line.event
    account = "\0".join((update.merchant_id, *event.account_key))
    identical = None
    if not update.event_id:
        identical = json.dumps(content_of(update.merchant_id, event))
        # The file can give the event no other name, so that a refusal must not stand for ever.
        update.forget_refusal = True
    numbers = _PLACE.pack(
        event.updated_at_ms,
        event.balance is not None,
        # Without a balance the largest increases come first: they may cover what follows in the same millisecond, and
        # nothing that follows may cover them, so that a second run refuses the same lines.
        POINTS_MAX + (event.delta if event.balance is not None else -event.delta),
        POINTS_MAX + (event.balance or 0),
        NEVER_MS if event.expires_at_ms is None else NEVER_MS // 2 + event.expires_at_ms,
    )
    return (
        line.number,
        account.encode(),
        numbers + event.scene.encode(),
        f"{update.event_id}\0".encode() + hashlib.blake2b(line.written, digest_size=8).digest(),
        f"{update.merchant_id}\0{update.event_id}".encode() if line.may_be_reused else None,
        identical,
        update.SerializeToString(),
    )


def _end_of_accounts(lines: list[SortedLine], count: int) -> int:
    """Return how many lines end where an account ends, at most `count`, which is all where more of one account."""
    end = min(count, len(lines))
    if end == len(lines):
        return end
    while end and lines[end].account == lines[end - 1].account:
        end -= 1
    return end or count
