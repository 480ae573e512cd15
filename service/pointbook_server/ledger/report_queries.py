"""SQL of the reports on points, for operators.

Each statement but the last reads one merchant, and all or one of its stores.
"""

from sqlalchemy import text

from pointbook_server.db.database import Statement
from pointbook_server.ledger.queries import ACCOUNT_COLUMNS

OF_SCOPE = "merchant_id = :merchant_id AND (CAST(:store_id AS text) = '' OR store_id = :store_id)"
COUNTS = "outcome <> 'REFUSED' AND voided_at_ms IS NULL"
"""The condition of entries that count."""
# 0 before the period, 1 in it, 2 after it.
PERIOD = """
    CASE WHEN updated_at_ms < CAST(:start_ms AS bigint) THEN 0
        WHEN updated_at_ms < CAST(:end_ms AS bigint) THEN 1 ELSE 2 END
"""

STREAM_ACCOUNTS = Statement(text(f"SELECT {', '.join(ACCOUNT_COLUMNS)} FROM points_accounts WHERE {OF_SCOPE}"))
# The overflow lots of an account that expire, summed by expiry. No draw has touched them, so each has all points of the
# increase that made it. The other overflow lots never expire.
SUM_OVERFLOW_BY_EXPIRY = Statement(
    text(f"""
        SELECT expires_at_ms, sum(updated_value) AS points FROM points_entries
        WHERE buyer_id = :buyer_id AND store_id = :store_id AND merchant_id = :merchant_id AND {COUNTS}
            AND update_type = 'INCREASE' AND (expires_at_ms, updated_at_ms, ordinal) >= (
                SELECT CAST(:first_expires_at_ms AS bigint), updated_at_ms, ordinal FROM points_entries
                WHERE event_id = :first_event_id AND merchant_id = :merchant_id
            )
        GROUP BY expires_at_ms ORDER BY expires_at_ms
    """)
)
SUM_ENTRIES = Statement(
    text(f"""
        SELECT {PERIOD} AS period,
            sum(updated_value) FILTER (WHERE update_type = 'INCREASE' AND NOT is_refund) AS earned,
            sum(updated_value) FILTER (WHERE update_type = 'INCREASE' AND is_refund) AS refunded,
            sum(updated_value) FILTER (WHERE update_type = 'DECREASE' AND NOT is_expiry) AS spent,
            sum(updated_value) FILTER (
                WHERE update_type = 'DECREASE' AND NOT is_expiry AND settled_redemption_id IS NOT NULL
            ) AS redeemed,
            sum(updated_value) FILTER (WHERE update_type = 'DECREASE' AND is_expiry) AS expired,
            sum(silently_expired) AS silently_expired, sum(drift) AS drift
        FROM (
            SELECT *, scene = ANY(CAST(:refund_scenes AS text[])) AS is_refund, scene = :expired_scene AS is_expiry
            FROM points_entries WHERE {OF_SCOPE} AND {COUNTS}
        ) AS entries
        GROUP BY period
    """)
)
# An account opens with its first entry that counts.
SUM_OPENINGS = Statement(
    text(f"""
        SELECT {PERIOD} AS period, sum(opening) AS opened
        FROM (SELECT * FROM points_accounts WHERE {OF_SCOPE} AND opening <> 0) AS a
        CROSS JOIN LATERAL (
            SELECT updated_at_ms FROM points_entries
            WHERE buyer_id = a.buyer_id AND store_id = a.store_id AND merchant_id = :merchant_id AND {COUNTS}
            ORDER BY updated_at_ms, ordinal LIMIT 1
        ) AS first
        GROUP BY period
    """)
)
SUM_DRIFT = Statement(
    text("""
        SELECT count(*) AS accounts, coalesce(sum(drift), 0) AS points, count(DISTINCT merchant_id) AS merchants
        FROM points_accounts WHERE drift <> 0
    """)
)
