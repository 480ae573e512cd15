"""The SQL of the ledger."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Text, and_, any_, bindparam, literal, select, tuple_, update
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pointbook_server.database import Connection, Database, RetryTransactionError, Row, Statement
from pointbook_server.errors import FieldViolation, PointbookError, Reason, store_not_found
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    Draw,
    Entry,
    Event,
    Lot,
    Outcome,
    UpdateType,
    Verdict,
    Webhook,
    judge,
)
from pointbook_server.tables import points_accounts, points_entries, stores

ACCOUNT = points_accounts.c
ENTRY = points_entries.c
IS_ACCOUNT = and_(
    ACCOUNT.buyer_id == bindparam("buyer"),
    ACCOUNT.store_id == bindparam("store"),
    ACCOUNT.merchant_id == bindparam("merchant"),
)
IS_ENTRY = and_(ENTRY.event_id == bindparam("event"), ENTRY.merchant_id == bindparam("merchant"))
IS_OF_ACCOUNT = and_(
    ENTRY.buyer_id == bindparam("buyer"),
    ENTRY.store_id == bindparam("store"),
    ENTRY.merchant_id == bindparam("merchant"),
    ENTRY.outcome != literal(Outcome.REFUSED.value),
)
STATE = ("opening", "balance", "drift", "silently_expired", "lifetime_points", "newest_at_ms", "lots")
DERIVED = ("ordinal", "balance_before", "balance_after", "drift", "silently_expired", "draws")

LONG_HISTORY = 200
"""From how many entries on a fold takes longer than handing it to a thread."""

# Statements are built once: building one takes as long as running it.
READ_ACCOUNT = Statement(select(points_accounts).where(IS_ACCOUNT))
LOCK_ACCOUNT = Statement(select(points_accounts).where(IS_ACCOUNT).with_for_update())
# The row is made from the merchant's store, so that an unknown store makes none.
OPEN_ACCOUNT = Statement(
    insert(points_accounts)
    .from_select(
        ["merchant_id", "store_id", "buyer_id"],
        select(stores.c.merchant_id, stores.c.store_id, bindparam("buyer", type_=Text)).where(
            stores.c.store_id == bindparam("store"), stores.c.merchant_id == bindparam("merchant")
        ),
    )
    .on_conflict_do_nothing(constraint="pk_points_accounts")
)
UPDATE_ACCOUNT = Statement(update(points_accounts).where(IS_ACCOUNT).values({name: bindparam(name) for name in STATE}))
FIND_ENTRY = Statement(select(points_entries).where(IS_ENTRY))
READ_HISTORY = Statement(select(points_entries).where(IS_OF_ACCOUNT).order_by(ENTRY.updated_at_ms, ENTRY.ordinal))
# Who inserts the row has claimed its event_id.
INSERT_ENTRY = Statement(
    insert(points_entries).on_conflict_do_nothing(constraint="pk_points_entries").returning(ENTRY.event_id)
)
MOVE_ENTRY = Statement(
    update(points_entries).where(IS_ENTRY).values({name: bindparam(f"new_{name}") for name in DERIVED})
)
# A store that is registered stays as it is.
REGISTER_STORE = Statement(insert(stores).on_conflict_do_nothing())


@dataclass(frozen=True, slots=True)
class BookEntry:
    """An entry with how it was received."""

    entry: Entry
    webhook: Webhook
    received_at_ms: int
    outcome: Outcome


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

    async def apply(self, merchant_id: str, event: Event, webhook: Webhook, received_at_ms: int) -> Verdict:
        """Write one event into the book in one transaction, and answer after it has committed.

        Raises STORE_NOT_FOUND, EVENT_ID_REUSED, and INSUFFICIENT_POINTS for a refused event without a balance.
        """

        async def work(connection: Connection) -> Verdict:
            account = await self._lock_account(connection, merchant_id, event.account, received_at_ms)
            known = await self._find_entry(connection, merchant_id, event.event_id)
            if known is not None:
                return _repeated(account, known, event)
            late = account.newest_at_ms is not None and event.updated_at_ms <= account.newest_at_ms
            history = await self._history(connection, merchant_id, event.account) if late else ()
            if len(history) < LONG_HISTORY:
                verdict = judge(account, history, event)
            else:
                # A long fold must not make all other callers wait.
                verdict = await asyncio.to_thread(judge, account, history, event)
            if not verdict.account.is_storable:
                raise _sums_too_large()
            if verdict.outcome is not Outcome.DUPLICATE:
                received = BookEntry(verdict.entry, webhook, received_at_ms, verdict.outcome)
                await self._insert_entry(connection, merchant_id, received)
            if verdict.outcome in {Outcome.APPLIED, Outcome.LATE}:
                await self._move_entries(connection, merchant_id, verdict.moved)
                await self._update_account(connection, merchant_id, event.account, verdict.account)
            return verdict

        verdict = await self._database.transaction(work)
        if verdict.outcome is Outcome.REFUSED:
            raise PointbookError(
                Reason.INSUFFICIENT_POINTS,
                "The update would take the account below zero. The answer stays the same for this event_id.",
                metadata={"event_id": event.event_id, "updated_value": str(event.value)},
            )
        return verdict

    async def account(self, merchant_id: str, key: AccountKey) -> Account:
        """Read one account; one that no event has named is empty."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(READ_ACCOUNT, _named(merchant_id, key))
        return Account() if row is None else _to_account(row)

    async def entries(
        self, merchant_id: str, key: AccountKey, wanted: EntryFilter, *, before: tuple[int, int] | None, limit: int
    ) -> list[BookEntry]:
        """Read a page of an account's entries, the newest first, before a place (time in ms, ordinal)."""
        query = select(points_entries).where(IS_OF_ACCOUNT)
        if wanted.update_type is not None:
            query = query.where(ENTRY.update_type == wanted.update_type.value)
        if wanted.scenes:
            query = query.where(ENTRY.scene == any_(bindparam("scenes", list(wanted.scenes), type_=ARRAY(Text))))
        if wanted.start_ms is not None:
            query = query.where(ENTRY.updated_at_ms >= wanted.start_ms)
        if wanted.end_ms is not None:
            query = query.where(ENTRY.updated_at_ms < wanted.end_ms)
        if before is not None:
            query = query.where(tuple_(ENTRY.updated_at_ms, ENTRY.ordinal) < tuple_(*map(literal, before)))
        query = query.order_by(ENTRY.updated_at_ms.desc(), ENTRY.ordinal.desc()).limit(limit)
        async with self._database.autocommit() as connection:
            return [_to_book_entry(row) for row in await connection.fetch(Statement(query), _named(merchant_id, key))]

    async def _lock_account(self, connection: Connection, merchant_id: str, key: AccountKey, now_ms: int) -> Account:
        """Lock the account's row and read it as it is under the lock; make the row where there is none."""
        named = _named(merchant_id, key)
        row = await connection.fetch_one(LOCK_ACCOUNT, named)
        if row is None:
            if self._register_stores:
                await connection.execute(REGISTER_STORE, _new_store(merchant_id, key.store_id, now_ms))
            await connection.execute(OPEN_ACCOUNT, named)
            row = await connection.fetch_one(LOCK_ACCOUNT, named)
        if row is None:
            raise store_not_found(key.store_id)
        return _to_account(row)

    async def _find_entry(self, connection: Connection, merchant_id: str, event_id: str) -> BookEntry | None:
        """Read what is known under an event_id, a remembered refusal included."""
        row = await connection.fetch_one(FIND_ENTRY, {"merchant": merchant_id, "event": event_id})
        return None if row is None else _to_book_entry(row)

    async def _history(self, connection: Connection, merchant_id: str, key: AccountKey) -> Sequence[Entry]:
        """Read all entries of a locked account, in the order of the book."""
        rows = await connection.fetch(READ_HISTORY, _named(merchant_id, key))
        return [_to_book_entry(row).entry for row in rows]

    async def _insert_entry(self, connection: Connection, merchant_id: str, received: BookEntry) -> None:
        """Insert an entry, and so claim its event_id; one claimed meanwhile runs the transaction again."""
        if await connection.fetch_one(INSERT_ENTRY, _to_row(merchant_id, received)) is None:
            raise RetryTransactionError

    async def _move_entries(self, connection: Connection, merchant_id: str, moved: Sequence[Entry]) -> None:
        """Rewrite what the fold derives for entries that a late event moved."""
        if moved:
            for entry in moved:
                derived = {f"new_{name}": value for name, value in _derived(entry).items()}
                named = {"merchant": merchant_id, "event": entry.event.event_id}
                await connection.execute(MOVE_ENTRY, named | derived)

    async def _update_account(
        self, connection: Connection, merchant_id: str, key: AccountKey, account: Account
    ) -> None:
        """Write the state of a locked account."""
        lots = [[lot.remaining, lot.original, lot.expires_at_ms, lot.event_id] for lot in account.lots]
        state = {name: getattr(account, name) for name in STATE} | {"lots": lots}
        await connection.execute(UPDATE_ACCOUNT, _named(merchant_id, key) | state)


def _repeated(account: Account, known: BookEntry, event: Event) -> Verdict:
    """Answer an event whose event_id is known: the same verdict for the same content, an error for other content."""
    if known.entry.event.content != event.content:
        raise PointbookError(
            Reason.EVENT_ID_REUSED,
            "This event_id is in the book with other content; give every event an id of its own.",
            metadata={"event_id": event.event_id},
        )
    outcome = Outcome.REFUSED if known.outcome is Outcome.REFUSED else Outcome.DUPLICATE
    return Verdict(outcome, account, known.entry)


def _sums_too_large() -> PointbookError:
    violation = FieldViolation("update.updated_value", "must leave the account's sums below 2^63")
    return PointbookError(
        Reason.INVALID_FIELDS,
        "The account's sums would pass 64 bits.",
        violations=[violation],
    )


def _named(merchant_id: str, key: AccountKey) -> dict[str, object]:
    return {"merchant": merchant_id, "store": key.store_id, "buyer": key.buyer_id}


def _new_store(merchant_id: str, store_id: str, now_ms: int) -> dict[str, object]:
    return {
        "store_id": store_id,
        "merchant_id": merchant_id,
        "shop_domain": "",
        "display_name": "",
        "revision": 1,
        "updated_at_ms": now_ms,
    }


def _to_row(merchant_id: str, received: BookEntry) -> dict[str, object]:
    event, webhook = received.entry.event, received.webhook
    return {
        "event_id": event.event_id,
        "merchant_id": merchant_id,
        "store_id": event.account.store_id,
        "buyer_id": event.account.buyer_id,
        "update_type": event.update_type.value,
        "scene": event.scene,
        "updated_value": event.value,
        "points_balance": event.balance,
        "expires_at_ms": event.expires_at_ms,
        "updated_at_ms": event.updated_at_ms,
        "webhook_id": webhook.webhook_id,
        "shop_domain": webhook.shop_domain,
        "api_version": webhook.api_version,
        "received_at_ms": received.received_at_ms,
        "outcome": received.outcome.value,
    } | _derived(received.entry)


def _derived(entry: Entry) -> dict[str, object]:
    return {
        "ordinal": entry.ordinal,
        "balance_before": entry.balance_before,
        "balance_after": entry.balance_after,
        "drift": entry.drift,
        "silently_expired": entry.silently_expired,
        "draws": [[draw.points, draw.expires_at_ms, draw.event_id] for draw in entry.draws],
    }


def _to_account(row: Row) -> Account:
    return Account(
        opening=row.opening,
        balance=row.balance,
        drift=row.drift,
        silently_expired=row.silently_expired,
        lifetime_points=row.lifetime_points,
        newest_at_ms=row.newest_at_ms,
        lots=tuple(Lot(*lot) for lot in row.lots),
    )


def _to_book_entry(row: Row) -> BookEntry:
    event = Event(
        event_id=row.event_id,
        account=AccountKey(row.store_id, row.buyer_id),
        update_type=UpdateType(row.update_type),
        scene=row.scene,
        value=row.updated_value,
        balance=row.points_balance,
        expires_at_ms=row.expires_at_ms,
        updated_at_ms=row.updated_at_ms,
    )
    entry = Entry(
        event=event,
        ordinal=row.ordinal,
        balance_before=row.balance_before,
        balance_after=row.balance_after,
        drift=row.drift,
        silently_expired=row.silently_expired,
        draws=tuple(Draw(*draw) for draw in row.draws),
    )
    webhook = Webhook(row.webhook_id, row.shop_domain, row.api_version)
    return BookEntry(entry, webhook, row.received_at_ms, Outcome(row.outcome))
