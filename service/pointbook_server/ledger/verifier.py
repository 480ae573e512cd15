"""Verification of all accounts with their entries and checkpoints."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pointbook_server.db.database import LIFT_TIME_LIMIT, Connection, Database, Row, Statement
from pointbook_server.ledger import queries, rows
from pointbook_server.ledger.model import AccountKey, Entry
from pointbook_server.ledger.verification import AccountVerification, Mismatch

PROGRESS_ENTRIES = 1_000
"""The number of entries of one account after which progress is reported."""


@dataclass(frozen=True, slots=True)
class VerificationScope:
    """The accounts to verify; empty fields mean all."""

    merchant_id: str = ""
    store_id: str = ""
    buyer_id: str = ""


@dataclass(frozen=True, slots=True)
class MerchantAccountKey:
    """An account of any merchant."""

    merchant_id: str
    key: AccountKey


@dataclass(frozen=True, slots=True)
class VerificationSize:
    """A number of accounts and entries."""

    accounts: int
    entries: int


class VerificationListener(Protocol):
    """A receiver of the progress and the mismatches of a verification."""

    def on_start(self, total: VerificationSize) -> None:
        """Receive the total size before the first account."""

    def on_progress(self, done: VerificationSize) -> None:
        """Receive how much was verified since the last report."""

    def on_mismatch(self, account: MerchantAccountKey, mismatch: Mismatch) -> None:
        """Receive a mismatch."""


class LedgerVerifier:
    """A verifier of accounts, which may run while the service writes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, scope: VerificationScope, listener: VerificationListener) -> None:
        """Verify accounts on one snapshot, with only one state and a few rows in memory.

        Raises DATABASE_UNAVAILABLE.
        """

        async def work(connection: Connection) -> None:
            await connection.execute(LIFT_TIME_LIMIT)
            await _VerificationPass(connection, scope, listener).run()

        await self._database.snapshot(work)


class _VerificationPass:
    """One pass over four streams in the same order.

    Their rows are matched by equality only, because only the database knows its sort order of text.
    """

    def __init__(self, connection: Connection, scope: VerificationScope, listener: VerificationListener) -> None:
        self._connection = connection
        self._params = {"merchant_id": scope.merchant_id, "store_id": scope.store_id, "buyer_id": scope.buyer_id}
        self._listener = listener
        self._accounts = self._open(queries.STREAM_ACCOUNTS)
        self._entries = self._open(queries.STREAM_ENTRIES)
        self._checkpoints = self._open(queries.STREAM_CHECKPOINTS)

    async def run(self) -> None:
        """Verify every account that any of the tables contains."""
        async for row in self._connection.stream(queries.COUNT_ACCOUNTS_AND_ENTRIES, self._params):
            self._listener.on_start(VerificationSize(row.accounts, row.entries))
        async for row in self._connection.stream(queries.STREAM_KEYS, self._params):
            account = _account_key(row)
            await self._verify(account)
            self._listener.on_progress(VerificationSize(1, 0))

    def _open(self, statement: Statement) -> "_PeekableStream":
        return _PeekableStream(self._connection.stream(statement, self._params))

    async def _verify(self, account: MerchantAccountKey) -> None:
        """Verify the entries, the checkpoints and the row of one account."""
        verification = AccountVerification()
        unreported = 0
        async for entries in self._milliseconds(account):
            self._report(account, verification.add(entries))
            await self._check_checkpoints(account, verification, entries[0].event.updated_at_ms)
            unreported += len(entries)
            if unreported >= PROGRESS_ENTRIES:
                self._listener.on_progress(VerificationSize(0, unreported))
                unreported = 0
        await self._check_checkpoints(account, verification, None)
        row = await self._accounts.next_if(lambda row: _account_key(row) == account)
        stored = None if row is None else rows.account_from_row(row[1:])[1]
        self._report(account, verification.close(stored))
        self._listener.on_progress(VerificationSize(0, unreported))

    async def _milliseconds(self, account: MerchantAccountKey) -> AsyncIterator[list[Entry]]:
        """Read the entries of an account, grouped by millisecond."""
        group: list[Entry] = []
        while (row := await self._entries.next_if(lambda row: _account_key(row) == account)) is not None:
            entry = rows.entry_from_row(row[1:]).entry
            if group and group[0].event.updated_at_ms != entry.event.updated_at_ms:
                yield group
                group = []
            group.append(entry)
        if group:
            yield group

    async def _check_checkpoints(
        self, account: MerchantAccountKey, verification: AccountVerification, to_ms: int | None
    ) -> None:
        """Check the checkpoints up to a time, or all remaining ones."""

        def is_next(row: Row) -> bool:
            return _account_key(row) == account and (to_ms is None or row.newest_at_ms <= to_ms)

        while (row := await self._checkpoints.next_if(is_next)) is not None:
            self._report(account, verification.check_checkpoint(rows.account_from_row(row[1:])[1]))

    def _report(self, account: MerchantAccountKey, mismatches: Iterator[Mismatch]) -> None:
        for mismatch in mismatches:
            self._listener.on_mismatch(account, mismatch)


class _PeekableStream:
    """A stream whose next row is consumed only if it matches."""

    def __init__(self, stream: AsyncIterator[Row]) -> None:
        self._stream = stream
        self._next: Row | None = None

    async def next_if(self, matches: Callable[[Row], bool]) -> Row | None:
        """Return the next row if it matches; None if it does not, or at the end."""
        if self._next is None:
            self._next = await anext(self._stream, None)
        if self._next is None or not matches(self._next):
            return None
        row, self._next = self._next, None
        return row


def _account_key(row: Row) -> MerchantAccountKey:
    return MerchantAccountKey(row.merchant_id, AccountKey(row.store_id, row.buyer_id))
