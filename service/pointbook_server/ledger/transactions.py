"""The SQL of the ledger: each transaction of its own, on the statements of statements.py."""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, Protocol

from sqlalchemy import Text, and_, any_, bindparam, literal, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY

from pointbook_server.db.database import Connection, Database, RetryTransactionError, Statement
from pointbook_server.db.tables import points_entries
from pointbook_server.errors import PointbookError, Reason, store_not_found
from pointbook_server.ledger import queries
from pointbook_server.ledger.account_repository import LONG_FOLD, AccountRepository, lacks_lots
from pointbook_server.ledger.expiring_points import ExpiringPage, ExpiryReader, ExpiryWindow, Place
from pointbook_server.ledger.journal import PostedEvent
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    Event,
    Expiry,
    UpdateType,
    WebhookOrigin,
)
from pointbook_server.ledger.posting import (
    AccountHistory,
    KnownEvent,
    LotsMissingError,
    Result,
    Settlement,
    is_judged_anew,
    post_batch,
)
from pointbook_server.ledger.queries import StoredEntry, Void
from pointbook_server.rpc.pagination import PageQuery


class ReceivedEvent(NamedTuple):
    """An event as it was received; with `forgets_refusal` a refusal is answered and not remembered."""

    event: Event
    webhook: WebhookOrigin
    received_at_ms: int
    forgets_refusal: bool = False


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Which entries of an account to list; times are milliseconds, empty or None keeps all."""

    update_type: UpdateType | None = None
    scenes: tuple[str, ...] = ()
    start_ms: int | None = None
    end_ms: int | None = None


class Redemptions(Protocol):
    """The part of redemption that hears what SHOPLINE has booked."""

    async def settle(self, connection: Connection, merchant_id: str, settlements: Sequence[Settlement]) -> None:
        """Settle holds, in the transaction that writes their events, whose accounts are locked."""


class LedgerTransactions:
    """Reads and writes accounts and entries.

    With `register_stores` an unknown store is registered for the merchant that first sends an event of it: for
    `pointbook dev` only.
    """

    def __init__(self, database: Database, redemptions: Redemptions, *, register_stores: bool = False) -> None:
        self._database = database
        self._redemptions = redemptions
        self._register_stores = register_stores

    async def apply(self, merchant_id: str, batch: Sequence[ReceivedEvent]) -> list[ApplyResult | PointbookError]:
        """Write events of one merchant into the book in one transaction, and answer each after it has committed.

        An answer is a verdict, or STORE_NOT_FOUND, EVENT_ID_REUSED, or INSUFFICIENT_POINTS for a refused event without
        a balance. Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE, and then nothing is written.
        """
        posting = _Batch(merchant_id, batch, self._redemptions, register_stores=self._register_stores)
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
            account = await AccountRepository(connection, merchant_id).account(key)
        if not lacks_lots(account, at_ms, lots):
            return account

        async def read(connection: Connection) -> Account:
            book = AccountRepository(connection, merchant_id)
            return await book.complete(key, await book.account(key), at_ms, lots=lots)

        return await self._database.snapshot(read)

    async def next_expiry(self, merchant_id: str, key: AccountKey, account: Account, at_ms: int) -> Expiry | None:
        """Return what of an account expires soonest after a moment, beside what is held; None where nothing does."""
        if account.far_lots is None:
            return account.next_expiry(at_ms)
        async with self._database.autocommit() as connection:
            return await AccountRepository(connection, merchant_id).next_expiry(key, account, at_ms)

    async def expiring(self, merchant_id: str, window: ExpiryWindow, *, after: Place | None, size: int) -> ExpiringPage:
        """Read a page of the points that expire in a window, soonest first, behind a place."""

        async def read(connection: Connection) -> ExpiringPage:
            return await ExpiryReader(connection, merchant_id, window, after).page(size)

        return await self._database.snapshot(read)

    async def entries(
        self, merchant_id: str, key: AccountKey, wanted: EntryFilter, *, before: tuple[int, str] | None, limit: int
    ) -> list[StoredEntry]:
        """Read a page of an account's entries, the newest first, before one of them (time in ms, event_id).

        Its place inside its millisecond is looked up: it changes when another event of that time arrives late.
        """
        entry = points_entries.c
        query = select(*(entry[name] for name in queries.ENTRY_COLUMNS)).where(
            and_(entry.buyer_id == key.buyer_id, entry.store_id == key.store_id, entry.merchant_id == merchant_id),
            entry.outcome != ApplyOutcome.REFUSED.value,
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
            return [queries.read_entry(row) for row in await connection.fetch(Statement(query))]

    async def newest_entries(
        self, merchant_id: str, keys: Collection[AccountKey], query: PageQuery
    ) -> list[StoredEntry]:
        """Return a page of the entries of some accounts, the newest first, before one of them."""
        values = {"merchant_id": merchant_id, **queries.keys_to_columns(sorted(keys)), **asdict(query)}
        async with self._database.autocommit() as connection:
            return [queries.read_entry(row) for row in await connection.fetch(queries.LIST_NEWEST, values)]

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
            book = AccountRepository(connection, merchant_id)
            rows = await connection.fetch(queries.LIST_DRIFTING, values)
            return [(key, await book.complete(key, account, at_ms)) for key, account in map(queries.read_account, rows)]

        return await self._database.snapshot(read)

    async def set_void(
        self, merchant_id: str, event_ids: Sequence[str], void: Void, *, is_void: bool
    ) -> dict[AccountKey, Account]:
        """Void entries, or let them count again, all of them or none, and return the accounts that changed.

        Raises ENTRY_NOT_FOUND for the first that is not in the book.
        """

        async def work(connection: Connection) -> dict[AccountKey, Account]:
            book = AccountRepository(connection, merchant_id)
            entries = await book.find(event_ids)
            for event_id in event_ids:
                if event_id not in entries or entries[event_id].outcome is ApplyOutcome.REFUSED:
                    raise _entry_not_found(event_id)
            await book.lock({entry.entry.event.account for entry in entries.values()})
            entries = await book.find(event_ids)
            changing = [entry.entry.event for entry in entries.values() if (entry.void is None) is is_void]
            return await book.set_void(changing, void, is_void=is_void)

        return await self._database.transaction(work)


class _Batch:
    """Posts a batch, at first without locks: it may be done several times, as a whole."""

    def __init__(
        self, merchant_id: str, batch: Sequence[ReceivedEvent], redemptions: Redemptions, *, register_stores: bool
    ) -> None:
        self._merchant_id = merchant_id
        self._batch = batch
        self._redemptions = redemptions
        self._events = [received.event for received in batch]
        self._forgetting = {number for number, received in enumerate(batch) if received.forgets_refusal}
        self._register_stores = register_stores

    async def run_directly(self, connection: Connection) -> list[ApplyResult | PointbookError] | None:
        """Post a batch of which every event is later than all entries of its account: one read, and one write.

        The write is a transaction of its own, which takes effect only where no account has changed since. None where
        some event is not later, or may settle a hold, or where one makes no row, as it repeats another's content or its
        refusal is not remembered: its event_id may be in the book. Raises RetryTransactionError where an account has
        changed, or the book has an event_id.
        """
        book = AccountRepository(connection, self._merchant_id)
        await book.read({event.account for event in self._events})
        if not all(self._is_direct(event, book.accounts.get(event.account)) for event in self._events):
            return None
        result = await self._judge(book, {}, {})
        if result.leaves_ids_unclaimed:
            return None
        return await self._write(book, result)

    def _is_direct(self, event: Event, account: Account | None) -> bool:
        if account is None:
            return True
        may_settle = bool(account.holds) and event.update_type is UpdateType.DECREASE
        return account.is_before(event.updated_at_ms) and not may_settle

    async def run(self, connection: Connection) -> list[ApplyResult | PointbookError]:
        """Post any batch in a transaction, under locks: late events, and those that may be in the book already."""
        book = AccountRepository(connection, self._merchant_id)
        await book.lock({event.account for event in self._events})
        known = await self._known(book)
        result = await self._judge(book, known, await book.pages(self._since(book, known)))
        await book.lift_refusals(result.lifted)
        answers = await self._write(book, result)
        if result.settlements:
            await self._redemptions.settle(connection, self._merchant_id, result.settlements)
        return answers

    async def _judge(
        self, book: AccountRepository, known: Mapping[str, KnownEvent], pages: dict[AccountKey, AccountHistory]
    ) -> Result:
        refused = await self._refused(book)
        for event in self._events:
            pages.setdefault(event.account, AccountHistory(book.accounts.get(event.account, Account())))
        for key, holds in book.holds.items():
            pages[key] = pages[key]._replace(holds=holds)
        return await self._post(book, pages, known, refused)

    async def _write(self, book: AccountRepository, result: Result) -> list[ApplyResult | PointbookError]:
        book.holds |= result.holds
        settled = {settlement.event_id: settlement.hold.redemption_id for settlement in result.settlements}
        await book.write(
            [self._row(number, verdict, settled) for number, verdict in result.entries.items()], result.postings
        )
        return self._compare_webhooks(book, result)

    def _compare_webhooks(self, book: AccountRepository, result: Result) -> list[ApplyResult | PointbookError]:
        """Return the answers, in which each DUPLICATE names the webhook of its entry where that is another one.

        An entry came from the book, or from an earlier place of the batch.
        """
        duplicates = [
            (number, answer)
            for number, answer in enumerate(result.answers)
            if isinstance(answer, ApplyResult) and answer.outcome is ApplyOutcome.DUPLICATE
        ]
        if not duplicates:
            return result.answers
        new = {self._batch[number].event.event_id: self._batch[number].webhook.webhook_id for number in result.entries}
        known = book.webhook_ids | new
        answers = list(result.answers)
        for number, answer in duplicates:
            repeated, entered = self._batch[number].webhook.webhook_id, known[answer.entry.event.event_id]
            if repeated and entered and repeated != entered:
                answers[number] = answer._replace(entry_webhook_id=entered)
        return answers

    async def _refused(self, book: AccountRepository) -> dict[AccountKey, PointbookError]:
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

    async def _known(self, book: AccountRepository) -> dict[str, KnownEvent]:
        """Find what the book has under the event_ids."""
        found = await book.find(event.event_id for event in self._events)
        return {
            event_id: KnownEvent(received.entry.event, PostedEvent(received.outcome, event_id, received.entry))
            for event_id, received in found.items()
        }

    def _since(self, book: AccountRepository, known: Mapping[str, KnownEvent]) -> dict[AccountKey, int]:
        """Tell from which time on accounts must be folded again for events that are not later than all entries."""
        since: dict[AccountKey, int] = {}
        for number, event in enumerate(self._events):
            account = book.accounts.get(event.account)
            if account is None or account.is_before(event.updated_at_ms):
                continue
            seen = known.get(event.event_id)
            if seen is not None and not is_judged_anew(seen, forgets=number in self._forgetting):
                continue
            since[event.account] = min(since.get(event.account, event.updated_at_ms), event.updated_at_ms)
        return since

    async def _post(
        self,
        book: AccountRepository,
        pages: dict[AccountKey, AccountHistory],
        known: Mapping[str, KnownEvent],
        refused: Mapping[AccountKey, PointbookError],
    ) -> Result:
        """Post the events, with more and more of the far lots where they are needed."""
        now_ms = max(received.received_at_ms for received in self._batch)
        while True:
            try:
                post = partial(post_batch, self._events, pages, known, refused, now_ms, forgetting=self._forgetting)
                return post() if self._work(pages) < LONG_FOLD else await asyncio.to_thread(post)
            except LotsMissingError as error:
                page = pages[error.key]
                pages[error.key] = page._replace(base=await book.with_more_lots(error.key, page.base))

    def _work(self, pages: Mapping[AccountKey, AccountHistory]) -> int:
        """Tell how many entries may have to be folded: each event without a balance may fold its whole account."""
        events = Counter(event.account for event in self._events)
        judged = Counter(event.account for event in self._events if event.balance is None)
        return sum((judged[key] or 1) * (len(page.history) + events[key]) for key, page in pages.items())

    def _row(self, number: int, verdict: ApplyResult, settled: Mapping[str, str]) -> StoredEntry:
        received = self._batch[number]
        return StoredEntry(
            entry=verdict.entry,
            webhook=received.webhook,
            received_at_ms=received.received_at_ms,
            outcome=verdict.outcome,
            settled_redemption_id=settled.get(received.event.event_id),
        )


def _entry_not_found(event_id: str) -> PointbookError:
    return PointbookError(
        Reason.ENTRY_NOT_FOUND, "No entry of the book has this event_id.", metadata={"event_id": event_id}
    )
