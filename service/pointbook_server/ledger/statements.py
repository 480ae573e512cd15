"""The SQL of the ledger, and how its rows are read and written.

Whatever serves a batch works on arrays, so that one statement serves one event as it serves a thousand. Accounts are
always locked, and event_ids claimed, in sorted order.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from pointbook_server.database import Row, Statement
from pointbook_server.ledger.lots import Draw, FarLots, Lot
from pointbook_server.ledger.model import Account, AccountKey, Entry, Event, Outcome, UpdateType, Webhook

KEY = {"store_id": "text", "buyer_id": "text"}
STATE = {
    "opening": "bigint",
    "balance": "bigint",
    "drift": "bigint",
    "silently_expired": "bigint",
    "lifetime_points": "bigint",
    "newest_at_ms": "bigint",
    "lots": "jsonb",
    "far_lots": "jsonb",
    "drawn_to_ms": "bigint",
}
EVENT = {
    "event_id": "text",
    **KEY,
    "update_type": "text",
    "scene": "text",
    "updated_value": "bigint",
    "points_balance": "bigint",
    "expires_at_ms": "bigint",
    "updated_at_ms": "bigint",
}
RECEIVED = {
    "webhook_id": "text",
    "shop_domain": "text",
    "api_version": "text",
    "received_at_ms": "bigint",
    "outcome": "text",
}
DERIVED = {
    "ordinal": "integer",
    "balance_before": "bigint",
    "balance_after": "bigint",
    "drift": "bigint",
    "silently_expired": "bigint",
    "draws": "jsonb",
    "voided_at_ms": "bigint",
    "void_reason": "text",
}
ACCOUNT_COLUMNS = {**KEY, **STATE, "uncheckpointed": "integer"}
ENTRY_COLUMNS = {**EVENT, **RECEIVED, **DERIVED}
CHECKPOINT_COLUMNS = {**KEY, **STATE}


def _names(columns: Iterable[str], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}" for name in columns)


def _rows(columns: dict[str, str]) -> str:
    """Write parameters that are arrays, one a column, as rows."""
    arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in columns.items())
    return f"unnest({arrays}) AS v ({_names(columns)})"


def _statement(sql: str) -> Statement:
    return Statement(text(sql))


READ_ACCOUNT = _statement(f"""
    SELECT {_names(ACCOUNT_COLUMNS)} FROM points_accounts
    WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
""")
# The rows are locked in the order in which they are sorted, and read as they are under the lock.
LOCK_ACCOUNTS = _statement(f"""
    SELECT {_names(ACCOUNT_COLUMNS, "a.")} FROM {_rows(KEY)}
    JOIN points_accounts AS a ON a.buyer_id = v.buyer_id AND a.store_id = v.store_id
    WHERE a.merchant_id = :merchant_id
    ORDER BY a.store_id, a.buyer_id FOR UPDATE OF a
""")
READ_STORES = _statement("SELECT store_id, merchant_id FROM stores WHERE store_id = ANY(CAST(:store_ids AS text[]))")
# A store that is registered stays as it is.
REGISTER_STORES = _statement("""
    INSERT INTO stores (store_id, merchant_id, shop_domain, display_name, revision, updated_at_ms)
    SELECT store_id, :merchant_id, '', '', 1, CAST(:now_ms AS bigint)
    FROM unnest(CAST(:store_ids AS text[])) AS v (store_id) ORDER BY store_id ON CONFLICT DO NOTHING
""")
# What is known under some event_ids, remembered refusals included.
FIND_ENTRIES = _statement(f"""
    SELECT {_names(ENTRY_COLUMNS)} FROM points_entries
    WHERE event_id = ANY(CAST(:event_ids AS text[])) AND merchant_id = :merchant_id
""")
# The newest state that was kept before a moment, for each of some accounts.
FIND_CHECKPOINTS = _statement(f"""
    SELECT c.* FROM {_rows({**KEY, "before_ms": "bigint"})}
    CROSS JOIN LATERAL (
        SELECT {_names(CHECKPOINT_COLUMNS)} FROM points_checkpoints
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            AND newest_at_ms < v.before_ms
        ORDER BY newest_at_ms DESC LIMIT 1
    ) AS c
""")
# The entries behind a moment, for each of some accounts, in the order of the book.
READ_HISTORIES = _statement(f"""
    SELECT {_names(ENTRY_COLUMNS, "e.")} FROM {_rows({**KEY, "after_ms": "bigint"})}
    JOIN points_entries AS e
        ON e.buyer_id = v.buyer_id AND e.store_id = v.store_id AND e.updated_at_ms > v.after_ms
    WHERE e.merchant_id = :merchant_id AND e.outcome <> 'REFUSED'
    ORDER BY e.updated_at_ms, e.ordinal
""")
# The lots that are not kept with a state, read from the entries that made them: what came unexplained, what stood
# before the first entry, and what increases brought, from the first of them on.
READ_FAR_LOTS = _statement("""
    WITH entries AS NOT MATERIALIZED (
        SELECT * FROM points_entries
        WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
            AND updated_at_ms <= :newest_at_ms AND outcome <> 'REFUSED' AND voided_at_ms IS NULL
    ), opening AS (
        SELECT updated_at_ms, ordinal FROM entries ORDER BY updated_at_ms, ordinal LIMIT 1
    ), made AS (
        SELECT event_id, updated_at_ms, ordinal, 0 AS part, CAST(NULL AS bigint) AS expires_at_ms,
            balance_before AS points
        FROM entries WHERE (updated_at_ms, ordinal) = (SELECT updated_at_ms, ordinal FROM opening)
        UNION ALL
        SELECT event_id, updated_at_ms, ordinal, 1, NULL, drift FROM entries
        UNION ALL
        SELECT event_id, updated_at_ms, ordinal, 2, expires_at_ms, updated_value
        FROM entries WHERE update_type = 'INCREASE'
    ), first AS (
        SELECT updated_at_ms, ordinal FROM points_entries
        WHERE event_id = :first_event_id AND merchant_id = :merchant_id
    )
    SELECT made.points, made.points AS original, made.expires_at_ms, made.event_id FROM made, first
    WHERE made.points > 0
        AND (coalesce(made.expires_at_ms, 9223372036854775807), made.updated_at_ms, made.ordinal)
            >= (CAST(:first_expires_at_ms AS bigint), first.updated_at_ms, first.ordinal)
    ORDER BY coalesce(made.expires_at_ms, 9223372036854775807), made.updated_at_ms, made.ordinal, made.part
    LIMIT :count
""")
# Who inserts a row has claimed its event_id.
INSERT_ENTRIES = _statement(f"""
    INSERT INTO points_entries (merchant_id, {_names(ENTRY_COLUMNS)})
    SELECT :merchant_id, {_names(ENTRY_COLUMNS)} FROM {_rows(ENTRY_COLUMNS)}
    ORDER BY event_id ON CONFLICT (event_id, merchant_id) DO NOTHING
""")
MOVE_ENTRIES = _statement(f"""
    UPDATE points_entries AS e SET {", ".join(f"{name} = v.{name}" for name in DERIVED)}
    FROM {_rows({"event_id": "text", **DERIVED})}
    WHERE e.event_id = v.event_id AND e.merchant_id = :merchant_id
""")
INSERT_ACCOUNTS = _statement(f"""
    INSERT INTO points_accounts (merchant_id, {_names(ACCOUNT_COLUMNS)})
    SELECT :merchant_id, {_names(ACCOUNT_COLUMNS)} FROM {_rows(ACCOUNT_COLUMNS)}
    ORDER BY store_id, buyer_id ON CONFLICT (buyer_id, store_id, merchant_id) DO NOTHING
""")
UPDATE_ACCOUNTS = _statement(f"""
    UPDATE points_accounts AS a
    SET {", ".join(f"{name} = v.{name}" for name in ACCOUNT_COLUMNS if name not in KEY)}
    FROM {_rows(ACCOUNT_COLUMNS)}
    WHERE a.buyer_id = v.buyer_id AND a.store_id = v.store_id AND a.merchant_id = :merchant_id
""")
DROP_CHECKPOINTS = _statement(f"""
    DELETE FROM points_checkpoints AS c USING {_rows({**KEY, "after_ms": "bigint"})}
    WHERE c.buyer_id = v.buyer_id AND c.store_id = v.store_id AND c.newest_at_ms > v.after_ms
        AND c.merchant_id = :merchant_id
""")
INSERT_CHECKPOINTS = _statement(f"""
    INSERT INTO points_checkpoints (merchant_id, {_names(CHECKPOINT_COLUMNS)})
    SELECT :merchant_id, {_names(CHECKPOINT_COLUMNS)} FROM {_rows(CHECKPOINT_COLUMNS)}
""")
LIST_DRIFTING = _statement(f"""
    SELECT {_names(ACCOUNT_COLUMNS)} FROM points_accounts
    WHERE merchant_id = :merchant_id AND drift <> 0 AND (store_id, buyer_id) > (:after_store_id, :after_buyer_id)
        AND (CAST(:store_id AS text) = '' OR store_id = :store_id)
    ORDER BY store_id, buyer_id LIMIT :limit
""")
TELL_VOIDINGS = _statement("""
    INSERT INTO points_voidings (voiding_id, merchant_id, event_id, action, reason, at_ms)
    SELECT :voiding_id, :merchant_id, event_id, :action, :reason, CAST(:at_ms AS bigint)
    FROM unnest(CAST(:event_ids AS text[])) AS v (event_id) ORDER BY event_id
""")


@dataclass(frozen=True, slots=True)
class Void:
    """Since when an entry counts for nothing, and why."""

    at_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class BookEntry:
    """An entry with how it was received, and why it is void if it is."""

    entry: Entry
    webhook: Webhook
    received_at_ms: int
    outcome: Outcome
    void: Void | None = None


def to_columns(columns: dict[str, str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Turn rows into one array a column."""
    return dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))


def keys_to_columns(keys: Iterable[AccountKey]) -> dict[str, Any]:
    """Turn accounts into one array of stores and one of buyers."""
    pairs = [(key.store_id, key.buyer_id) for key in keys]
    return to_columns(KEY, pairs)


def write_account(key: AccountKey, account: Account) -> tuple[Any, ...]:
    """Write an account as ACCOUNT_COLUMNS."""
    return (*write_checkpoint(key, account), account.uncheckpointed)


def write_checkpoint(key: AccountKey, account: Account) -> tuple[Any, ...]:
    """Write a state as CHECKPOINT_COLUMNS."""
    return (
        key.store_id,
        key.buyer_id,
        account.opening,
        account.balance,
        account.drift,
        account.silently_expired,
        account.lifetime_points,
        account.newest_at_ms,
        json.dumps(account.lots),
        None if account.far_lots is None else json.dumps(account.far_lots),
        account.drawn_to_ms,
    )


def read_account(row: Row) -> tuple[AccountKey, Account]:
    """Read ACCOUNT_COLUMNS, or CHECKPOINT_COLUMNS, in their order."""
    store_id, buyer_id, opening, balance, drift, silent, lifetime, newest, lots, far_lots, drawn_to, *more = row
    return AccountKey(store_id, buyer_id), Account(
        opening=opening,
        balance=balance,
        drift=drift,
        silently_expired=silent,
        lifetime_points=lifetime,
        newest_at_ms=newest,
        lots=tuple(map(Lot._make, json.loads(lots))),
        far_lots=None if far_lots is None else FarLots._make(json.loads(far_lots)),
        drawn_to_ms=drawn_to,
        uncheckpointed=more[0] if more else 0,
    )


def write_entry(received: BookEntry) -> tuple[Any, ...]:
    """Write an entry as ENTRY_COLUMNS."""
    event, webhook = received.entry.event, received.webhook
    return (
        event.event_id,
        event.account.store_id,
        event.account.buyer_id,
        event.update_type,
        event.scene,
        event.value,
        event.balance,
        event.expires_at_ms,
        event.updated_at_ms,
        webhook.webhook_id,
        webhook.shop_domain,
        webhook.api_version,
        received.received_at_ms,
        received.outcome,
        *write_derived(received.entry, received.void),
    )


def write_derived(entry: Entry, void: Void | None) -> tuple[Any, ...]:
    """Write what the fold derives as DERIVED."""
    return (
        entry.ordinal,
        entry.balance_before,
        entry.balance_after,
        entry.drift,
        entry.silently_expired,
        json.dumps(entry.draws),
        None if void is None else void.at_ms,
        None if void is None else void.reason,
    )


def read_entry(row: Row) -> BookEntry:
    """Read ENTRY_COLUMNS in their order."""
    (
        event_id,
        store_id,
        buyer_id,
        update_type,
        scene,
        value,
        balance,
        expires_at_ms,
        updated_at_ms,
        webhook_id,
        shop_domain,
        api_version,
        received_at_ms,
        outcome,
        ordinal,
        balance_before,
        balance_after,
        drift,
        silently_expired,
        draws,
        voided_at_ms,
        void_reason,
    ) = row
    return BookEntry(
        entry=Entry(
            event=Event(
                event_id=event_id,
                account=AccountKey(store_id, buyer_id),
                update_type=UpdateType(update_type),
                scene=scene,
                value=value,
                balance=balance,
                expires_at_ms=expires_at_ms,
                updated_at_ms=updated_at_ms,
            ),
            ordinal=ordinal,
            balance_before=balance_before,
            balance_after=balance_after,
            drift=drift,
            silently_expired=silently_expired,
            draws=tuple(map(Draw._make, json.loads(draws))),
            is_void=voided_at_ms is not None,
        ),
        webhook=Webhook(webhook_id, shop_domain, api_version),
        received_at_ms=received_at_ms,
        outcome=Outcome(outcome),
        void=None if voided_at_ms is None else Void(voided_at_ms, void_reason),
    )
