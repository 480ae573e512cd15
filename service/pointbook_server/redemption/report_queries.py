"""SQL of the reports on redemptions, for operators."""

from sqlalchemy import text

from pointbook_server.calendars import QUARTER_MS
from pointbook_server.db.database import Statement
from pointbook_server.redemption.queries import STATE

# The redemptions of a merchant that drew from one of its stores or from any, by quarter of an hour (calendars.py).
STREAM_SUMS = Statement(
    text(f"""
        SELECT program_id, {STATE} AS state, created_at_ms / {QUARTER_MS} AS quarter,
            count(*) AS redemptions,
            sum(points) AS points,
            sum(reversed_points) AS reversed_points,
            sum(CAST(nullif(redeem_value, '') AS numeric)) AS redeem_value,
            sum(CAST(nullif(redeem_local_value, '') AS numeric)) AS redeem_local_value,
            sum(reversed_points * CAST(nullif(points_currency_ratio, '') AS numeric)) AS reversed_value,
            count(*) FILTER (WHERE open_points > 0 AND settle_by_ms <= :now_ms) AS overdue,
            coalesce(sum(open_points) FILTER (WHERE settle_by_ms <= :now_ms), 0) AS overdue_points
        FROM redemptions
        WHERE merchant_id = :merchant_id AND points > 0
            AND created_at_ms >= CAST(:start_ms AS bigint) AND created_at_ms < CAST(:end_ms AS bigint)
            AND (CAST(:store_id AS text) = '' OR EXISTS (
                SELECT FROM jsonb_array_elements(draws) AS v (draw) WHERE draw->>0 = :store_id
            ))
        GROUP BY 1, 2, 3
    """)
)
COUNT_OVERDUE = Statement(
    text("""
        SELECT count(*) AS redemptions, coalesce(sum(open_points), 0) AS points, min(settle_by_ms) AS oldest_at_ms
        FROM redemptions WHERE open_points > 0 AND settle_by_ms <= :now_ms
    """)
)
