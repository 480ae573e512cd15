"""The SQL of the ledger: each transaction of its own, on the statements of statements.py."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from sqlalchemy import Text, and_, any_, bindparam, literal, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY

from pointbook_server.database import Connection, Database, RetryTransactionError, Statement
from pointbook_server.errors import PointbookError, Reason, store_not_found
from pointbook_server.ledger import statements as sql
from pointbook_server.ledger.journal import Journal, Post, Posting
from pointbook_server.ledger.lots import FarLots, FarLotsNeededError, Lot
from pointbook_server.ledger.model import Account, AccountKey, Event, Outcome, UpdateType, Verdict, Webhook
from pointbook_server.ledger.posting import KnownEvent, LotsMissingError, Page, Result, post_batch
from pointbook_server.ledger.statements import BookEntry, Void
from pointbook_server.tables import points_entries

NO_REVISION = -1
"""The revision of an account that is not there; the first one is 0."""
LONG_FOLD = 1_000
"""From how many entries on a fold must not make all other callers wait: it is handed to a thread."""
FAR_LOTS_READ = 1_000
"""How many far lots are read at first; each further time it is three times as many as there are by then.

It is 2 at least, so that two lots that stay together are read at once.
"""


class Received(NamedTuple):
    """An event as it was received."""

    event: Event
    webhook: Webhook
    received_at_ms: int


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Which entries of an account to list; times are milliseconds, empty or None keeps all."""

    update_type: UpdateType | None = None
    scenes: tuple[str, ...] = ()
    start_ms: int | None = None
    end_ms: int | None = None


class LedgerStore:
    """Reads and writes accounts and entries.

    With `register_stores` an unknown store is registered for the merchant that first sends an event of it: for
    `pointbook dev` only.
    """

    def __init__(self, database: Database, *, register_stores: bool = False) -> None:
        self._database = database
        self._register_stores = register_stores

    async def apply(self, merchant_id: str, batch: Sequence[Received]) -> list[Verdict | PointbookError]:
        """Write events of one merchant into the book in one transaction, and answer each after it has committed.

        An answer is a verdict, or STORE_NOT_FOUND, EVENT_ID_REUSED, or INSUFFICIENT_POINTS for a refused event without
        a balance. Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE, and then nothing is written.
        """
        posting = _Batch(merchant_id, batch, register_stores=self._register_stores)
        with suppress(RetryTransactionError):
            async with self._database.autocommit() as connection:
                answers = await posting.run_directly(connection)
            if answers is not None:
                return answers
        return await self._database.transaction(posting.run)

    async def account(self, merchant_id: str, key: AccountKey, at_ms: int, *, lots: int = 0) -> Account:
        """Read one account so that it can tell what is active at a moment, with so many lots if there are.

        One that no event has named is empty.
        """
        async with self._database.autocommit() as connection:
            account = await _Book(connection, merchant_id).account(key)
        if not _lacks_lots(account, at_ms, lots):
            return account

        async def read(connection: Connection) -> Account:
            book = _Book(connection, merchant_id)
            return await book.complete(key, await book.account(key), at_ms, lots=lots)

        return await self._database.snapshot(read)

    async def entries(
        self, merchant_id: str, key: AccountKey, wanted: EntryFilter, *, before: tuple[int, str] | None, limit: int
    ) -> list[BookEntry]:
        """Read a page of an account's entries, the newest first, before one of them (time in ms, event_id).

        Its place inside its millisecond is looked up: it changes when another event of that time arrives late.
        """
        entry = points_entries.c
        query = select(*(entry[name] for name in sql.ENTRY_COLUMNS)).where(
            and_(entry.buyer_id == key.buyer_id, entry.store_id == key.store_id, entry.merchant_id == merchant_id),
            entry.outcome != Outcome.REFUSED.value,
        )
        if wanted.update_type is not None:
            query = query.where(entry.update_type == wanted.update_type.value)
        if wanted.scenes:
            scenes = bindparam("scenes", list(wanted.scenes), type_=ARRAY(Text))
            query = query.where(entry.scene == any_(scenes))
        if wanted.start_ms is not None:
            query = query.where(entry.updated_at_ms >= wanted.start_ms)
        if wanted.end_ms is not None:
            query = query.where(entry.updated_at_ms < wanted.end_ms)
        if before is not None:
            at_ms, event_id = before
            last = points_entries.alias("last").c
            ordinal = select(last.ordinal).where(last.event_id == event_id, last.merchant_id == merchant_id)
            place = tuple_(literal(at_ms), ordinal.scalar_subquery())
            query = query.where(tuple_(entry.updated_at_ms, entry.ordinal) < place)
        query = query.order_by(entry.updated_at_ms.desc(), entry.ordinal.desc()).limit(limit)
        async with self._database.autocommit() as connection:
            return [sql.read_entry(row) for row in await connection.fetch(Statement(query))]

    async def drifting_accounts(
        self, merchant_id: str, store_id: str, at_ms: int, *, after: AccountKey, limit: int
    ) -> list[tuple[AccountKey, Account]]:
        """Read a page of the accounts whose drift is not zero, behind an account; an empty store_id means all.

        They can tell what is active at a moment.
        """
        values = {
            "merchant_id": merchant_id,
            "store_id": store_id,
            "after_store_id": after.store_id,
            "after_buyer_id": after.buyer_id,
            "limit": limit,
        }

        async def read(connection: Connection) -> list[tuple[AccountKey, Account]]:
            book = _Book(connection, merchant_id)
            rows = await connection.fetch(sql.LIST_DRIFTING, values)
            return [(key, await book.complete(key, account, at_ms)) for key, account in map(sql.read_account, rows)]

        return await self._database.snapshot(read)

    async def set_void(
        self, merchant_id: str, event_ids: Sequence[str], void: Void, *, is_void: bool
    ) -> dict[AccountKey, Account]:
        """Void entries, or let them count again, all of them or none, and return the accounts that changed.

        Raises ENTRY_NOT_FOUND for the first that is not in the book.
        """

        async def work(connection: Connection) -> dict[AccountKey, Account]:
            book = _Book(connection, merchant_id)
            entries = await book.find(event_ids)
            for event_id in event_ids:
                if event_id not in entries or entries[event_id].outcome is Outcome.REFUSED:
                    raise _entry_not_found(event_id)
            await book.lock({entry.entry.event.account for entry in entries.values()})
            entries = await book.find(event_ids)
            changing = [entry.entry.event for entry in entries.values() if (entry.void is None) is is_void]
            return await book.set_void(changing, void, is_void=is_void)

        return await self._database.transaction(work)


class _Batch:
    """Posts a batch, at first without locks: it may be done several times, as a whole."""

    def __init__(self, merchant_id: str, batch: Sequence[Received], *, register_stores: bool) -> None:
        self._merchant_id = merchant_id
        self._batch = batch
        self._events = [received.event for received in batch]
        self._register_stores = register_stores

    async def run_directly(self, connection: Connection) -> list[Verdict | PointbookError] | None:
        """Post a batch of which every event is later than all entries of its account: one read, and one write.

        The write is a transaction of its own, which takes effect only where no account has changed since. None where
        some event is not later, or where one repeats another's content: its event_id may be in the book, and is claimed
        by no entry. Raises RetryTransactionError where an account has changed, or the book has an event_id.
        """
        book = _Book(connection, self._merchant_id)
        await book.read({event.account for event in self._events})
        accounts = book.accounts
        if not all(
            event.account not in accounts or accounts[event.account].is_before(event.updated_at_ms)
            for event in self._events
        ):
            return None
        result = await self._judge(book, {}, {})
        if result.repeats_content:
            return None
        return await self._write(book, result)

    async def run(self, connection: Connection) -> list[Verdict | PointbookError]:
        """Post any batch in a transaction, under locks: late events, and those that may be in the book already."""
        book = _Book(connection, self._merchant_id)
        await book.lock({event.account for event in self._events})
        known = await self._known(book)
        return await self._write(book, await self._judge(book, known, await book.pages(self._since(book, known))))

    async def _judge(self, book: "_Book", known: Mapping[str, KnownEvent], pages: dict[AccountKey, Page]) -> Result:
        refused = await self._refused(book)
        for event in self._events:
            pages.setdefault(event.account, Page(book.accounts.get(event.account, Account())))
        return await self._post(book, pages, known, refused)

    async def _write(self, book: "_Book", result: Result) -> list[Verdict | PointbookError]:
        await book.write([self._row(number, verdict) for number, verdict in result.entries.items()], result.postings)
        return result.answers

    async def _refused(self, book: "_Book") -> dict[AccountKey, PointbookError]:
        """Find the accounts that do not exist and cannot be opened, because the merchant has no such store."""
        missing = sorted({event.account for event in self._events} - book.accounts.keys())
        if not missing:
            return {}
        store_ids = sorted({key.store_id for key in missing})
        if self._register_stores:
            await book.register_stores(store_ids, min(received.received_at_ms for received in self._batch))
        owners = await book.store_owners(store_ids)
        return {
            key: store_not_found(key.store_id, registered_elsewhere=key.store_id in owners)
            for key in missing
            if owners.get(key.store_id) != self._merchant_id
        }

    async def _known(self, book: "_Book") -> dict[str, KnownEvent]:
        """Find what the book has under the event_ids."""
        found = await book.find(event.event_id for event in self._events)
        return {
            event_id: KnownEvent(received.entry.event, Post(received.outcome, event_id, received.entry))
            for event_id, received in found.items()
        }

    def _since(self, book: "_Book", known: Mapping[str, KnownEvent]) -> dict[AccountKey, int]:
        """Tell from which time on accounts must be folded again for events that are not later than all entries."""
        since: dict[AccountKey, int] = {}
        for event in self._events:
            account = book.accounts.get(event.account)
            if account is None or account.is_before(event.updated_at_ms) or event.event_id in known:
                continue
            since[event.account] = min(since.get(event.account, event.updated_at_ms), event.updated_at_ms)
        return since

    async def _post(
        self,
        book: "_Book",
        pages: dict[AccountKey, Page],
        known: Mapping[str, KnownEvent],
        refused: Mapping[AccountKey, PointbookError],
    ) -> Result:
        """Post the events, with more and more of the far lots where they are needed."""
        now_ms = max(received.received_at_ms for received in self._batch)
        while True:
            try:
                if self._work(pages) < LONG_FOLD:
                    return post_batch(self._events, pages, known, refused, now_ms)
                return await asyncio.to_thread(post_batch, self._events, pages, known, refused, now_ms)
            except LotsMissingError as error:
                page = pages[error.key]
                pages[error.key] = page._replace(base=await book.with_more_lots(error.key, page.base))

    def _work(self, pages: Mapping[AccountKey, Page]) -> int:
        """Tell how many entries may have to be folded: each event without a balance may fold its whole account."""
        events = Counter(event.account for event in self._events)
        judged = Counter(event.account for event in self._events if event.balance is None)
        return sum((judged[key] or 1) * (len(page.history) + events[key]) for key, page in pages.items())

    def _row(self, number: int, verdict: Verdict) -> BookEntry:
        received = self._batch[number]
        return BookEntry(verdict.entry, received.webhook, received.received_at_ms, verdict.outcome)


class _Book:
    """The accounts of one merchant on one connection. `accounts` are those that are there, once read."""

    def __init__(self, connection: Connection, merchant_id: str) -> None:
        self.accounts: dict[AccountKey, Account] = {}
        self._connection = connection
        self._merchant_id = merchant_id
        self._revisions: dict[AccountKey, int] = {}
        self._voids: dict[str, Void | None] = {}

    async def read(self, keys: Iterable[AccountKey]) -> None:
        """Read accounts without locking them: what is written then takes effect only where none has changed."""
        await self._read(sql.READ_ACCOUNTS, keys)

    async def lock(self, keys: Iterable[AccountKey]) -> None:
        """Lock accounts, and read them as they are under the lock."""
        await self._read(sql.LOCK_ACCOUNTS, keys)

    async def _read(self, statement: Statement, keys: Iterable[AccountKey]) -> None:
        rows = await self._connection.fetch(statement, self._values(sql.keys_to_columns(sorted(keys))))
        for row in rows:
            key, self.accounts[key] = sql.read_account(row)
            self._revisions[key] = row.revision

    async def account(self, key: AccountKey) -> Account:
        """Read an account without locking it; one that is not there is empty."""
        row = await self._connection.fetch_one(sql.READ_ACCOUNT, _named(self._merchant_id, key))
        return Account() if row is None else sql.read_account(row)[1]

    async def register_stores(self, store_ids: Sequence[str], now_ms: int) -> None:
        """Register stores that are not registered yet."""
        await self._connection.execute(
            sql.REGISTER_STORES, self._values({"store_ids": list(store_ids), "now_ms": now_ms})
        )

    async def store_owners(self, store_ids: Sequence[str]) -> dict[str, str]:
        """Tell which merchants stores are registered for."""
        rows = await self._connection.fetch(sql.READ_STORES, {"store_ids": list(store_ids)})
        return {row.store_id: row.merchant_id for row in rows}

    async def find(self, event_ids: Iterable[str]) -> dict[str, BookEntry]:
        """Read what is known under event_ids, remembered refusals included."""
        rows = await self._connection.fetch(sql.FIND_ENTRIES, self._values({"event_ids": sorted(set(event_ids))}))
        return {received.entry.event.event_id: received for received in map(sql.read_entry, rows)}

    async def pages(self, since: Mapping[AccountKey, int]) -> dict[AccountKey, Page]:
        """Read what it takes to fold accounts again from a moment on, each from the newest checkpoint before it."""
        if not since:
            return {}
        columns = sql.to_columns(sql.KEY | {"ms": ""}, [(key.store_id, key.buyer_id, ms) for key, ms in since.items()])
        before_ms = columns.pop("ms")
        rows = await self._connection.fetch(sql.FIND_CHECKPOINTS, self._values(columns | {"before_ms": before_ms}))
        bases = dict.fromkeys(since, Account()) | dict(map(sql.read_account, rows))
        after_ms = [bases[key].newest_at_ms or 0 for key in since]
        rows = await self._connection.fetch(sql.READ_HISTORIES, self._values(columns | {"after_ms": after_ms}))
        histories: dict[AccountKey, list[BookEntry]] = {key: [] for key in since}
        for received in map(sql.read_entry, rows):
            histories[received.entry.event.account].append(received)
            self._voids[received.entry.event.event_id] = received.void
        return {key: Page(bases[key], [received.entry for received in histories[key]]) for key in since}

    async def with_more_lots(self, key: AccountKey, account: Account) -> Account:
        """Read some of the lots that are not kept with a state, and return the state with them."""
        far_lots = account.far_lots
        if far_lots is None:
            return account
        count = max(FAR_LOTS_READ, 3 * len(account.lots))
        values = _named(self._merchant_id, key) | {
            "newest_at_ms": account.newest_at_ms,
            "first_event_id": far_lots.event_id,
            "first_expires_at_ms": far_lots.order_ms,
            "count": count + 1,
        }
        lots = [Lot(*row) for row in await self._connection.fetch(sql.READ_FAR_LOTS, values)]
        if len(lots) <= count:
            return replace(account, lots=(*account.lots, *lots), far_lots=None)
        # The two lots that an event may have made stay together.
        end = count - (lots[count].event_id == lots[count - 1].event_id)
        points = far_lots.points - sum(lot.remaining for lot in lots[:end])
        beyond = FarLots(points, lots[end].expires_at_ms, lots[end].event_id)
        return replace(account, lots=(*account.lots, *lots[:end]), far_lots=beyond)

    async def set_void(self, events: Sequence[Event], void: Void, *, is_void: bool) -> dict[AccountKey, Account]:
        """Fold the accounts of some events again without them, or with them; `void` tells why and when."""
        since: dict[AccountKey, int] = {}
        for event in events:
            since[event.account] = min(since.get(event.account, event.updated_at_ms), event.updated_at_ms)
        pages = await self.pages(since)
        changed = [event.event_id for event in events]
        self._voids |= dict.fromkeys(changed, void if is_void else None)
        postings = {}
        for key, page in pages.items():
            postings[key] = await self._refold(key, page, changed, is_void=is_void)
        await self.write([], postings)
        await self._connection.execute(
            sql.TELL_VOIDINGS,
            self._values(
                {
                    "voiding_id": secrets.token_hex(8),
                    "event_ids": changed,
                    "action": "VOID" if is_void else "UNVOID",
                    "reason": void.reason,
                    "at_ms": void.at_ms,
                }
            ),
        )
        return {key: await self.complete(key, posting.account, void.at_ms) for key, posting in postings.items()}

    async def _refold(self, key: AccountKey, page: Page, event_ids: Sequence[str], *, is_void: bool) -> Posting:
        while True:
            journal = Journal(page.base, page.history)
            (journal.void if is_void else journal.unvoid)(event_ids)
            try:
                if len(page.history) < LONG_FOLD:
                    return journal.close()
                return await asyncio.to_thread(journal.close)
            except FarLotsNeededError:
                page = page._replace(base=await self.with_more_lots(key, page.base))

    async def complete(self, key: AccountKey, account: Account, at_ms: int, *, lots: int = 0) -> Account:
        """Read as many far lots as it takes to tell what is active at a moment, and to show so many lots."""
        while _lacks_lots(account, at_ms, lots):
            account = await self.with_more_lots(key, account)
        return account

    async def write(self, entries: Sequence[BookEntry], postings: Mapping[AccountKey, Posting]) -> None:
        """Write new entries, and what they changed.

        Raises RetryTransactionError, and then nothing is written: where an account has changed since it was read, was
        opened, or an event_id was claimed.
        """
        touched = {entry.entry.event.account for entry in entries if entry.outcome is not Outcome.REFUSED}
        touched |= {key for key, posting in postings.items() if posting.moved}
        changed = {key: postings[key] for key in sorted(touched)}
        await self._write_moved(changed)
        await self._drop_checkpoints(changed)
        await self._write_batch(entries, changed)

    async def _write_batch(self, entries: Sequence[BookEntry], changed: Mapping[AccountKey, Posting]) -> None:
        """Write new entries, accounts and checkpoints."""
        rows = [sql.write_entry(entry) for entry in entries]
        accounts = [
            sql.write_account(key, posting.account, self._revisions.get(key, NO_REVISION) + 1)
            for key, posting in changed.items()
        ]
        kept = [
            sql.write_checkpoint(key, account) for key, posting in changed.items() for account in posting.checkpoints
        ]
        if not rows and not accounts:
            return
        values: dict[str, object] = {
            "merchant_id": self._merchant_id,
            "known_count": sum(key in self._revisions for key in changed),
            "row_count": len(rows) + len(accounts) + len(kept),
            **sql.to_columns(sql.ENTRY_COLUMNS, rows, "entry_"),
            **sql.to_columns(sql.ACCOUNT_COLUMNS, accounts, "account_"),
        }
        statement = sql.WRITE_BATCH
        if kept:
            statement = sql.WRITE_BATCH_AND_CHECKPOINTS
            values |= sql.to_columns(sql.CHECKPOINT_COLUMNS, kept, "kept_")
        if await self._connection.fetch_one(statement, values) is None:
            raise RetryTransactionError

    async def _write_moved(self, changed: Mapping[AccountKey, Posting]) -> None:
        """Rewrite what the fold derives for earlier entries whose place or effect is another one now."""
        rows = [
            (entry.event.event_id, *sql.write_derived(entry, self._voids[entry.event.event_id]))
            for posting in changed.values()
            for entry in posting.moved
        ]
        if rows:
            columns = sql.to_columns({"event_id": "", **sql.DERIVED}, rows)
            await self._connection.execute(sql.MOVE_ENTRIES, self._values(columns))

    async def _drop_checkpoints(self, changed: Mapping[AccountKey, Posting]) -> None:
        """Drop the checkpoints that no longer hold."""
        stale = [
            (key.store_id, key.buyer_id, posting.checkpoints_valid_to_ms)
            for key, posting in changed.items()
            if posting.checkpoints_valid_to_ms is not None
        ]
        if stale:
            columns = sql.to_columns(sql.KEY | {"after_ms": ""}, stale)
            await self._connection.execute(sql.DROP_CHECKPOINTS, self._values(columns))

    def _values(self, values: Mapping[str, object]) -> dict[str, object]:
        return {"merchant_id": self._merchant_id, **values}


def _lacks_lots(account: Account, at_ms: int, lots: int) -> bool:
    """Tell whether far lots are needed to tell what is active at a moment, or to show so many lots."""
    far_lots = account.far_lots
    return far_lots is not None and (far_lots.order_ms <= at_ms or len(account.lots) < lots)


def _entry_not_found(event_id: str) -> PointbookError:
    return PointbookError(
        Reason.ENTRY_NOT_FOUND, "No entry of the book has this event_id.", metadata={"event_id": event_id}
    )


def _named(merchant_id: str, key: AccountKey) -> dict[str, object]:
    return {"merchant_id": merchant_id, "store_id": key.store_id, "buyer_id": key.buyer_id}
