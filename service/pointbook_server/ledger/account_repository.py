"""The accounts of one merchant on one connection: how they are read, locked, folded again and written."""

import asyncio
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from pointbook_server.db.database import Connection, RetryTransactionError, Row, Statement
from pointbook_server.ledger import queries
from pointbook_server.ledger.holds import Hold, held_at
from pointbook_server.ledger.journal import AccountChange, Journal
from pointbook_server.ledger.lots import Lot, OverflowLots, OverflowLotsNeededError
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, Event, Expiry
from pointbook_server.ledger.posting import AccountHistory
from pointbook_server.ledger.queries import StoredEntry, Void

NO_REVISION = -1
"""The revision of an account that is not there; the first one is 0."""
LONG_FOLD = 1_000
"""From how many entries on a fold must not make all other callers wait: it is handed to a thread."""
FAR_LOTS_READ = 1_000
"""How many far lots are read at first; each further time it is three times as many as there are by then.

It is 2 at least, so that two lots that stay together are read at once.
"""


class AccountRepository:
    """The accounts of one merchant on one connection, inside whatever transaction it is in.

    `accounts` are those that are there, once read, and `holds` those of them that have any, as they are to be written.
    `webhook_ids` are the webhooks that brought the entries which were read, by event_id.
    """

    def __init__(self, connection: Connection, merchant_id: str) -> None:
        self.accounts: dict[AccountKey, Account] = {}
        self.holds: dict[AccountKey, tuple[Hold, ...]] = {}
        self.webhook_ids: dict[str, str] = {}
        self._connection = connection
        self._merchant_id = merchant_id
        self._revisions: dict[AccountKey, int] = {}
        self._voids: dict[str, Void | None] = {}

    async def read(self, keys: Iterable[AccountKey]) -> None:
        """Read accounts without locking them: what is written then takes effect only where none has changed."""
        await self._read(queries.READ_ACCOUNTS, keys)

    async def lock(self, keys: Iterable[AccountKey], *, skip_locked: bool = False) -> None:
        """Lock accounts, and read them as they are under the lock; those that are locked may be left out."""
        await self._read(queries.LOCK_FREE_ACCOUNTS if skip_locked else queries.LOCK_ACCOUNTS, keys)

    async def _read(self, statement: Statement, keys: Iterable[AccountKey]) -> None:
        rows = await self._connection.fetch(statement, self._values(queries.keys_to_columns(sorted(keys))))
        for row in rows:
            key, account = queries.read_account(row)
            self.accounts[key] = account
            self._revisions[key] = row.revision
            if account.holds:
                self.holds[key] = account.holds

    async def account(self, key: AccountKey) -> Account:
        """Read an account without locking it; one that is not there is empty."""
        row = await self._connection.fetch_one(queries.READ_ACCOUNT, _named(self._merchant_id, key))
        return Account() if row is None else queries.read_account(row)[1]

    async def register_stores(self, store_ids: Sequence[str], now_ms: int) -> None:
        """Register stores that are not registered yet."""
        await self._connection.execute(
            queries.REGISTER_STORES, self._values({"store_ids": list(store_ids), "now_ms": now_ms})
        )

    async def store_owners(self, store_ids: Sequence[str]) -> dict[str, str]:
        """Tell which merchants stores are registered for."""
        rows = await self._connection.fetch(queries.READ_STORES, {"store_ids": list(store_ids)})
        return {row.store_id: row.merchant_id for row in rows}

    async def find(self, event_ids: Iterable[str]) -> dict[str, StoredEntry]:
        """Read what is known under event_ids, remembered refusals included."""
        rows = await self._connection.fetch(queries.FIND_ENTRIES, self._values({"event_ids": sorted(set(event_ids))}))
        return {received.entry.event.event_id: received for received in self._read_entries(rows)}

    async def pages(self, since: Mapping[AccountKey, int]) -> dict[AccountKey, AccountHistory]:
        """Read what it takes to fold accounts again from a moment on, each from the newest checkpoint before it."""
        if not since:
            return {}
        columns = queries.to_columns(
            queries.KEY | {"ms": ""}, [(key.store_id, key.buyer_id, ms) for key, ms in since.items()]
        )
        before_ms = columns.pop("ms")
        rows = await self._connection.fetch(queries.FIND_CHECKPOINTS, self._values(columns | {"before_ms": before_ms}))
        bases = dict.fromkeys(since, Account()) | dict(map(queries.read_account, rows))
        after_ms = [bases[key].newest_at_ms or 0 for key in since]
        rows = await self._connection.fetch(queries.READ_HISTORIES, self._values(columns | {"after_ms": after_ms}))
        histories: dict[AccountKey, list[StoredEntry]] = {key: [] for key in since}
        for received in self._read_entries(rows):
            histories[received.entry.event.account].append(received)
            self._voids[received.entry.event.event_id] = received.void
        return {key: AccountHistory(bases[key], [received.entry for received in histories[key]]) for key in since}

    def _read_entries(self, rows: Iterable[Row]) -> list[StoredEntry]:
        entries = [queries.read_entry(row) for row in rows]
        self.webhook_ids |= {received.entry.event.event_id: received.webhook.webhook_id for received in entries}
        return entries

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
        lots = [Lot(*row) for row in await self._connection.fetch(queries.READ_FAR_LOTS, values)]
        if len(lots) <= count:
            return replace(account, lots=(*account.lots, *lots), far_lots=None)
        # The two lots that an event may have made stay together.
        end = count - (lots[count].event_id == lots[count - 1].event_id)
        points = far_lots.points - sum(lot.remaining for lot in lots[:end])
        beyond = OverflowLots(points, lots[end].expires_at_ms, lots[end].event_id)
        return replace(account, lots=(*account.lots, *lots[:end]), far_lots=beyond)

    async def with_free_points(self, key: AccountKey, account: Account, at_ms: int, points: int) -> Account:
        """Read as many far lots as it takes to have so many unexpired points at a moment, beside what is held."""
        while lacks_points(account, at_ms, points):
            account = await self.with_more_lots(key, account)
        return account

    async def far_points(
        self, accounts: Mapping[AccountKey, Account], expiries: Iterable[tuple[AccountKey, int]]
    ) -> dict[tuple[AccountKey, int], int]:
        """Sum what the far lots of accounts hold that expires at given moments, without reading the other lots."""
        rows = []
        for key, at_ms in expiries:
            far_lots = accounts[key].far_lots
            if far_lots is not None and far_lots.order_ms <= at_ms:
                rows.append((*key, at_ms, far_lots.order_ms, far_lots.event_id))
        if not rows:
            return {}
        values = self._values(queries.to_columns(queries.FAR_POINTS, rows))
        found = await self._connection.fetch(queries.SUM_FAR_POINTS, values)
        return {(AccountKey(row.store_id, row.buyer_id), row.expires_at_ms): row.points for row in found}

    async def next_expiry(self, key: AccountKey, account: Account, at_ms: int) -> Expiry | None:
        """Read what of an account expires soonest after a moment, beside what is held; None where nothing does."""
        account = await self.with_free_points(key, account, at_ms, 1)
        expiry = account.next_expiry(at_ms)
        if expiry is None:
            return None
        far_points = await self.far_points({key: account}, [(key, expiry.at_ms)])
        return expiry._replace(points=expiry.points + far_points.get((key, expiry.at_ms), 0))

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
            queries.TELL_VOIDINGS,
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
        accounts = {key: replace(posting.account, holds=self.holds.get(key, ())) for key, posting in postings.items()}
        return {key: await self.complete(key, account, void.at_ms) for key, account in accounts.items()}

    async def _refold(
        self, key: AccountKey, page: AccountHistory, event_ids: Sequence[str], *, is_void: bool
    ) -> AccountChange:
        while True:
            journal = Journal(page.base, page.history)
            (journal.void if is_void else journal.unvoid)(event_ids)
            try:
                if len(page.history) < LONG_FOLD:
                    return journal.close()
                return await asyncio.to_thread(journal.close)
            except OverflowLotsNeededError:
                page = page._replace(base=await self.with_more_lots(key, page.base))

    async def complete(
        self, key: AccountKey, account: Account, at_ms: int, *, lots: int = 0, points: int = 0
    ) -> Account:
        """Read as many far lots as it takes to tell what is active at a moment, and to show so many lots, or points.

        The points are unexpired ones, beside what is held.
        """
        while lacks_lots(account, at_ms, lots) or lacks_points(account, at_ms, points):
            account = await self.with_more_lots(key, account)
        return account

    async def made_at_ms(self, event_ids: Iterable[str]) -> dict[str, int]:
        """Tell when events of the book happened."""
        rows = await self._connection.fetch(
            queries.READ_EVENT_TIMES, self._values({"event_ids": sorted(set(event_ids))})
        )
        return {row.event_id: row.updated_at_ms for row in rows}

    async def lift_refusals(self, event_ids: Collection[str]) -> None:
        """Delete remembered refusals, whose event_ids entries are about to claim."""
        if event_ids:
            await self._connection.execute(queries.LIFT_REFUSALS, self._values({"event_ids": sorted(event_ids)}))

    async def put_holds(self, holds: Mapping[AccountKey, tuple[Hold, ...]]) -> None:
        """Write the holds of locked accounts."""
        rows = [(*key, queries.write_holds(its_holds)) for key, its_holds in sorted(holds.items())]
        await self._connection.execute(
            queries.PUT_HOLDS, self._values(queries.to_columns(queries.KEY | {"holds": ""}, rows))
        )
        self.holds |= holds

    async def settle(self, event_id: str, redemption_id: str, settled_redemption_id: str) -> None:
        """Record that an entry of a locked account settled a redemption, in place of another one, empty for none.

        Raises RetryTransactionError where the entry is void, or has not settled that other one.
        """
        values = {
            "event_id": event_id,
            "redemption_id": redemption_id,
            "settled_redemption_id": settled_redemption_id,
        }
        if not await self._connection.execute(queries.SETTLE_ENTRY, self._values(values)):
            raise RetryTransactionError

    async def write(self, entries: Sequence[StoredEntry], postings: Mapping[AccountKey, AccountChange]) -> None:
        """Write new entries, and what they changed.

        Raises RetryTransactionError, and then nothing is written: where an account has changed since it was read, was
        opened, or an event_id was claimed.
        """
        touched = {entry.entry.event.account for entry in entries if entry.outcome is not ApplyOutcome.REFUSED}
        touched |= {key for key, posting in postings.items() if posting.moved}
        changed = {key: postings[key] for key in sorted(touched)}
        await self._write_moved(changed)
        await self._drop_checkpoints(changed)
        await self._write_batch(entries, changed)

    async def _write_batch(self, entries: Sequence[StoredEntry], changed: Mapping[AccountKey, AccountChange]) -> None:
        """Write new entries, accounts and checkpoints."""
        rows = [queries.write_entry(entry) for entry in entries]
        accounts = [
            queries.write_account(
                key, posting.account, self.holds.get(key, ()), self._revisions.get(key, NO_REVISION) + 1
            )
            for key, posting in changed.items()
        ]
        kept = [
            queries.write_checkpoint(key, account)
            for key, posting in changed.items()
            for account in posting.checkpoints
        ]
        if not rows and not accounts:
            return
        values: dict[str, object] = {
            "merchant_id": self._merchant_id,
            "known_count": sum(key in self._revisions for key in changed),
            "row_count": len(rows) + len(accounts) + len(kept),
            **queries.to_columns(queries.ENTRY_COLUMNS, rows, "entry_"),
            **queries.to_columns(queries.ACCOUNT_COLUMNS, accounts, "account_"),
        }
        statement = queries.WRITE_BATCH
        if kept:
            statement = queries.WRITE_BATCH_AND_CHECKPOINTS
            values |= queries.to_columns(queries.CHECKPOINT_COLUMNS, kept, "kept_")
        if await self._connection.fetch_one(statement, values) is None:
            raise RetryTransactionError

    async def _write_moved(self, changed: Mapping[AccountKey, AccountChange]) -> None:
        """Rewrite what the fold derives for earlier entries whose place or effect is another one now."""
        rows = [
            (entry.event.event_id, *queries.write_derived(entry, self._voids[entry.event.event_id]))
            for posting in changed.values()
            for entry in posting.moved
        ]
        if rows:
            columns = queries.to_columns({"event_id": "", **queries.DERIVED}, rows)
            await self._connection.execute(queries.MOVE_ENTRIES, self._values(columns))

    async def _drop_checkpoints(self, changed: Mapping[AccountKey, AccountChange]) -> None:
        """Drop the checkpoints that no longer hold."""
        stale = [
            (key.store_id, key.buyer_id, posting.checkpoints_valid_to_ms)
            for key, posting in changed.items()
            if posting.checkpoints_valid_to_ms is not None
        ]
        if stale:
            columns = queries.to_columns(queries.KEY | {"after_ms": ""}, stale)
            await self._connection.execute(queries.DROP_CHECKPOINTS, self._values(columns))

    def _values(self, values: Mapping[str, object]) -> dict[str, object]:
        return {"merchant_id": self._merchant_id, **values}


def lacks_points(account: Account, at_ms: int, points: int) -> bool:
    """Tell whether far lots are needed to draw so many points beside what is held."""
    if account.far_lots is None:
        return False
    near = sum(lot.remaining for lot in account.lots if lot.order_ms > at_ms)
    return near - held_at(account.holds, at_ms) < points


def lacks_lots(account: Account, at_ms: int, lots: int) -> bool:
    """Tell whether far lots are needed to tell what is active at a moment, or to show so many lots."""
    far_lots = account.far_lots
    return far_lots is not None and (far_lots.order_ms <= at_ms or len(account.lots) < lots)


def _named(merchant_id: str, key: AccountKey) -> dict[str, object]:
    return {"merchant_id": merchant_id, "store_id": key.store_id, "buyer_id": key.buyer_id}
