"""The repository of one merchant's accounts."""

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pointbook_server.db.database import Connection, Row, Statement
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.ledger import queries, rows
from pointbook_server.ledger.holds import Hold, sum_held
from pointbook_server.ledger.journal import AccountChange
from pointbook_server.ledger.lots import Lot, OverflowLots
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, Expiry, StoredEntry, Void
from pointbook_server.ledger.posting import AccountHistory

NO_REVISION = -1
"""The revision of an account that does not exist; the first revision is 0."""
OVERFLOW_LOTS_READ_MIN = 1_000
"""How many overflow lots the first load reads; each further one reads three times as many as are loaded.

At least 2, so that two lots that must stay together are loaded at once.
"""


class AccountRepository:
    """The accounts of one merchant on one connection, inside its current transaction.

    `accounts` has the existing accounts that were read, `revisions` the revision of each, and `holds` the holds that
    `write` stores with them.
    `webhook_ids` has the id of the webhook that delivered each entry that was read, by event_id.
    """

    def __init__(self, connection: Connection, merchant_id: str) -> None:
        self.accounts: dict[AccountKey, Account] = {}
        self.holds: dict[AccountKey, tuple[Hold, ...]] = {}
        self.webhook_ids: dict[str, str] = {}
        self._connection = connection
        self.merchant_id = merchant_id
        self.revisions: dict[AccountKey, int] = {}
        self._voids: dict[str, Void | None] = {}

    async def read(self, keys: Iterable[AccountKey]) -> None:
        """Read accounts without locks; `write` fails if one has changed since."""
        await self._read(queries.READ_ACCOUNTS, keys)

    async def lock(self, keys: Iterable[AccountKey], *, skip_locked: bool = False) -> None:
        """Lock accounts, and read them under the lock.

        With `skip_locked`, accounts that are already locked are left out.
        """
        await self._read(queries.LOCK_AVAILABLE_ACCOUNTS if skip_locked else queries.LOCK_ACCOUNTS, keys)

    async def _read(self, statement: Statement, keys: Iterable[AccountKey]) -> None:
        for row in await self._connection.fetch(statement, self._params(rows.keys_to_columns(sorted(keys)))):
            self.add(row)

    def add(self, row: Row) -> None:
        """Add an account that was read."""
        key, account = rows.account_from_row(row)
        self.accounts[key] = account
        self.revisions[key] = row["revision"]
        if account.holds:
            self.holds[key] = account.holds

    async def read_one(self, key: AccountKey) -> Account:
        """Return an account without locking it; an empty one if it does not exist."""
        row = await self._connection.fetch_one(queries.READ_ACCOUNT, self._params(key._asdict()))
        return Account() if row is None else rows.account_from_row(row)[1]

    async def register_stores(self, store_ids: Sequence[str], now_ms: int) -> None:
        """Register the stores that are not registered yet."""
        params = self._params({"store_ids": list(store_ids), "now_ms": now_ms})
        await self._connection.execute(queries.REGISTER_STORES, params)

    async def find_store_owners(self, store_ids: Sequence[str]) -> dict[str, str]:
        """Return the merchants for which stores are registered, by store_id."""
        found = await self._connection.fetch(queries.READ_STORE_OWNERS, {"store_ids": list(store_ids)})
        return {row.store_id: row.merchant_id for row in found}

    async def find_entries(self, event_ids: Iterable[str]) -> dict[str, StoredEntry]:
        """Return the entries with some event_ids, including stored refusals."""
        params = self._params({"event_ids": sorted(set(event_ids))})
        found = await self._connection.fetch(queries.FIND_ENTRIES, params)
        return {stored.entry.event.event_id: stored for stored in self._entries_from_rows(found)}

    async def read_histories(self, since: Mapping[AccountKey, int]) -> dict[AccountKey, AccountHistory]:
        """Return the newest checkpoints before given times, and the later entries.

        Source: docs/reference/ledger.md#late-events-and-checkpoints.
        """
        if not since:
            return {}
        columns = rows.to_columns(
            queries.KEY_COLUMNS | {"ms": ""}, [(key.store_id, key.buyer_id, ms) for key, ms in since.items()]
        )
        before_ms = columns.pop("ms")
        params = self._params(columns | {"before_ms": before_ms})
        checkpoints = await self._connection.fetch(queries.READ_NEWEST_CHECKPOINTS, params)
        bases = dict.fromkeys(since, Account()) | dict(map(rows.account_from_row, checkpoints))
        params = self._params(columns | {"after_ms": [bases[key].newest_at_ms or 0 for key in since]})
        entry_rows = await self._connection.fetch(queries.READ_HISTORIES, params)
        entries: dict[AccountKey, list[StoredEntry]] = {key: [] for key in since}
        for stored in self._entries_from_rows(entry_rows):
            entries[stored.entry.event.account_key].append(stored)
            self._voids[stored.entry.event.event_id] = stored.void
        return {key: AccountHistory(bases[key], [stored.entry for stored in entries[key]]) for key in since}

    def _entries_from_rows(self, entry_rows: Iterable[Row]) -> list[StoredEntry]:
        entries = [rows.entry_from_row(row) for row in entry_rows]
        self.webhook_ids |= {stored.entry.event.event_id: stored.webhook.webhook_id for stored in entries}
        return entries

    async def load_more_lots(self, key: AccountKey, account: Account) -> Account:
        """Return an account with more of its overflow lots loaded."""
        overflow = account.overflow
        if overflow is None:
            return account
        count = max(OVERFLOW_LOTS_READ_MIN, 3 * len(account.lots))
        params = {
            "newest_at_ms": account.newest_at_ms,
            "first_event_id": overflow.first_event_id,
            "first_expires_at_ms": overflow.first_expiry_or_never_ms,
            "count": count + 1,
        }
        found = await self._connection.fetch(queries.READ_OVERFLOW_LOTS, self._params(key._asdict() | params))
        lots = [Lot(*row) for row in found]
        if len(lots) <= count:
            return replace(account, lots=(*account.lots, *lots), overflow=None)
        # The two lots that one event may have made stay together.
        end = count - (lots[count].event_id == lots[count - 1].event_id)
        points = overflow.points - sum(lot.remaining for lot in lots[:end])
        rest = OverflowLots(points, lots[end].expires_at_ms, lots[end].event_id)
        return replace(account, lots=(*account.lots, *lots[:end]), overflow=rest)

    async def load_lots(
        self, key: AccountKey, account: Account, at_ms: int, *, lots: int = 0, points: int = 0
    ) -> Account:
        """Return an account with the overflow lots loaded that `points_at` needs.

        Also with at least `lots` lots, and lots of at least `points` unheld, unexpired points, if it has them.
        """
        while lacks_lots(account, at_ms, lots) or lacks_points(account, at_ms, points):
            account = await self.load_more_lots(key, account)
        return account

    async def load_points(self, key: AccountKey, account: Account, at_ms: int, points: int) -> Account:
        """Load lots until they have `points` unheld, unexpired points, or all are loaded."""
        while lacks_points(account, at_ms, points):
            account = await self.load_more_lots(key, account)
        return account

    async def sum_overflow_points(
        self, accounts: Mapping[AccountKey, Account], expiries: Iterable[tuple[AccountKey, int]]
    ) -> dict[tuple[AccountKey, int], int]:
        """Return the points of overflow lots by expiry, without loading the lots."""
        lookups = []
        for key, at_ms in expiries:
            overflow = accounts[key].overflow
            if overflow is not None and overflow.first_expiry_or_never_ms <= at_ms:
                lookups.append((*key, at_ms, overflow.first_expiry_or_never_ms, overflow.first_event_id))
        if not lookups:
            return {}
        params = self._params(rows.to_columns(queries.OVERFLOW_COLUMNS, lookups))
        found = await self._connection.fetch(queries.SUM_OVERFLOW_POINTS, params)
        return {(AccountKey(row.store_id, row.buyer_id), row.expires_at_ms): row.points for row in found}

    async def next_expiry(self, key: AccountKey, account: Account, at_ms: int) -> Expiry | None:
        """Return the next expiry of unheld points of an account after a time, if any."""
        account = await self.load_points(key, account, at_ms, 1)
        expiry = account.next_expiry(at_ms)
        if expiry is None:
            return None
        overflow_points = await self.sum_overflow_points({key: account}, [(key, expiry.at_ms)])
        return expiry._replace(points=expiry.points + overflow_points.get((key, expiry.at_ms), 0))

    def set_voids(self, event_ids: Sequence[str], void: Void | None) -> None:
        """Set the void of entries for the next `write`; None for entries that count."""
        self._voids |= dict.fromkeys(event_ids, void)

    async def insert_voidings(self, event_ids: Sequence[str], void: Void, *, is_void: bool) -> None:
        """Record that entries were voided or unvoided, when and why."""
        params = {
            "voiding_id": secrets.token_hex(8),
            "event_ids": event_ids,
            "action": "VOID" if is_void else "UNVOID",
            "reason": void.reason,
            "at_ms": void.at_ms,
        }
        await self._connection.execute(queries.INSERT_VOIDINGS, self._params(params))

    async def find_event_times(self, event_ids: Iterable[str]) -> dict[str, int]:
        """Return the `updated_at_ms` of events by event_id."""
        params = self._params({"event_ids": sorted(set(event_ids))})
        found = await self._connection.fetch(queries.READ_EVENT_TIMES, params)
        return {row.event_id: row.updated_at_ms for row in found}

    async def delete_refusals(self, event_ids: Collection[str]) -> None:
        """Delete stored refusals so that new entries can claim their event_ids."""
        if event_ids:
            await self._connection.execute(queries.DELETE_REFUSALS, self._params({"event_ids": sorted(event_ids)}))

    async def write_holds(self, holds: Mapping[AccountKey, tuple[Hold, ...]]) -> None:
        """Write the holds of locked accounts. `accounts` then has them."""
        values = [(*key, rows.holds_to_json(account_holds)) for key, account_holds in sorted(holds.items())]
        params = self._params(rows.to_columns(queries.KEY_COLUMNS | {"holds": ""}, values))
        await self._connection.execute(queries.WRITE_HOLDS, params)
        self.holds |= holds
        self.accounts |= {key: replace(self.accounts[key], holds=account_holds) for key, account_holds in holds.items()}

    async def record_settlement(self, event_id: str, redemption_id: str, settled_redemption_id: str) -> None:
        """Record that an entry of a locked account settled a redemption.

        `settled_redemption_id` is the redemption that the entry has settled so far; empty for none. Raises
        RetryTransactionError if it is another one, or the entry is void.
        """
        params = {
            "event_id": event_id,
            "redemption_id": redemption_id,
            "settled_redemption_id": settled_redemption_id,
        }
        if not await self._connection.count_written(queries.RECORD_SETTLEMENT, self._params(params)):
            raise RetryTransactionError

    async def write(self, entries: Sequence[StoredEntry], changes: Mapping[AccountKey, AccountChange]) -> None:
        """Write new entries and the changed accounts.

        Raises RetryTransactionError, and then writes nothing, if an account has changed or was opened since it was
        read, or an event_id was claimed.
        """
        changed = _changed_accounts(entries, changes)
        await self._update_derived_values(changed)
        await self._delete_stale_checkpoints(changed)
        await write_batch(self._connection, [self.prepare_write(entries, changed)])

    def prepare_write(self, entries: Sequence[StoredEntry], changes: Mapping[AccountKey, AccountChange]) -> "BatchRows":
        """Return the rows that write new entries and the accounts that they change."""
        changed = _changed_accounts(entries, changes)
        merchant_id = self.merchant_id
        return BatchRows(
            merchant_id=merchant_id,
            existing_count=sum(key in self.revisions for key in changed),
            accounts=[
                rows.account_to_row(
                    merchant_id, key, change.account, self.holds.get(key, ()), self.revisions.get(key, NO_REVISION) + 1
                )
                for key, change in changed.items()
            ],
            entries=[rows.entry_to_row(merchant_id, stored) for stored in entries],
            checkpoints=[
                rows.checkpoint_to_row(merchant_id, key, account)
                for key, change in changed.items()
                for account in change.checkpoints
            ],
        )

    async def _update_derived_values(self, changed: Mapping[AccountKey, AccountChange]) -> None:
        """Update the earlier entries whose derived values have changed."""
        values = [
            (entry.event.event_id, *rows.derived_to_row(entry, self._voids[entry.event.event_id]))
            for change in changed.values()
            for entry in change.changed_entries
        ]
        if values:
            columns = rows.to_columns({"event_id": "", **queries.DERIVED_COLUMNS}, values)
            await self._connection.execute(queries.UPDATE_DERIVED_VALUES, self._params(columns))

    async def _delete_stale_checkpoints(self, changed: Mapping[AccountKey, AccountChange]) -> None:
        stale = [
            (key.store_id, key.buyer_id, change.checkpoints_valid_to_ms)
            for key, change in changed.items()
            if change.checkpoints_valid_to_ms is not None
        ]
        if stale:
            columns = rows.to_columns(queries.KEY_COLUMNS | {"after_ms": ""}, stale)
            await self._connection.execute(queries.DELETE_CHECKPOINTS, self._params(columns))

    def _params(self, params: Mapping[str, object]) -> dict[str, object]:
        return {"merchant_id": self.merchant_id, **params}


class BatchRows(NamedTuple):
    """The rows that write a merchant's batch, and how many of its accounts exist."""

    merchant_id: str
    existing_count: int
    accounts: list[tuple[Any, ...]]
    entries: list[tuple[Any, ...]]
    checkpoints: list[tuple[Any, ...]]


async def read_accounts(connection: Connection, keys: Mapping[AccountRepository, Collection[AccountKey]]) -> None:
    """Read accounts into the repositories of their merchants, without locks."""
    if len(keys) == 1:
        for repository, account_keys in keys.items():
            await repository.read(account_keys)
        return
    repositories = {repository.merchant_id: repository for repository in keys}
    wanted = [(repository.merchant_id, *key) for repository, account_keys in keys.items() for key in account_keys]
    columns = rows.to_columns(queries.MERCHANT_COLUMN | queries.KEY_COLUMNS, wanted)
    for row in await connection.fetch(queries.READ_ACCOUNTS_OF_MERCHANTS, columns):
        repositories[row["merchant_id"]].add(row)


async def write_batch(connection: Connection, batches: Sequence[BatchRows]) -> None:
    """Write the batches of one or several merchants in one statement.

    Raises RetryTransactionError, and then writes nothing, if an account has changed or was opened since it was read, or
    an event_id was claimed.
    """
    accounts = [row for batch in batches for row in batch.accounts]
    entries = [row for batch in batches for row in batch.entries]
    checkpoints = [row for batch in batches for row in batch.checkpoints]
    if not entries and not accounts:
        return
    params: dict[str, object] = {
        "existing_count": sum(batch.existing_count for batch in batches),
        "row_count": len(accounts) + len(entries) + len(checkpoints),
        "points_account_row": accounts,
        "points_entry_row": entries,
    }
    if checkpoints:
        params["points_checkpoint_row"] = checkpoints
    if len(batches) == 1:
        params["merchant_id"] = batches[0].merchant_id
        statement = queries.WRITE_BATCH_AND_CHECKPOINTS if checkpoints else queries.WRITE_BATCH
    else:
        # Locked in the order of their keys: a store belongs to one merchant.
        accounts.sort(key=lambda row: row[1:3])
        statement = queries.WRITE_MERCHANTS_AND_CHECKPOINTS if checkpoints else queries.WRITE_MERCHANTS
    if await connection.fetch_one(statement, params) is None:
        raise RetryTransactionError


def _changed_accounts(
    entries: Iterable[StoredEntry], changes: Mapping[AccountKey, AccountChange]
) -> dict[AccountKey, AccountChange]:
    """Return the changes of accounts with new or changed entries, in sorted order."""
    touched = {stored.entry.event.account_key for stored in entries if stored.outcome is not ApplyOutcome.REFUSED}
    touched |= {key for key, change in changes.items() if change.changed_entries}
    return {key: changes[key] for key in sorted(touched)}


def lacks_points(account: Account, at_ms: int, points: int) -> bool:
    """Return whether drawing a number of unheld points needs overflow lots."""
    if account.overflow is None:
        return False
    unexpired = sum(lot.remaining for lot in account.lots if lot.expiry_or_never_ms > at_ms)
    return unexpired - sum_held(account.holds, at_ms) < points


def lacks_lots(account: Account, at_ms: int, lots: int) -> bool:
    """Return whether `points_at`, or a list of `lots` lots, needs overflow lots."""
    overflow = account.overflow
    return overflow is not None and (overflow.first_expiry_or_never_ms <= at_ms or len(account.lots) < lots)
