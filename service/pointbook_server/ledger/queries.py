"""SQL of the ledger.

Statements that serve a batch take arrays, so that one statement handles one event or a thousand. Accounts are always
locked, and event_ids claimed, in sorted order.
"""

from collections.abc import Iterable

from sqlalchemy import BindParameter, Text, and_, any_, bindparam, literal, select, text, tuple_
from sqlalchemy.dialects.postgresql import ARRAY

from pointbook_server.db.database import Statement
from pointbook_server.db.row_types import RowTypes, rows_of
from pointbook_server.db.tables import points_entries
from pointbook_server.ledger.model import AccountKey, ApplyOutcome, EntryFilter

KEY_COLUMNS = {"store_id": "text", "buyer_id": "text"}
STATE_COLUMNS = {
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
EVENT_COLUMNS = {
    "event_id": "text",
    **KEY_COLUMNS,
    "update_type": "text",
    "scene": "text",
    "updated_value": "bigint",
    "points_balance": "bigint",
    "expires_at_ms": "bigint",
    "updated_at_ms": "bigint",
}
RECEIPT_COLUMNS = {
    "webhook_id": "text",
    "shop_domain": "text",
    "api_version": "text",
    "received_at_ms": "bigint",
    "outcome": "text",
}
FOLD_COLUMNS = {
    "ordinal": "integer",
    "balance_before": "bigint",
    "balance_after": "bigint",
    "drift": "bigint",
    "silently_expired": "bigint",
    "draws": "jsonb",
}
DERIVED_COLUMNS = {**FOLD_COLUMNS, "voided_at_ms": "bigint", "void_reason": "text"}
SETTLEMENT_COLUMNS = {"settled_redemption_id": "text"}
ACCOUNT_COLUMNS = {**KEY_COLUMNS, **STATE_COLUMNS, "uncheckpointed": "integer", "holds": "jsonb", "revision": "bigint"}
ENTRY_COLUMNS = {**EVENT_COLUMNS, **RECEIPT_COLUMNS, **DERIVED_COLUMNS, **SETTLEMENT_COLUMNS}
CHECKPOINT_COLUMNS = {**KEY_COLUMNS, **STATE_COLUMNS}
MERCHANT_COLUMN = {"merchant_id": "text"}
ROW_TYPES: RowTypes = {
    "points_account_row": {**MERCHANT_COLUMN, **ACCOUNT_COLUMNS},
    "points_entry_row": {**MERCHANT_COLUMN, **EVENT_COLUMNS, **RECEIPT_COLUMNS, **FOLD_COLUMNS, **SETTLEMENT_COLUMNS},
    "points_checkpoint_row": {**MERCHANT_COLUMN, **CHECKPOINT_COLUMNS},
}


def _column_list(columns: Iterable[str], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}" for name in columns)


def _unnest(columns: dict[str, str], prefix: str = "") -> str:
    """Return a FROM item `v` that converts array parameters to rows."""
    arrays = ", ".join(f"CAST(:{prefix}{name} AS {kind}[])" for name, kind in columns.items())
    return f"unnest({arrays}) AS v ({_column_list(columns)})"


def _statement(sql: str) -> Statement:
    return Statement(text(sql))


READ_ACCOUNT = _statement(f"""
    SELECT {_column_list(ACCOUNT_COLUMNS)} FROM points_accounts
    WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id
""")
# OFFSET (here) and FOR UPDATE (below) keep the planner from merging the look-up into a join: every plan looks up each
# account by its key.
READ_ACCOUNTS = _statement(f"""
    SELECT a.* FROM {_unnest(KEY_COLUMNS)} CROSS JOIN LATERAL (
        SELECT {_column_list(ACCOUNT_COLUMNS)} FROM points_accounts
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id OFFSET 0
    ) AS a
""")
READ_ACCOUNTS_OF_MERCHANTS = _statement(f"""
    SELECT a.*, v.merchant_id FROM {_unnest({**MERCHANT_COLUMN, **KEY_COLUMNS})} CROSS JOIN LATERAL (
        SELECT {_column_list(ACCOUNT_COLUMNS)} FROM points_accounts
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = v.merchant_id OFFSET 0
    ) AS a
""")


def _lock_accounts(*, skip_locked: bool) -> Statement:
    """Build a statement that locks accounts and reads them under the lock.

    The order of the parameters is the order of locking.
    """
    return _statement(f"""
        SELECT a.* FROM {_unnest(KEY_COLUMNS)} CROSS JOIN LATERAL (
            SELECT {_column_list(ACCOUNT_COLUMNS)} FROM points_accounts
            WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            FOR UPDATE {"SKIP LOCKED" if skip_locked else ""}
        ) AS a
    """)


LOCK_ACCOUNTS = _lock_accounts(skip_locked=False)
LOCK_AVAILABLE_ACCOUNTS = _lock_accounts(skip_locked=True)
READ_STORE_OWNERS = _statement(
    "SELECT store_id, merchant_id FROM stores WHERE store_id = ANY(CAST(:store_ids AS text[]))"
)
# Registered stores are left unchanged.
REGISTER_STORES = _statement("""
    INSERT INTO stores (store_id, merchant_id, shop_domain, display_name, revision, updated_at_ms)
    SELECT store_id, :merchant_id, '', '', 1, CAST(:now_ms AS bigint)
    FROM unnest(CAST(:store_ids AS text[])) AS v (store_id) ORDER BY store_id ON CONFLICT DO NOTHING
""")
# The rows with some event_ids, including stored refusals.
FIND_ENTRIES = _statement(f"""
    SELECT {_column_list(ENTRY_COLUMNS)} FROM points_entries
    WHERE event_id = ANY(CAST(:event_ids AS text[])) AND merchant_id = :merchant_id
""")
DELETE_REFUSALS = _statement("""
    DELETE FROM points_entries
    WHERE event_id = ANY(CAST(:event_ids AS text[])) AND merchant_id = :merchant_id AND outcome = 'REFUSED'
""")
READ_EVENT_TIMES = _statement("""
    SELECT event_id, updated_at_ms FROM points_entries
    WHERE event_id = ANY(CAST(:event_ids AS text[])) AND merchant_id = :merchant_id
""")
# The newest checkpoint before a time, for each of some accounts.
READ_NEWEST_CHECKPOINTS = _statement(f"""
    SELECT c.* FROM {_unnest({**KEY_COLUMNS, "before_ms": "bigint"})}
    CROSS JOIN LATERAL (
        SELECT {_column_list(CHECKPOINT_COLUMNS)} FROM points_checkpoints
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            AND newest_at_ms < v.before_ms
        ORDER BY newest_at_ms DESC LIMIT 1
    ) AS c
""")
# The entries after a time, for each of some accounts, in ledger order.
READ_HISTORIES = _statement(f"""
    SELECT e.* FROM {_unnest({**KEY_COLUMNS, "after_ms": "bigint"})} CROSS JOIN LATERAL (
        SELECT {_column_list(ENTRY_COLUMNS)} FROM points_entries
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            AND updated_at_ms > v.after_ms AND outcome <> 'REFUSED' OFFSET 0
    ) AS e
    ORDER BY e.updated_at_ms, e.ordinal
""")
# The overflow lots of a state, read from the entries that made them: the opening balance (part 0), positive drift
# (part 1) and increases (part 2), from the first overflow lot on.
READ_OVERFLOW_LOTS = _statement("""
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
    """Return SQL that finds a store's first (expiry, buyer) after a position.

    It takes one step in the index.
    """
    return f"""
        SELECT expires_at_ms, buyer_id FROM points_entries
        WHERE store_id = v.store_id AND merchant_id = :merchant_id AND expires_at_ms < :end_ms
            AND (expires_at_ms, buyer_id) > ({after})
        ORDER BY expires_at_ms, buyer_id LIMIT 1
    """


# The next expiries of accounts after a position, for each of some stores, whether or not their lots have points left.
# An account with many lots of one expiry is found once: each step descends the index again.
FIND_EXPIRY_CANDIDATES = _statement(f"""
    SELECT v.store_id, found.expires_at_ms, found.buyer_id
    FROM {_unnest({"store_id": "text", "after_ms": "bigint", "after_buyer_id": "text"})} CROSS JOIN LATERAL (
        WITH RECURSIVE found AS (
            SELECT first.*, 1 AS position FROM ({_next_candidate("v.after_ms, v.after_buyer_id")}) AS first
            UNION ALL
            SELECT next.*, found.position + 1 FROM found
            CROSS JOIN LATERAL ({_next_candidate("found.expires_at_ms, found.buyer_id")}) AS next
            WHERE found.position < :count
        )
        SELECT * FROM found
    ) AS found
    ORDER BY v.store_id, found.position
""")
OVERFLOW_COLUMNS = {**KEY_COLUMNS, "expires_at_ms": "bigint", "first_expires_at_ms": "bigint", "first_event_id": "text"}
# The points of overflow lots with some expiries; no draw has touched these lots. The row comparisons make the index of
# expiries the only usable one: an account may have any number of entries.
SUM_OVERFLOW_POINTS = _statement(f"""
    SELECT v.store_id, v.buyer_id, v.expires_at_ms, CAST(overflow.points AS bigint) AS points
    FROM {_unnest(OVERFLOW_COLUMNS)}
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
    ) AS overflow
""")


MERCHANTS_LOCK_TIMEOUT = "50ms"
"""How long the statement that writes several merchants may wait for a lock of one of them."""


def _write_batch(*, of_one_merchant: bool, with_checkpoints: bool) -> Statement:
    """Build a statement that writes a batch as a whole or not at all.

    It first locks the accounts in sorted order. If the revision of one has changed since it was read, it writes nothing
    and returns no row. Inserting an entry claims its event_id. If an event_id was claimed or an account opened (with
    its checkpoints) concurrently, the statement divides by zero, which rolls it back even in autocommit mode.

    For several merchants, it does not wait for an account that is locked, but writes nothing, and it fails soon if it
    has to wait for a store, an event_id or a new account: the transaction of one merchant must not delay the others.
    """
    merchant_id = ":merchant_id" if of_one_merchant else "v.merchant_id"
    lock = "FOR UPDATE" if of_one_merchant else "FOR UPDATE SKIP LOCKED"
    unchanged = "(SELECT count(*) FROM locked) = :existing_count"
    if not of_one_merchant:
        unchanged += f" AND (SELECT set_config('lock_timeout', '{MERCHANTS_LOCK_TIMEOUT}', true)) IS NOT NULL"
    assignments = ", ".join(f"{name} = excluded.{name}" for name in ACCOUNT_COLUMNS if name not in KEY_COLUMNS)
    parts = {
        "locked": f"""
            SELECT 1 FROM {rows_of("points_account_row")} CROSS JOIN LATERAL (
                SELECT revision FROM points_accounts
                WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = {merchant_id} {lock}
            ) AS a
            WHERE a.revision = v.revision - 1
        """,
        "accounts": f"""
            INSERT INTO points_accounts AS a ({_column_list(ROW_TYPES["points_account_row"])})
            SELECT {merchant_id}, {_column_list(ACCOUNT_COLUMNS)} FROM {rows_of("points_account_row")}
            WHERE {unchanged}
            ON CONFLICT (buyer_id, store_id, merchant_id) DO UPDATE SET {assignments}
            WHERE a.revision = excluded.revision - 1
            RETURNING 1
        """,
        "entries": _insert_rows("points_entry_row", "points_entries", merchant_id, unchanged, "event_id, merchant_id"),
    }
    if with_checkpoints:
        key = "buyer_id, store_id, merchant_id, newest_at_ms"
        parts["checkpoints"] = _insert_rows("points_checkpoint_row", "points_checkpoints", merchant_id, unchanged, key)
    counts = " + ".join(f"(SELECT count(*) FROM {name})" for name in parts if name != "locked")
    return _statement(f"""
        WITH {", ".join(f"{name} AS ({part})" for name, part in parts.items())}
        SELECT 1 / CAST({counts} = :row_count AS integer) AS written WHERE {unchanged}
    """)


def _insert_rows(row_type: str, table: str, merchant_id: str, condition: str, key: str) -> str:
    """Return an INSERT of new rows, in the order of their key."""
    merchant_column, *columns = ROW_TYPES[row_type]
    return f"""
        INSERT INTO {table} ({merchant_column}, {_column_list(columns)})
        SELECT {merchant_id}, {_column_list(columns, "v.")} FROM {rows_of(row_type)}
        WHERE {condition}
        ORDER BY {_column_list(key.split(", "), "v.")} ON CONFLICT ({key}) DO NOTHING
        RETURNING 1
    """


WRITE_BATCH = _write_batch(of_one_merchant=True, with_checkpoints=False)
# Separate because most batches write no checkpoints, and are faster without that part.
WRITE_BATCH_AND_CHECKPOINTS = _write_batch(of_one_merchant=True, with_checkpoints=True)
WRITE_MERCHANTS = _write_batch(of_one_merchant=False, with_checkpoints=False)
WRITE_MERCHANTS_AND_CHECKPOINTS = _write_batch(of_one_merchant=False, with_checkpoints=True)
# The accounts exist. An upsert instead of an update, because every plan of it finds each account by its key.
WRITE_HOLDS = _statement(f"""
    INSERT INTO points_accounts AS a (merchant_id, {_column_list(KEY_COLUMNS)}, holds)
    SELECT :merchant_id, {_column_list(KEY_COLUMNS)}, holds FROM {_unnest(KEY_COLUMNS | {"holds": "jsonb"})}
    ON CONFLICT (buyer_id, store_id, merchant_id) DO UPDATE SET holds = excluded.holds, revision = a.revision + 1
""")
# The rows are found first, so that every plan looks up each by its key; their accounts are locked.
UPDATE_DERIVED_VALUES = _statement(f"""
    UPDATE points_entries AS e SET {", ".join(f"{name} = v.{name}" for name in DERIVED_COLUMNS)}
    FROM {_unnest({"event_id": "text", **DERIVED_COLUMNS})} CROSS JOIN LATERAL (
        SELECT ctid AS place FROM points_entries
        WHERE event_id = v.event_id AND merchant_id = :merchant_id OFFSET 0
    ) AS found
    WHERE e.ctid = found.place AND e.merchant_id = :merchant_id
""")
# Writes nothing if the entry is void, or has settled another redemption than the caller expects.
RECORD_SETTLEMENT = _statement("""
    UPDATE points_entries SET settled_redemption_id = :redemption_id
    WHERE event_id = :event_id AND merchant_id = :merchant_id AND voided_at_ms IS NULL
        AND coalesce(settled_redemption_id, '') = :settled_redemption_id
    RETURNING 1
""")
DELETE_CHECKPOINTS = _statement(f"""
    DELETE FROM points_checkpoints AS c
    USING {_unnest({**KEY_COLUMNS, "after_ms": "bigint"})} CROSS JOIN LATERAL (
        SELECT ctid AS place FROM points_checkpoints
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            AND newest_at_ms > v.after_ms OFFSET 0
    ) AS found
    WHERE c.ctid = found.place AND c.merchant_id = :merchant_id
""")
# The newest entries of some accounts before one of them. Its ordinal is looked up, because it changes when another
# event of that millisecond arrives late. Within a millisecond, the entries of an account stay together, so that the
# change affects no other account.
LIST_NEWEST_ENTRIES = _statement(f"""
    SELECT {_column_list(ENTRY_COLUMNS, "e.")} FROM {_unnest(KEY_COLUMNS)}
    LEFT JOIN points_entries AS b ON b.event_id = CAST(:before_id AS text) AND b.merchant_id = :merchant_id
    CROSS JOIN LATERAL (
        SELECT {_column_list(ENTRY_COLUMNS)} FROM points_entries
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
LIST_DRIFTING_ACCOUNTS = _statement(f"""
    SELECT {_column_list(ACCOUNT_COLUMNS)} FROM points_accounts
    WHERE merchant_id = :merchant_id AND drift <> 0 AND (store_id, buyer_id) > (:after_store_id, :after_buyer_id)
        AND (CAST(:store_id AS text) = '' OR store_id = :store_id)
    ORDER BY store_id, buyer_id LIMIT :limit
""")
INSERT_VOIDINGS = _statement("""
    INSERT INTO points_voidings (voiding_id, merchant_id, event_id, action, reason, at_ms)
    SELECT :voiding_id, :merchant_id, event_id, :action, :reason, CAST(:at_ms AS bigint)
    FROM unnest(CAST(:event_ids AS text[])) AS v (event_id) ORDER BY event_id
""")

# All or some accounts, for verification. All streams have the same order, which is the order of the indexes.
ACCOUNT_FILTER = """
    (CAST(:merchant_id AS text) = '' OR merchant_id = :merchant_id)
    AND (CAST(:store_id AS text) = '' OR store_id = :store_id)
    AND (CAST(:buyer_id AS text) = '' OR buyer_id = :buyer_id)
"""
ACCOUNT_ORDER = "buyer_id, store_id, merchant_id"
COUNT_ACCOUNTS_AND_ENTRIES = _statement(f"""
    SELECT
        (SELECT count(*) FROM points_accounts WHERE {ACCOUNT_FILTER}) AS accounts,
        (SELECT count(*) FROM points_entries WHERE {ACCOUNT_FILTER} AND outcome <> 'REFUSED') AS entries
""")
STREAM_KEYS = _statement(f"""
    SELECT merchant_id, {_column_list(KEY_COLUMNS)} FROM points_accounts WHERE {ACCOUNT_FILTER}
    UNION SELECT merchant_id, {_column_list(KEY_COLUMNS)} FROM points_entries
        WHERE {ACCOUNT_FILTER} AND outcome <> 'REFUSED'
    UNION SELECT merchant_id, {_column_list(KEY_COLUMNS)} FROM points_checkpoints WHERE {ACCOUNT_FILTER}
    ORDER BY {ACCOUNT_ORDER}
""")
STREAM_ACCOUNTS = _statement(f"""
    SELECT merchant_id, {_column_list(ACCOUNT_COLUMNS)} FROM points_accounts
    WHERE {ACCOUNT_FILTER} ORDER BY {ACCOUNT_ORDER}
""")
STREAM_ENTRIES = _statement(f"""
    SELECT merchant_id, {_column_list(ENTRY_COLUMNS)} FROM points_entries
    WHERE {ACCOUNT_FILTER} AND outcome <> 'REFUSED'
    ORDER BY {ACCOUNT_ORDER}, updated_at_ms, ordinal, event_id
""")
STREAM_CHECKPOINTS = _statement(f"""
    SELECT merchant_id, {_column_list(CHECKPOINT_COLUMNS)} FROM points_checkpoints WHERE {ACCOUNT_FILTER}
    ORDER BY {ACCOUNT_ORDER}, newest_at_ms
""")

COUNT_DRIFTING_ACCOUNTS = _statement("""
    SELECT merchant_id, CAST(count(*) AS bigint) AS accounts, CAST(sum(abs(drift)) AS bigint) AS points
    FROM points_accounts WHERE drift <> 0 GROUP BY merchant_id ORDER BY 2 DESC, merchant_id LIMIT :limit
""")


def list_entries(
    merchant_id: str, key: AccountKey, entry_filter: EntryFilter, *, before: tuple[int, str] | None, limit: int
) -> Statement:
    """Build a statement that reads a page of an account's entries, newest first.

    The page ends before an entry, given by its time in ms and its event_id. Its ordinal is looked up, because it
    changes when another event of that millisecond arrives late.
    """
    entry = points_entries.c
    merchant: BindParameter[str] = bindparam("merchant", merchant_id)
    query = select(*(entry[name] for name in ENTRY_COLUMNS)).where(
        and_(entry.buyer_id == key.buyer_id, entry.store_id == key.store_id, entry.merchant_id == merchant),
        entry.outcome != ApplyOutcome.REFUSED.value,
    )
    if entry_filter.update_type is not None:
        query = query.where(entry.update_type == entry_filter.update_type.value)
    if entry_filter.scenes:
        scenes = bindparam("scenes", list(entry_filter.scenes), type_=ARRAY(Text))
        query = query.where(entry.scene == any_(scenes))
    if entry_filter.start_ms is not None:
        query = query.where(entry.updated_at_ms >= entry_filter.start_ms)
    if entry_filter.end_ms is not None:
        query = query.where(entry.updated_at_ms < entry_filter.end_ms)
    if before is not None:
        at_ms, event_id = before
        last = points_entries.alias("last").c
        ordinal = select(last.ordinal).where(last.event_id == event_id, last.merchant_id == merchant)
        position = tuple_(literal(at_ms), ordinal.scalar_subquery())
        query = query.where(tuple_(entry.updated_at_ms, entry.ordinal) < position)
    query = query.order_by(entry.updated_at_ms.desc(), entry.ordinal.desc()).limit(limit)
    return Statement(query, "ledger.list_entries")
