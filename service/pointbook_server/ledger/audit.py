"""Reading the whole book to verify it: every account with its entries and checkpoints, on one unchanging state."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pointbook_server.db.database import LIFT_TIME_LIMIT, Connection, Database, Row, Statement
from pointbook_server.ledger import queries
from pointbook_server.ledger.model import AccountKey, Entry
from pointbook_server.ledger.verification import Mismatch, Verification

TOLD_ENTRIES = 1_000
"""After how many entries of one account it is told how far the work is."""


@dataclass(frozen=True, slots=True)
class AuditScope:
    """Which accounts to verify; empty means all."""

    merchant_id: str = ""
    store_id: str = ""
    buyer_id: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """An account of any merchant."""

    merchant_id: str
    key: AccountKey


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to verify."""

    accounts: int
    entries: int


class Listener(Protocol):
    """Who hears of an audit while it goes on."""

    def begin(self, size: Size) -> None:
        """Hear how much there is."""

    def advance(self, size: Size) -> None:
        """Hear what more was done."""

    def tell(self, place: Place, mismatch: Mismatch) -> None:
        """Hear what is wrong."""


class Audit:
    """Verifies accounts of the book while the service goes on writing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, wanted: AuditScope, listener: Listener) -> None:
        """Verify accounts on one state of the database, with no more in memory than a state and some rows.

        Raises DATABASE_UNAVAILABLE.
        """

        async def work(connection: Connection) -> None:
            await connection.execute(LIFT_TIME_LIMIT)
            await _Pass(connection, wanted, listener).run()

        await self._database.snapshot(work)


class _Pass:
    """One pass over the book: four streams in the same order.

    They are matched by equality alone, since only the database knows how it sorts text.
    """

    def __init__(self, connection: Connection, wanted: AuditScope, listener: Listener) -> None:
        values = {"merchant_id": wanted.merchant_id, "store_id": wanted.store_id, "buyer_id": wanted.buyer_id}
        self._connection = connection
        self._values = values
        self._listener = listener
        self._accounts = self._open(queries.STREAM_ACCOUNTS)
        self._entries = self._open(queries.STREAM_ENTRIES)
        self._checkpoints = self._open(queries.STREAM_CHECKPOINTS)

    async def run(self) -> None:
        """Verify every account that is named anywhere."""
        async for row in self._connection.stream(queries.COUNT_BOOK, self._values):
            self._listener.begin(Size(row.accounts, row.entries))
        async for row in self._connection.stream(queries.STREAM_KEYS, self._values):
            place = _place(row)
            await self._verify(place)
            self._listener.advance(Size(1, 0))

    def _open(self, statement: Statement) -> "_Ahead":
        return _Ahead(self._connection.stream(statement, self._values))

    async def _verify(self, place: Place) -> None:
        """Verify one account: millisecond after millisecond, the checkpoints of each behind it, then the account."""
        verification = Verification()
        untold = 0
        async for entries in self._milliseconds(place):
            self._tell(place, verification.add(entries))
            await self._check_checkpoints(place, verification, entries[0].event.updated_at_ms)
            untold += len(entries)
            if untold >= TOLD_ENTRIES:
                self._listener.advance(Size(0, untold))
                untold = 0
        await self._check_checkpoints(place, verification, None)
        row = await self._accounts.take(lambda row: _place(row) == place)
        stored = None if row is None else queries.read_account(row[1:])[1]
        self._tell(place, verification.close(stored))
        self._listener.advance(Size(0, untold))

    async def _milliseconds(self, place: Place) -> AsyncIterator[list[Entry]]:
        """Read the entries of an account, those of one millisecond at a time."""
        group: list[Entry] = []
        while (row := await self._entries.take(lambda row: _place(row) == place)) is not None:
            entry = queries.read_entry(row[1:]).entry
            if group and group[0].event.updated_at_ms != entry.event.updated_at_ms:
                yield group
                group = []
            group.append(entry)
        if group:
            yield group

    async def _check_checkpoints(self, place: Place, verification: Verification, to_ms: int | None) -> None:
        """Check the checkpoints up to a moment, or all that are left."""

        def is_next(row: Row) -> bool:
            return _place(row) == place and (to_ms is None or row.newest_at_ms <= to_ms)

        while (row := await self._checkpoints.take(is_next)) is not None:
            self._tell(place, verification.check_checkpoint(queries.read_account(row[1:])[1]))

    def _tell(self, place: Place, mismatches: Iterator[Mismatch]) -> None:
        for mismatch in mismatches:
            self._listener.tell(place, mismatch)


class _Ahead:
    """A stream whose next row can be looked at before it is taken."""

    def __init__(self, stream: AsyncIterator[Row]) -> None:
        self._stream = stream
        self._next: Row | None = None

    async def take(self, is_wanted: Callable[[Row], bool]) -> Row | None:
        """Take the next row if it is wanted; None where it is not, or where there is no more."""
        if self._next is None:
            self._next = await anext(self._stream, None)
        if self._next is None or not is_wanted(self._next):
            return None
        row, self._next = self._next, None
        return row


def _place(row: Row) -> Place:
    return Place(row.merchant_id, AccountKey(row.store_id, row.buyer_id))
