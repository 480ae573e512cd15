"""The SQL of the ledger, and how its rows are read and written.

Whatever serves a batch works on arrays, so that one statement serves one event as it serves a thousand. Accounts are
always locked, and event_ids claimed, in sorted order.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import text

from pointbook_server.db.database import Row, Statement
from pointbook_server.ledger.holds import Hold
from pointbook_server.ledger.lots import Draw, Lot, OverflowLots
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, Entry, Event, UpdateType, WebhookOrigin

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
SETTLED = {"settled_redemption_id": "text"}
ACCOUNT_COLUMNS = {**KEY, **STATE, "uncheckpointed": "integer", "holds": "jsonb", "revision": "bigint"}
ENTRY_COLUMNS = {**EVENT, **RECEIVED, **DERIVED, **SETTLED}
CHECKPOINT_COLUMNS = {**KEY, **STATE}


def _names(columns: Iterable[str], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}" for name in columns)


def _rows(columns: dict[str, str], prefix: str = "") -> str:
    """Write parameters that are arrays, one a column, as rows."""
    arrays = ", ".join(f"CAST(:{prefix}{name} AS {kind}[])" for name, kind in columns.items())
    return f"unnest({arrays}) AS v ({_names(columns)})"


def _statement(sql: str) -> Statement:
    return Statement(text(sql))


READ_ACCOUNT = _statement(f"""
    SELECT {_names(ACCOUNT_COLUMNS)} FROM points_accounts
    WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
""")
# Each account is looked up by itself, whatever a plan expects: OFFSET and FOR UPDATE keep the look-up from being merged
# into a join.
READ_ACCOUNTS = _statement(f"""
    SELECT a.* FROM {_rows(KEY)} CROSS JOIN LATERAL (
        SELECT {_names(ACCOUNT_COLUMNS)} FROM points_accounts
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id OFFSET 0
    ) AS a
""")


def _lock_accounts(*, skip_locked: bool) -> Statement:
    """Lock rows in the order in which the parameters are sorted, and read them as they are under the lock."""
    return _statement(f"""
        SELECT a.* FROM {_rows(KEY)} CROSS JOIN LATERAL (
            SELECT {_names(ACCOUNT_COLUMNS)} FROM points_accounts
            WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            FOR UPDATE {"SKIP LOCKED" if skip_locked else ""}
        ) AS a
    """)


LOCK_ACCOUNTS = _lock_accounts(skip_locked=False)
LOCK_FREE_ACCOUNTS = _lock_accounts(skip_locked=True)
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
LIFT_REFUSALS = _statement("""
    DELETE FROM points_entries
    WHERE event_id = ANY(CAST(:event_ids AS text[])) AND merchant_id = :merchant_id AND outcome = 'REFUSED'
""")
READ_EVENT_TIMES = _statement("""
    SELECT event_id, updated_at_ms FROM points_entries
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


def _next_candidate(after: str) -> str:
    """Find the first expiry and buyer of a store behind a place: one step down the index."""
    return f"""
        SELECT expires_at_ms, buyer_id FROM points_entries
        WHERE store_id = v.store_id AND merchant_id = :merchant_id AND expires_at_ms < :end_ms
            AND (expires_at_ms, buyer_id) > ({after})
        ORDER BY expires_at_ms, buyer_id LIMIT 1
    """


# When lots of accounts expire, for each of some stores the first so many behind a place, whatever is left of the lots.
# An account that has many lots of one expiry is found once: the index is descended from each to the next.
FIND_EXPIRIES = _statement(f"""
    SELECT v.store_id, found.expires_at_ms, found.buyer_id
    FROM {_rows({"store_id": "text", "after_ms": "bigint", "after_buyer_id": "text"})} CROSS JOIN LATERAL (
        WITH RECURSIVE found AS (
            SELECT first.*, 1 AS place FROM ({_next_candidate("v.after_ms, v.after_buyer_id")}) AS first
            UNION ALL
            SELECT next.*, found.place + 1 FROM found
            CROSS JOIN LATERAL ({_next_candidate("found.expires_at_ms, found.buyer_id")}) AS next
            WHERE found.place < :count
        )
        SELECT * FROM found
    ) AS found
    ORDER BY v.store_id, found.place
""")
FAR_POINTS = {**KEY, "expires_at_ms": "bigint", "first_expires_at_ms": "bigint", "first_event_id": "text"}
# What the lots beyond those that are kept with accounts hold of some expiries: no draw has touched them. Comparing rows
# is what leaves no other index than that of expiries, since an account may have any number of entries.
SUM_FAR_POINTS = _statement(f"""
    SELECT v.store_id, v.buyer_id, v.expires_at_ms, CAST(far.points AS bigint) AS points
    FROM {_rows(FAR_POINTS)}
    CROSS JOIN LATERAL (
        SELECT updated_at_ms, ordinal FROM points_entries
        WHERE event_id = v.first_event_id AND merchant_id = :merchant_id OFFSET 0
    ) AS first
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(updated_value), 0) AS points FROM points_entries
        WHERE store_id = v.store_id AND merchant_id = :merchant_id AND expires_at_ms = v.expires_at_ms
            AND (expires_at_ms, buyer_id) >= (v.expires_at_ms, v.buyer_id)
            AND (expires_at_ms, buyer_id) <= (v.expires_at_ms, v.buyer_id)
            AND outcome <> 'REFUSED' AND voided_at_ms IS NULL
            AND (expires_at_ms, updated_at_ms, ordinal)
                >= (v.first_expires_at_ms, first.updated_at_ms, first.ordinal)
    ) AS far
""")


def _write_batch(*, keeps: bool) -> Statement:
    """Write a batch whole or not at all: entries, accounts that have the revision that was read, and checkpoints.

    First the accounts are locked in sorted order. Where one has changed, nothing is written, and nothing is answered.
    Who inserts an entry has claimed its event_id; where one was taken, or an account opened, with its checkpoints,
    meanwhile, the statement divides by zero, so that it is rolled back even where it is a transaction of its own.
    """
    unchanged = "(SELECT count(*) FROM locked) = :known_count"
    assignments = ", ".join(f"{name} = excluded.{name}" for name in ACCOUNT_COLUMNS if name not in KEY)
    parts = {
        "locked": f"""
            SELECT FROM {_rows(KEY | {"revision": "bigint"}, "account_")} CROSS JOIN LATERAL (
                SELECT revision FROM points_accounts
                WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id FOR UPDATE
            ) AS a
            WHERE a.revision = v.revision - 1
        """,
        "written": f"""
            INSERT INTO points_accounts AS a (merchant_id, {_names(ACCOUNT_COLUMNS)})
            SELECT :merchant_id, {_names(ACCOUNT_COLUMNS)} FROM {_rows(ACCOUNT_COLUMNS, "account_")} WHERE {unchanged}
            ON CONFLICT (buyer_id, store_id, merchant_id) DO UPDATE SET {assignments}
            WHERE a.revision = excluded.revision - 1
            RETURNING 1
        """,
        "claimed": f"""
            INSERT INTO points_entries (merchant_id, {_names(ENTRY_COLUMNS)})
            SELECT :merchant_id, {_names(ENTRY_COLUMNS)} FROM {_rows(ENTRY_COLUMNS, "entry_")} WHERE {unchanged}
            ORDER BY event_id ON CONFLICT (event_id, merchant_id) DO NOTHING
            RETURNING 1
        """,
    }
    if keeps:
        parts["kept"] = f"""
            INSERT INTO points_checkpoints (merchant_id, {_names(CHECKPOINT_COLUMNS)})
            SELECT :merchant_id, {_names(CHECKPOINT_COLUMNS)} FROM {_rows(CHECKPOINT_COLUMNS, "kept_")}
            WHERE {unchanged}
            ON CONFLICT (buyer_id, store_id, merchant_id, newest_at_ms) DO NOTHING
            RETURNING 1
        """
    counts = " + ".join(f"(SELECT count(*) FROM {name})" for name in parts if name != "locked")
    return _statement(f"""
        WITH {", ".join(f"{name} AS ({part})" for name, part in parts.items())}
        SELECT 1 / CAST({counts} = :row_count AS integer) AS written WHERE {unchanged}
    """)


WRITE_BATCH = _write_batch(keeps=False)
# Most batches keep no checkpoints, and would only be slowed down by the chance that they might.
WRITE_BATCH_AND_CHECKPOINTS = _write_batch(keeps=True)
# The accounts are there: an upsert finds each by its key, whatever a plan expects.
PUT_HOLDS = _statement(f"""
    INSERT INTO points_accounts AS a (merchant_id, {_names(KEY)}, holds)
    SELECT :merchant_id, {_names(KEY)}, holds FROM {_rows(KEY | {"holds": "jsonb"})}
    ON CONFLICT (buyer_id, store_id, merchant_id) DO UPDATE SET holds = excluded.holds, revision = a.revision + 1
""")
MOVE_ENTRIES = _statement(f"""
    UPDATE points_entries AS e SET {", ".join(f"{name} = v.{name}" for name in DERIVED)}
    FROM {_rows({"event_id": "text", **DERIVED})}
    WHERE e.event_id = v.event_id AND e.merchant_id = :merchant_id
""")
# Nothing is written where the entry has settled another redemption than the caller knows of.
SETTLE_ENTRY = _statement("""
    UPDATE points_entries SET settled_redemption_id = :redemption_id
    WHERE event_id = :event_id AND merchant_id = :merchant_id AND voided_at_ms IS NULL
        AND coalesce(settled_redemption_id, '') = :settled_redemption_id
""")
DROP_CHECKPOINTS = _statement(f"""
    DELETE FROM points_checkpoints AS c USING {_rows({**KEY, "after_ms": "bigint"})}
    WHERE c.buyer_id = v.buyer_id AND c.store_id = v.store_id AND c.newest_at_ms > v.after_ms
        AND c.merchant_id = :merchant_id
""")
# The newest entries of some accounts before one of them. Its place inside its millisecond is looked up, as it changes
# when another event of that time arrives late. Accounts are kept apart, so that this moves no entry of another one.
LIST_NEWEST = _statement(f"""
    SELECT {_names(ENTRY_COLUMNS, "e.")} FROM {_rows(KEY)}
    LEFT JOIN points_entries AS b ON b.event_id = CAST(:before_id AS text) AND b.merchant_id = :merchant_id
    CROSS JOIN LATERAL (
        SELECT {_names(ENTRY_COLUMNS)} FROM points_entries
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id AND outcome <> 'REFUSED'
            AND updated_at_ms >= CAST(:start_ms AS bigint)
            AND (updated_at_ms, ordinal, event_id) < (CAST(:before_ms AS bigint), CASE
                WHEN (v.store_id, v.buyer_id) < (b.store_id, b.buyer_id) THEN 9223372036854775807
                WHEN (v.store_id, v.buyer_id) = (b.store_id, b.buyer_id) THEN b.ordinal
                ELSE -1
            END, CAST(:before_id AS text))
        ORDER BY updated_at_ms DESC, ordinal DESC, event_id DESC LIMIT :limit
    ) AS e
    ORDER BY e.updated_at_ms DESC, e.store_id DESC, e.buyer_id DESC, e.ordinal DESC, e.event_id DESC LIMIT :limit
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

# The whole book, or some of it, for an audit. All streams have one order, which is that of the indexes.
WANTED = """
    (CAST(:merchant_id AS text) = '' OR merchant_id = :merchant_id)
    AND (CAST(:store_id AS text) = '' OR store_id = :store_id)
    AND (CAST(:buyer_id AS text) = '' OR buyer_id = :buyer_id)
"""
BOOK_ORDER = "buyer_id, store_id, merchant_id"
COUNT_BOOK = _statement(f"""
    SELECT
        (SELECT count(*) FROM points_accounts WHERE {WANTED}) AS accounts,
        (SELECT count(*) FROM points_entries WHERE {WANTED} AND outcome <> 'REFUSED') AS entries
""")
STREAM_KEYS = _statement(f"""
    SELECT merchant_id, {_names(KEY)} FROM points_accounts WHERE {WANTED}
    UNION SELECT merchant_id, {_names(KEY)} FROM points_entries WHERE {WANTED} AND outcome <> 'REFUSED'
    UNION SELECT merchant_id, {_names(KEY)} FROM points_checkpoints WHERE {WANTED}
    ORDER BY {BOOK_ORDER}
""")
STREAM_ACCOUNTS = _statement(f"""
    SELECT merchant_id, {_names(ACCOUNT_COLUMNS)} FROM points_accounts WHERE {WANTED} ORDER BY {BOOK_ORDER}
""")
STREAM_ENTRIES = _statement(f"""
    SELECT merchant_id, {_names(ENTRY_COLUMNS)} FROM points_entries WHERE {WANTED} AND outcome <> 'REFUSED'
    ORDER BY {BOOK_ORDER}, updated_at_ms, ordinal, event_id
""")
STREAM_CHECKPOINTS = _statement(f"""
    SELECT merchant_id, {_names(CHECKPOINT_COLUMNS)} FROM points_checkpoints WHERE {WANTED}
    ORDER BY {BOOK_ORDER}, newest_at_ms
""")


class Void(NamedTuple):
    """Since when an entry counts for nothing, and why."""

    at_ms: int
    reason: str


class StoredEntry(NamedTuple):
    """An entry with how it was received, and why it is void if it is."""

    entry: Entry
    webhook: WebhookOrigin
    received_at_ms: int
    outcome: ApplyOutcome
    void: Void | None = None
    settled_redemption_id: str | None = None


def to_columns(columns: dict[str, str], rows: Sequence[Sequence[Any]], prefix: str = "") -> dict[str, Any]:
    """Turn rows into one array a column."""
    arrays = map(list, zip(*rows, strict=True)) if rows else ([] for _ in columns)
    return dict(zip((f"{prefix}{name}" for name in columns), arrays, strict=True))


def keys_to_columns(keys: Iterable[AccountKey]) -> dict[str, Any]:
    """Turn accounts into one array of stores and one of buyers."""
    pairs = [(key.store_id, key.buyer_id) for key in keys]
    return to_columns(KEY, pairs)


def write_account(key: AccountKey, account: Account, holds: Sequence[Hold], revision: int) -> tuple[Any, ...]:
    """Write an account as ACCOUNT_COLUMNS; a fold knows nothing of its holds."""
    return (*write_checkpoint(key, account), account.uncheckpointed, write_holds(holds), revision)


def write_holds(holds: Sequence[Hold]) -> str | None:
    """Write the holds of an account."""
    return json.dumps(holds) if holds else None


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
    uncheckpointed, holds = more[:2] if more else (0, None)
    return AccountKey(store_id, buyer_id), Account(
        opening=opening,
        balance=balance,
        drift=drift,
        silently_expired=silent,
        lifetime_points=lifetime,
        newest_at_ms=newest,
        lots=tuple(map(Lot._make, json.loads(lots))),
        far_lots=None if far_lots is None else OverflowLots._make(json.loads(far_lots)),
        drawn_to_ms=drawn_to,
        uncheckpointed=uncheckpointed,
        holds=() if holds is None else tuple(map(_read_hold, json.loads(holds))),
    )


def _read_hold(row: list[Any]) -> Hold:
    redemption_id, points, opened_at_ms, settle_by_ms, scenes, is_released, *lead_ms = row
    return Hold(redemption_id, points, opened_at_ms, settle_by_ms, tuple(scenes), is_released, *lead_ms)


def write_entry(received: StoredEntry) -> tuple[Any, ...]:
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
        received.settled_redemption_id,
    )


def write_derived(entry: Entry, void: Void | None) -> tuple[Any, ...]:
    """Write what the fold derives as DERIVED."""
    return (
        entry.ordinal,
        entry.balance_before,
        entry.balance_after,
        entry.drift,
        entry.silently_expired,
        json.dumps(entry.draws) if entry.draws else "[]",
        None if void is None else void.at_ms,
        None if void is None else void.reason,
    )


def read_entry(row: Row) -> StoredEntry:
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
        settled_redemption_id,
    ) = row
    return StoredEntry(
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
        webhook=WebhookOrigin(webhook_id, shop_domain, api_version),
        received_at_ms=received_at_ms,
        outcome=ApplyOutcome(outcome),
        void=None if voided_at_ms is None else Void(voided_at_ms, void_reason),
        settled_redemption_id=settled_redemption_id,
    )
