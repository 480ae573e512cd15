"""SQL of redemption, and the codecs of its rows."""

import json
from typing import Any

from sqlalchemy import text

from pointbook_server.db.database import Row, Statement
from pointbook_server.db.row_types import RowTypes, rows_of
from pointbook_server.ledger.lots import Draw as EntryDraw
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption.allocation import Allocation
from pointbook_server.redemption.bookings import Booking, first_draws
from pointbook_server.redemption.model import AccountHold, HoldState, IdempotencyContent, Redemption, StoredReversal

COLUMNS = {
    "redemption_id": "text",
    "reference": "text",
    "redeemer": "text",
    "program_id": "bigint",
    "points": "bigint",
    "group_redemption": "boolean",
    "group_id": "text",
    "transaction_number": "text",
    "notes": "text",
    "redeem_value": "text",
    "redeem_local_value": "text",
    "points_currency_ratio": "text",
    "active_points": "bigint",
    "created_at_ms": "bigint",
    "settle_by_ms": "bigint",
    "draws": "jsonb",
    "holds": "jsonb",
    "open_points": "bigint",
    "released_points": "bigint",
    "reversed_points": "bigint",
    "actor": "text",
}
ROW_TYPES: RowTypes = {"redemption_row": COLUMNS}
MUTABLE_COLUMNS = ("draws", "holds", "open_points", "released_points", "reversed_points")
ALL_COLUMNS = ", ".join(("merchant_id", *COLUMNS))
# The state of a redemption at :now_ms, as in Redemption.state.
STATE = """
    CASE
        WHEN open_points > 0 AND :now_ms < settle_by_ms THEN 'PENDING'
        WHEN reversed_points = points THEN 'REVERSED'
        WHEN open_points + released_points > 0 THEN 'UNSETTLED'
        ELSE 'SETTLED'
    END
"""


def _statement(sql: str) -> Statement:
    return Statement(text(sql))


def _matches(param: str, value: str = "") -> str:
    """Return the condition that a value equals a parameter, of which empty means any."""
    return f"(CAST(:{param} AS text) = '' OR {value or param} = :{param})"


READ_BY_ID = _statement(f"""
    SELECT {ALL_COLUMNS} FROM redemptions WHERE redemption_id = :redemption_id AND merchant_id = :merchant_id
""")
READ_BY_REFERENCES = _statement(f"""
    SELECT {ALL_COLUMNS} FROM redemptions
    WHERE reference = ANY(CAST(:references AS text[])) AND merchant_id = :merchant_id
""")
LOCK = _statement(f"""
    SELECT {ALL_COLUMNS} FROM redemptions
    WHERE redemption_id = ANY(CAST(:redemption_ids AS text[])) AND merchant_id = :merchant_id
    ORDER BY redemption_id FOR UPDATE
""")
LOCK_AVAILABLE = _statement(f"""
    SELECT {ALL_COLUMNS} FROM redemptions
    WHERE redemption_id = ANY(CAST(:redemption_ids AS text[])) AND merchant_id = :merchant_id
    ORDER BY redemption_id FOR UPDATE SKIP LOCKED
""")
# Inserting a redemption claims its reference; sorted, so that concurrent inserts cannot deadlock.
INSERT = _statement(f"""
    INSERT INTO redemptions ({ALL_COLUMNS})
    SELECT :merchant_id, {", ".join(COLUMNS)} FROM {rows_of("redemption_row")}
    ORDER BY reference ON CONFLICT DO NOTHING RETURNING 1
""")
UPDATE = _statement(f"""
    UPDATE redemptions SET {", ".join(f"{name} = :{name}" for name in MUTABLE_COLUMNS)}
    WHERE redemption_id = :redemption_id AND merchant_id = :merchant_id
""")
# The points that each redeemer has redeemed in a program, less reversals, since the start of a day, week and month.
READ_USAGE = _statement("""
    SELECT v.redeemer, v.program_id, used.* FROM unnest(
        CAST(:redeemers AS text[]), CAST(:program_ids AS bigint[]), CAST(:days AS bigint[]), CAST(:weeks AS bigint[]),
        CAST(:months AS bigint[])
    ) AS v (redeemer, program_id, day_ms, week_ms, month_ms)
    CROSS JOIN LATERAL (
        SELECT
            coalesce(sum(points - reversed_points) FILTER (WHERE created_at_ms >= v.day_ms), 0)::bigint AS day_points,
            coalesce(sum(points - reversed_points) FILTER (WHERE created_at_ms >= v.week_ms), 0)::bigint AS week_points,
            coalesce(sum(points - reversed_points) FILTER (WHERE created_at_ms >= v.month_ms), 0)::bigint
                AS month_points
        FROM redemptions
        WHERE redeemer = v.redeemer AND merchant_id = :merchant_id AND program_id = v.program_id
            AND created_at_ms >= least(v.week_ms, v.month_ms)
    ) AS used
""")
# The newest decreases of each account by a number of points, since a time, that settled no redemption, or one whose
# hold had been released before they happened. A decrease happened no later than it was received, even if its own time
# is ahead. LATERAL makes every plan look up each account by itself.
FIND_BOOKINGS = _statement("""
    SELECT e.* FROM unnest(
        CAST(:store_ids AS text[]), CAST(:buyer_ids AS text[]), CAST(:points AS bigint[]), CAST(:since_ms AS bigint[])
    ) AS v (store_id, buyer_id, points, since_ms)
    CROSS JOIN LATERAL (
        SELECT store_id, buyer_id, event_id, updated_value, scene, updated_at_ms, ordinal, draws,
            coalesce(settled_redemption_id, '') AS settled_redemption_id
        FROM points_entries
        LEFT JOIN LATERAL (
            SELECT settle_by_ms FROM redemptions
            WHERE redemption_id = settled_redemption_id AND merchant_id = :merchant_id OFFSET 0
        ) AS settled ON true
        WHERE buyer_id = v.buyer_id AND store_id = v.store_id AND merchant_id = :merchant_id
            AND updated_at_ms >= v.since_ms AND updated_value = v.points AND update_type = 'DECREASE'
            AND scene = ANY(CAST(:scenes AS text[])) AND outcome <> 'REFUSED' AND voided_at_ms IS NULL
            AND (settled_redemption_id IS NULL OR settle_by_ms <= least(updated_at_ms, received_at_ms))
        ORDER BY updated_at_ms DESC, ordinal DESC LIMIT :limit
    ) AS e
""")
READ_REVERSAL = _statement("""
    SELECT redemption_id, points FROM redemption_reversals
    WHERE reference = :reference AND merchant_id = :merchant_id
""")
INSERT_REVERSAL = _statement("""
    INSERT INTO redemption_reversals (
        reference, merchant_id, redemption_id, points, notes, created_at_ms, redeemer, reversed_points, actor
    ) VALUES (
        :reference, :merchant_id, :redemption_id, :points, :notes, :now_ms, :redeemer, :reversed_points, :actor
    )
    ON CONFLICT DO NOTHING RETURNING 1
""")
# The newest reversals of each redemption.
READ_REVERSALS = _statement("""
    SELECT r.* FROM unnest(CAST(:redemption_ids AS text[])) AS v (redemption_id) CROSS JOIN LATERAL (
        SELECT redemption_id, reference, reversed_points, notes, created_at_ms, actor FROM redemption_reversals
        WHERE redemption_id = v.redemption_id AND merchant_id = :merchant_id
        ORDER BY created_at_ms DESC, reference DESC LIMIT :limit
    ) AS r
""")
INSERT_AUDIT = _statement("""
    INSERT INTO redemption_audit (
        audit_id, merchant_id, redemption_id, action, reason, at_ms, redeemer, points, actor
    ) VALUES (
        :audit_id, :merchant_id, :redemption_id, :action, :reason, :now_ms, :redeemer, :points, :actor
    )
""")
LIST_OVERDUE_MERCHANTS = _statement("""
    SELECT DISTINCT merchant_id FROM (
        SELECT merchant_id FROM redemptions WHERE open_points > 0 AND settle_by_ms <= :now_ms
        ORDER BY settle_by_ms LIMIT :limit
    ) AS overdue
""")
COUNT_HELD = _statement("""
    SELECT CAST(count(*) AS bigint) AS held,
        CAST(count(*) FILTER (WHERE settle_by_ms <= :now_ms) AS bigint) AS overdue
    FROM redemptions WHERE open_points > 0
""")
FIND_OVERDUE = _statement(f"""
    SELECT {ALL_COLUMNS} FROM redemptions
    WHERE open_points > 0 AND settle_by_ms <= :now_ms AND merchant_id = :merchant_id
    ORDER BY settle_by_ms LIMIT :limit
""")

# The redemptions that drew from some accounts; empty ids match all.
STREAM_REDEMPTIONS = _statement(f"""
    SELECT {ALL_COLUMNS} FROM redemptions
    WHERE {_matches("merchant_id")} AND EXISTS (
        SELECT FROM jsonb_array_elements(draws) AS v (draw)
        WHERE {_matches("store_id", "draw->>0")} AND {_matches("buyer_id", "draw->>1")}
    )
""")
HOLDS_OF_REDEMPTIONS = f"""
    SELECT merchant_id, hold->>0 AS store_id, hold->>1 AS buyer_id, redemption_id, (hold->>2)::bigint AS points,
        hold->>3 AS state, hold->>3 = 'OPEN' AND (hold->>2)::bigint > 0 AND :now_ms < settle_by_ms AS is_open
    FROM redemptions CROSS JOIN LATERAL jsonb_array_elements(holds) AS v (hold)
    WHERE {_matches("merchant_id")} AND {_matches("store_id", "hold->>0")} AND {_matches("buyer_id", "hold->>1")}
"""
# An account must have the unsettled holds of each redemption; it may have dropped a released one.
STREAM_HOLD_MISMATCHES = _statement(f"""
    WITH redeemed AS ({HOLDS_OF_REDEMPTIONS}), held AS (
        SELECT merchant_id, store_id, buyer_id, hold->>0 AS redemption_id, (hold->>1)::bigint AS points,
            NOT (hold->>5)::boolean AND :now_ms < (hold->>3)::bigint AS is_open
        FROM points_accounts CROSS JOIN LATERAL jsonb_array_elements(holds) AS v (hold)
        WHERE {_matches("merchant_id")} AND {_matches("store_id")} AND {_matches("buyer_id")}
    )
    SELECT merchant_id, store_id, buyer_id, redemption_id, format(
        'the account holds %s, the redemption %s',
        coalesce(held.points || CASE WHEN held.is_open THEN ' open' ELSE ' released' END, 'nothing'),
        coalesce(redeemed.points || ' ' || lower(redeemed.state), 'nothing')
    ) AS text
    FROM held FULL JOIN redeemed USING (merchant_id, store_id, buyer_id, redemption_id)
    WHERE CASE
        WHEN held.points IS NULL THEN redeemed.is_open
        WHEN redeemed.points IS NULL THEN true
        ELSE (held.points, held.is_open) <> (redeemed.points, redeemed.is_open) OR redeemed.state = 'SETTLED'
    END
""")
# If an entry settled a hold, the redemption's hold must be settled.
STREAM_SETTLEMENT_MISMATCHES = _statement(f"""
    WITH redeemed AS ({HOLDS_OF_REDEMPTIONS}), settling AS (
        SELECT merchant_id, store_id, buyer_id, settled_redemption_id AS redemption_id, event_id FROM points_entries
        WHERE settled_redemption_id IS NOT NULL
            AND {_matches("merchant_id")} AND {_matches("store_id")} AND {_matches("buyer_id")}
    )
    SELECT merchant_id, store_id, buyer_id, redemption_id, format(
        'entry %s settled a hold that is %s', event_id, coalesce(lower(state), 'missing')
    ) AS text
    FROM settling LEFT JOIN redeemed USING (merchant_id, store_id, buyer_id, redemption_id)
    WHERE state IS DISTINCT FROM 'SETTLED'
""")


def _list_statement(condition: str) -> Statement:
    """Build the statement for a page of redemptions, the newest first."""
    return _statement(f"""
        SELECT {ALL_COLUMNS} FROM redemptions
        WHERE {condition} AND merchant_id = :merchant_id
            AND created_at_ms >= :start_ms AND created_at_ms < :end_ms
            AND (created_at_ms, redemption_id) < (CAST(:before_ms AS bigint), CAST(:before_id AS text))
            AND (CAST(:state AS text) = '' OR {STATE} = :state)
        ORDER BY created_at_ms DESC, redemption_id DESC LIMIT :limit
    """)


LIST_BY_MERCHANT = _list_statement("points > 0")
LIST_BY_REDEEMERS = _list_statement("redeemer = ANY(CAST(:redeemers AS text[]))")


def _newest(table: str, columns: str, at_ms: str, row_id: str) -> Statement:
    """Build the statement for a page of the newest rows of some redeemers."""
    return _statement(f"""
        SELECT r.* FROM unnest(CAST(:redeemers AS text[])) AS v (redeemer) CROSS JOIN LATERAL (
            SELECT {columns} FROM {table}
            WHERE redeemer = v.redeemer AND merchant_id = :merchant_id AND {at_ms} >= CAST(:start_ms AS bigint)
                AND ({at_ms}, {row_id}) < (CAST(:before_ms AS bigint), CAST(:before_id AS text))
            ORDER BY {at_ms} DESC, {row_id} DESC LIMIT :limit
        ) AS r
        ORDER BY {at_ms} DESC, {row_id} DESC LIMIT :limit
    """)


LIST_NEWEST_REDEMPTIONS = _newest("redemptions", ALL_COLUMNS, "created_at_ms", "redemption_id")
LIST_NEWEST_REVERSALS = _newest(
    "redemption_reversals",
    "redemption_id, reference, reversed_points, notes, created_at_ms, actor",
    "created_at_ms",
    "reference",
)
LIST_NEWEST_CLOSINGS = _newest(
    "redemption_audit", "audit_id, redemption_id, at_ms, action, points, reason, actor", "at_ms", "audit_id"
)


def to_row(redemption: Redemption) -> tuple[Any, ...]:
    """Convert a redemption to a redemption_row."""
    return (
        redemption.redemption_id,
        redemption.reference,
        *redemption.content,
        redemption.notes,
        redemption.redeem_value,
        redemption.redeem_local_value,
        redemption.points_currency_ratio,
        redemption.active_points,
        redemption.created_at_ms,
        redemption.settle_by_ms,
        *_to_mutable_row(redemption),
        redemption.actor,
    )


def _to_mutable_row(redemption: Redemption) -> tuple[Any, ...]:
    """Convert a redemption to MUTABLE_COLUMNS."""
    return (
        json.dumps(redemption.draws),
        json.dumps(redemption.holds),
        redemption.held_points(HoldState.OPEN),
        redemption.held_points(HoldState.RELEASED),
        redemption.reversed_points,
    )


def to_mutable_columns(redemption: Redemption) -> dict[str, Any]:
    """Convert the mutable values of a redemption to MUTABLE_COLUMNS by name."""
    return dict(zip(MUTABLE_COLUMNS, _to_mutable_row(redemption), strict=True))


def read_redemption(row: Row) -> Redemption:
    """Build a redemption from its row."""
    return Redemption(
        merchant_id=row.merchant_id,
        redemption_id=row.redemption_id,
        reference=row.reference,
        content=IdempotencyContent(
            redeemer=row.redeemer,
            program_id=row.program_id,
            points=row.points,
            group_redemption=row.group_redemption,
            group_id=row.group_id,
            transaction_number=row.transaction_number,
        ),
        notes=row.notes,
        redeem_value=row.redeem_value,
        redeem_local_value=row.redeem_local_value,
        points_currency_ratio=row.points_currency_ratio,
        active_points=row.active_points,
        draws=tuple(Allocation(*draw) for draw in json.loads(row.draws)),
        holds=tuple(_read_hold(*hold) for hold in json.loads(row.holds)),
        created_at_ms=row.created_at_ms,
        settle_by_ms=row.settle_by_ms,
        actor=row.actor,
    )


def read_reversal(row: Row) -> StoredReversal:
    """Build a reversal from its row."""
    return StoredReversal(
        redemption_id=row.redemption_id,
        reference=row.reference,
        points=row.reversed_points,
        notes=row.notes,
        created_at_ms=row.created_at_ms,
        actor=row.actor,
    )


def read_booking(row: Row) -> Booking:
    """Build a booking from a row of FIND_BOOKINGS."""
    account = AccountKey(row.store_id, row.buyer_id)
    return Booking(
        account=account,
        event_id=row.event_id,
        points=row.updated_value,
        scene=row.scene,
        at_ms=row.updated_at_ms,
        ordinal=row.ordinal,
        draws=first_draws(account, row.updated_value, map(EntryDraw._make, json.loads(row.draws))),
        settled_redemption_id=row.settled_redemption_id,
    )


def _read_hold(store_id: str, buyer_id: str, points: int, state: str) -> AccountHold:
    return AccountHold(store_id, buyer_id, points, HoldState(state))
