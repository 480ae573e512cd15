"""The transactions of the ledger."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict

from pointbook_server.db.database import Connection, Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.ledger import queries, rows
from pointbook_server.ledger.account_repository import AccountRepository, lacks_lots
from pointbook_server.ledger.contended_accounts import ContendedAccounts
from pointbook_server.ledger.event_batch import EventBatch, Redemptions, apply_directly
from pointbook_server.ledger.expiring_points import ExpiringPage, ExpiringPosition, ExpiryReader, ExpiryWindow
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    EntryFilter,
    Expiry,
    ReceivedEvent,
    StoredEntry,
    Void,
)
from pointbook_server.ledger.voiding import set_void
from pointbook_server.metrics import BatchMetrics, Metrics
from pointbook_server.reasons import Reason
from pointbook_server.rpc.batching import Batcher
from pointbook_server.rpc.pagination import PageQuery

ACCOUNTS_IN_READ_MAX = 500
READS_WAITING_MAX = 10_000
CONCURRENT_READS_MAX = 8
"""The most merchants whose accounts are read at a time."""
MERCHANTS_SHOWN_MAX = 50
"""How many merchants the metrics of drift have as labels."""
NO_ACCOUNT = Account()


class LedgerTransactions:
    """The transactions that read and write accounts and entries.

    `count_event` gets the scene and the outcome of each event whose transaction has committed. `register_stores`
    registers unknown stores for the merchant that first sends an event; only `pointbook dev` sets it.
    """

    def __init__(
        self,
        database: Database,
        redemptions: Redemptions,
        metrics: Metrics,
        *,
        count_event: Callable[[str, str], None],
        register_stores: bool = False,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._redemptions = redemptions
        self._count_event = count_event
        self._register_stores = register_stores
        self._account_batcher: Batcher[str, AccountKey, Account] = Batcher(
            self._read_accounts,
            batch_max=ACCOUNTS_IN_READ_MAX,
            waiting_max=READS_WAITING_MAX,
            max_concurrent_batches=CONCURRENT_READS_MAX,
            observer=BatchMetrics(metrics, "accounts"),
        )
        self._contended = ContendedAccounts()

    async def apply(self, merchant_id: str, batch: Sequence[ReceivedEvent]) -> list[ApplyResult | PointbookError]:
        """Write events of one merchant in one transaction, and return their results.

        The transaction has then committed. A result is an ApplyResult or an error: STORE_NOT_FOUND, EVENT_ID_REUSED, or
        INSUFFICIENT_POINTS for a refused event without a balance. Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE,
        and then writes nothing.
        Source: docs/reference/ledger.md#batching.
        """
        event_batch = self._new_batch(merchant_id, batch)
        if not self._is_contended(event_batch):
            with suppress(RetryTransactionError):
                async with self._database.autocommit() as connection:
                    (results,) = await apply_directly(connection, [event_batch])
                if results is not None:
                    return self._counted(results)
        results = await self._database.transaction(event_batch.apply, planned_once=True)
        self._contended.add(merchant_id, event_batch.overtaken_keys, event_batch.received_at_ms)
        return self._counted(results)

    def may_apply_merchants(self) -> bool:
        """Return whether one statement can concern several merchants.

        On Citus, they are on different nodes.
        """
        return not self._database.is_on_citus

    async def apply_merchants(
        self, batches: Mapping[str, Sequence[ReceivedEvent]]
    ) -> dict[str, list[ApplyResult | PointbookError]]:
        """Write events of several merchants in one statement; return results by merchant.

        Merchants that need a transaction of their own are left out: `apply` their events. Raises PointbookError, and
        then writes nothing, if any of the accounts has changed or is locked, and if the database is unavailable.
        """
        event_batches = [self._new_batch(merchant_id, batch) for merchant_id, batch in batches.items()]
        event_batches = [batch for batch in event_batches if not self._is_contended(batch)]
        async with self._database.autocommit(reports_outages=False) as connection:
            if not self.may_apply_merchants():  # known only now if this is the first connection
                return {}
            applied = await apply_directly(connection, event_batches)
        pairs = zip(event_batches, applied, strict=True)
        return {batch.merchant_id: self._counted(results) for batch, results in pairs if results}

    def _counted(self, results: list[ApplyResult | PointbookError]) -> list[ApplyResult | PointbookError]:
        """Count the results of a committed batch, and return them.

        Not where they are awaited, because an event is applied even if its caller has been cancelled.
        """
        for result in results:
            if isinstance(result, ApplyResult):
                self._count_event(result.entry.event.scene, result.outcome.value)
        return results

    def _new_batch(self, merchant_id: str, batch: Sequence[ReceivedEvent]) -> EventBatch:
        return EventBatch(merchant_id, batch, self._redemptions, register_stores=self._register_stores)

    def _is_contended(self, batch: EventBatch) -> bool:
        return self._contended.has_any(batch.merchant_id, batch.account_keys, batch.received_at_ms)

    async def account(self, merchant_id: str, key: AccountKey, at_ms: int, *, lots: int = 0) -> Account:
        """Return an account with the lots that `points_at` needs.

        Also with at least its first `lots` lots. An unknown account is empty. Concurrent calls share a statement.
        Raises QUEUE_FULL.
        """
        self._account_batcher.check_capacity(1)
        account = await self._account_batcher.run(merchant_id, key)
        if not lacks_lots(account, at_ms, lots):
            return account

        async def read(connection: Connection) -> Account:
            repository = AccountRepository(connection, merchant_id)
            return await repository.load_lots(key, await repository.read_one(key), at_ms, lots=lots)

        return await self._database.snapshot(read)

    async def _read_accounts(self, merchant_id: str, keys: Sequence[AccountKey]) -> list[Account | PointbookError]:
        async with self._database.autocommit() as connection:
            repository = AccountRepository(connection, merchant_id)
            await repository.read(set(keys))
        return [repository.accounts.get(key, NO_ACCOUNT) for key in keys]

    async def next_expiry(self, merchant_id: str, key: AccountKey, account: Account, at_ms: int) -> Expiry | None:
        """Return the next expiry of unheld points of an account after a time, if any."""
        if account.overflow is None:
            return account.next_expiry(at_ms)
        async with self._database.autocommit() as connection:
            return await AccountRepository(connection, merchant_id).next_expiry(key, account, at_ms)

    async def expiring_points(
        self, merchant_id: str, window: ExpiryWindow, *, after: ExpiringPosition | None, size: int
    ) -> ExpiringPage:
        """Return a page of the points that expire in a window, soonest first."""

        async def read(connection: Connection) -> ExpiringPage:
            return await ExpiryReader(connection, merchant_id, window, after).read_page(size)

        return await self._database.snapshot(read)

    async def entries(
        self,
        merchant_id: str,
        key: AccountKey,
        entry_filter: EntryFilter,
        *,
        before: tuple[int, str] | None,
        limit: int,
    ) -> list[StoredEntry]:
        """Return a page of an account's entries, newest first.

        The page ends before an entry, given by its time in ms and its event_id.
        """
        statement = queries.list_entries(merchant_id, key, entry_filter, before=before, limit=limit)
        async with self._database.autocommit() as connection:
            return [rows.entry_from_row(row) for row in await connection.fetch(statement)]

    async def newest_entries(
        self, merchant_id: str, keys: Collection[AccountKey], query: PageQuery
    ) -> list[StoredEntry]:
        """Return a page of the entries of some accounts, newest first."""
        params = {"merchant_id": merchant_id, **rows.keys_to_columns(sorted(keys)), **asdict(query)}
        async with self._database.autocommit() as connection:
            return [rows.entry_from_row(row) for row in await connection.fetch(queries.LIST_NEWEST_ENTRIES, params)]

    async def drifting_accounts(
        self, merchant_id: str, store_id: str, at_ms: int, *, after: AccountKey, limit: int
    ) -> list[tuple[AccountKey, Account]]:
        """Return a page of the accounts with a drift, after an account.

        An empty store_id means all stores. The accounts have the lots that `points_at` needs.
        """
        params = {
            "merchant_id": merchant_id,
            "store_id": store_id,
            "after_store_id": after.store_id,
            "after_buyer_id": after.buyer_id,
            "limit": limit,
        }

        async def read(connection: Connection) -> list[tuple[AccountKey, Account]]:
            repository = AccountRepository(connection, merchant_id)
            found = await connection.fetch(queries.LIST_DRIFTING_ACCOUNTS, params)
            accounts = map(rows.account_from_row, found)
            return [(key, await repository.load_lots(key, account, at_ms)) for key, account in accounts]

        return await self._database.snapshot(read)

    async def refresh_metrics(self, _now_ms: int) -> None:
        """Count the accounts with a drift, of the merchants with the most."""
        found = await self._database.read_planned(queries.COUNT_DRIFTING_ACCOUNTS, {"limit": MERCHANTS_SHOWN_MAX})
        self._metrics.drifting_accounts.replace({(row.merchant_id,): row.accounts for row in found})
        self._metrics.drift_points.replace({(row.merchant_id,): row.points for row in found})

    async def set_void(
        self, merchant_id: str, event_ids: Sequence[str], void: Void, *, is_void: bool
    ) -> dict[AccountKey, Account]:
        """Void or unvoid entries, all or none, and return the accounts that changed.

        Raises ENTRY_NOT_FOUND for the first that is not in the ledger.
        """

        async def work(connection: Connection) -> dict[AccountKey, Account]:
            repository = AccountRepository(connection, merchant_id)
            entries = await repository.find_entries(event_ids)
            for event_id in event_ids:
                if event_id not in entries or entries[event_id].outcome is ApplyOutcome.REFUSED:
                    raise _entry_not_found(event_id)
            await repository.lock({stored.entry.event.account_key for stored in entries.values()})
            entries = await repository.find_entries(event_ids)
            changing = [stored.entry.event for stored in entries.values() if (stored.void is None) is is_void]
            return await set_void(repository, changing, void, is_void=is_void)

        return await self._database.transaction(work)

    async def drain(self) -> None:
        """Wait until no account is being read."""
        await self._account_batcher.drain()


def _entry_not_found(event_id: str) -> PointbookError:
    return PointbookError(Reason.ENTRY_NOT_FOUND, "No ledger entry has this event_id.", metadata={"event_id": event_id})
