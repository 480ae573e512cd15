"""SQL of the reports on one-time codes, for operators."""

from sqlalchemy import text

from pointbook_common.durations import DAY_MS
from pointbook_server.db.database import Statement

STREAM_COUNTS = Statement(
    text(f"""
        SELECT at_ms / {DAY_MS} AS day, action, channel, outcome, sum(event_count) AS events
        FROM validation_audit
        WHERE merchant_id = :merchant_id
            AND at_ms >= CAST(:start_ms AS bigint) AND at_ms < CAST(:end_ms AS bigint)
        GROUP BY 1, 2, 3, 4
    """)
)
