"""A batch of received events, applied directly if possible, else under locks."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from pointbook_server.db.database import Connection
from pointbook_server.errors import PointbookError, store_not_found
from pointbook_server.ledger.account_repository import AccountRepository, read_accounts, write_batch
from pointbook_server.ledger.fold import LONG_FOLD_ENTRIES
from pointbook_server.ledger.journal import PostedEvent
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    Event,
    ReceivedEvent,
    StoredEntry,
    UpdateType,
)
from pointbook_server.ledger.posting import (
    AccountHistory,
    BatchResult,
    KnownEvent,
    LotsMissingError,
    Settlement,
    is_checked_again,
    post_batch,
)


class Redemptions(Protocol):
    """The part of redemption that settles holds."""

    async def settle(self, connection: Connection, merchant_id: str, settlements: Sequence[Settlement]) -> None:
        """Settle holds of locked accounts, in the transaction that writes their events."""


async def apply_directly(
    connection: Connection, batches: Sequence["EventBatch"]
) -> list[list[ApplyResult | PointbookError] | None]:
    """Apply batches of different merchants by one read and one atomic write.

    Nothing is locked in between. Return the results of each batch, or None if it needs `EventBatch.apply`. Raises
    RetryTransactionError, and then applies none, if an account has changed since the read, or the ledger has an
    event_id.
    """
    repositories = [AccountRepository(connection, batch.merchant_id) for batch in batches]
    await read_accounts(connection, dict(zip(repositories, (batch.account_keys for batch in batches), strict=True)))
    results: list[list[ApplyResult | PointbookError] | None] = []
    rows = []
    for batch, repository in zip(batches, repositories, strict=True):
        posted = await batch.post_directly(repository)
        if posted is None:
            results.append(None)
            continue
        rows.append(repository.prepare_write(batch.prepare_entries(repository, posted), posted.changes))
        results.append(batch.results(repository, posted))
    await write_batch(connection, rows)
    return results


class EventBatch:
    """A batch of a merchant's events; an attempt applies all of them, or none."""

    def __init__(
        self, merchant_id: str, batch: Sequence[ReceivedEvent], redemptions: Redemptions, *, register_stores: bool
    ) -> None:
        self.merchant_id = merchant_id
        self._batch = batch
        self._redemptions = redemptions
        self._events = [received.event for received in batch]
        self._forget_refusal_of = {index for index, received in enumerate(batch) if received.forget_refusal}
        self._register_stores = register_stores
        self._revisions_read: dict[AccountKey, int] = {}
        self.account_keys = {event.account_key for event in self._events}
        """The accounts that the events name."""
        self.received_at_ms = max(received.received_at_ms for received in batch)
        """When the last event was received."""
        self.overtaken_keys: set[AccountKey] = set()
        """The accounts that changed between `post_directly` and `apply`."""

    async def post_directly(self, repository: AccountRepository) -> BatchResult | None:
        """Post the events to accounts that were read without locks.

        Return None if the batch needs `apply`, because an event is not later than all entries of its account, may
        settle a hold, or makes no row: only writing a row checks that the ledger does not have the event_id.
        """
        self._revisions_read = repository.revisions
        if not all(self._is_direct(event, repository.accounts.get(event.account_key)) for event in self._events):
            return None
        result = await self._post(repository, {}, {})
        return None if result.leaves_ids_unclaimed else result

    def _is_direct(self, event: Event, account: Account | None) -> bool:
        if account is None:
            return True
        may_settle = bool(account.holds) and event.update_type is UpdateType.DECREASE
        return account.is_before(event.updated_at_ms) and not may_settle

    async def apply(self, connection: Connection) -> list[ApplyResult | PointbookError]:
        """Apply any batch in a transaction with locks."""
        repository = AccountRepository(connection, self.merchant_id)
        await repository.lock(self.account_keys)
        self.overtaken_keys |= {
            key for key, revision in self._revisions_read.items() if repository.revisions.get(key) != revision
        }
        known_events = await self._find_known_events(repository)
        histories = await repository.read_histories(self._refold_times(repository, known_events))
        result = await self._post(repository, known_events, histories)
        await repository.delete_refusals(result.replaced_refusals)
        await repository.write(self.prepare_entries(repository, result), result.changes)
        if result.settlements:
            await self._redemptions.settle(connection, self.merchant_id, result.settlements)
        return self.results(repository, result)

    async def _find_known_events(self, repository: AccountRepository) -> dict[str, KnownEvent]:
        """Return the events of the ledger that share an event_id with the batch."""
        found = await repository.find_entries(event.event_id for event in self._events)
        return {
            event_id: KnownEvent(stored.entry.event, PostedEvent(stored.outcome, event_id, stored.entry))
            for event_id, stored in found.items()
        }

    def _refold_times(
        self, repository: AccountRepository, known_events: Mapping[str, KnownEvent]
    ) -> dict[AccountKey, int]:
        """Return the times from which accounts must be folded again."""
        since: dict[AccountKey, int] = {}
        for index, event in enumerate(self._events):
            account = repository.accounts.get(event.account_key)
            if account is None or account.is_before(event.updated_at_ms):
                continue
            known = known_events.get(event.event_id)
            if known is not None and not is_checked_again(known, forget_refusal=index in self._forget_refusal_of):
                continue
            since[event.account_key] = min(since.get(event.account_key, event.updated_at_ms), event.updated_at_ms)
        return since

    async def _post(
        self,
        repository: AccountRepository,
        known_events: Mapping[str, KnownEvent],
        histories: dict[AccountKey, AccountHistory],
    ) -> BatchResult:
        """Post the events, and load overflow lots until there are enough."""
        account_errors = await self._find_unknown_stores(repository)
        for event in self._events:
            if event.account_key not in histories:
                histories[event.account_key] = AccountHistory(repository.accounts.get(event.account_key, Account()))
        for key, holds in repository.holds.items():
            histories[key] = histories[key]._replace(holds=holds)
        post = partial(
            post_batch,
            self._events,
            histories,
            known_events,
            account_errors,
            self.received_at_ms,
            forget_refusal_of=self._forget_refusal_of,
        )
        while True:
            try:
                is_long = self._count_folded_entries(histories) >= LONG_FOLD_ENTRIES
                return await asyncio.to_thread(post) if is_long else post()
            except LotsMissingError as error:
                history = histories[error.key]
                base = await repository.load_more_lots(error.key, history.base)
                histories[error.key] = history._replace(base=base)

    async def _find_unknown_stores(self, repository: AccountRepository) -> dict[AccountKey, PointbookError]:
        """Return the errors of accounts whose store the merchant does not have."""
        missing = sorted({event.account_key for event in self._events} - repository.accounts.keys())
        if not missing:
            return {}
        store_ids = sorted({key.store_id for key in missing})
        if self._register_stores:
            await repository.register_stores(store_ids, min(received.received_at_ms for received in self._batch))
        owners = await repository.find_store_owners(store_ids)
        return {
            key: store_not_found(key.store_id, registered_elsewhere=key.store_id in owners)
            for key in missing
            if owners.get(key.store_id) != self.merchant_id
        }

    def _count_folded_entries(self, histories: Mapping[AccountKey, AccountHistory]) -> int:
        """Return the most entries that may be folded.

        An event without a balance may fold its whole account.
        """
        total = len(self._events) + sum(len(history.entries) for history in histories.values())
        unbalanced = Counter(event.account_key for event in self._events if event.balance is None)
        if unbalanced:
            counts = Counter(event.account_key for event in self._events)
            total += sum((folds - 1) * (len(histories[key].entries) + counts[key]) for key, folds in unbalanced.items())
        return total

    def prepare_entries(self, repository: AccountRepository, result: BatchResult) -> list[StoredEntry]:
        """Return the entries to write; the repository gets the holds to write with them."""
        repository.holds |= result.remaining_holds
        settled = {settlement.event_id: settlement.hold.redemption_id for settlement in result.settlements}
        return [self._stored_entry(index, row, settled) for index, row in result.new_rows.items()]

    def _stored_entry(self, index: int, result: ApplyResult, settled: Mapping[str, str]) -> StoredEntry:
        received = self._batch[index]
        return StoredEntry(
            entry=result.entry,
            webhook=received.webhook,
            received_at_ms=received.received_at_ms,
            outcome=result.outcome,
            settled_redemption_id=settled.get(received.event.event_id),
        )

    def results(self, repository: AccountRepository, result: BatchResult) -> list[ApplyResult | PointbookError]:
        """Return the results, with the webhook of a DUPLICATE's entry if it differs.

        The entry is in the ledger, or comes from an earlier event of the batch.
        """
        duplicates = [
            (index, duplicate)
            for index, duplicate in enumerate(result.results)
            if isinstance(duplicate, ApplyResult) and duplicate.outcome is ApplyOutcome.DUPLICATE
        ]
        if not duplicates:
            return result.results
        new = {self._batch[index].event.event_id: self._batch[index].webhook.webhook_id for index in result.new_rows}
        webhook_ids = repository.webhook_ids | new
        results = list(result.results)
        for index, duplicate in duplicates:
            webhook_id = self._batch[index].webhook.webhook_id
            entry_webhook_id = webhook_ids[duplicate.entry.event.event_id]
            if webhook_id and entry_webhook_id and webhook_id != entry_webhook_id:
                results[index] = duplicate._replace(entry_webhook_id=entry_webhook_id)
        return results
