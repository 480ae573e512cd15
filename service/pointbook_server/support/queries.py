"""SQL of refused calls."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import text

from pointbook_server.db.database import Row, Statement
from pointbook_server.redemption.refusal import Refusal, RefusalReason, RefusedMethod

COLUMNS = {
    "refusal_id": "text",
    "customer": "text",
    "at_ms": "bigint",
    "method": "text",
    "program_id": "bigint",
    "points": "bigint",
    "active_points": "bigint",
    "reasons": "jsonb",
    "reference": "text",
    "actor": "text",
}
ALL_COLUMNS = ", ".join(("merchant_id", *COLUMNS))
# A write that is repeated after an interruption stores each refusal once.
INSERT = Statement(
    text(f"""
    INSERT INTO redemption_refusals ({ALL_COLUMNS})
    SELECT :merchant_id, {", ".join(COLUMNS)}
    FROM unnest({", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in COLUMNS.items())}) AS v ({", ".join(COLUMNS)})
    ON CONFLICT DO NOTHING
""")
)
IN_PAGE = """
    merchant_id = :merchant_id AND at_ms >= CAST(:start_ms AS bigint)
    AND (at_ms, refusal_id) < (CAST(:before_ms AS bigint), CAST(:before_id AS text))
"""
# Reads the newest refusals of each customer by the primary key: the cost grows with the page, not with the history.
LIST_BY_CUSTOMERS = Statement(
    text(f"""
    SELECT r.* FROM unnest(CAST(:customers AS text[])) AS v (customer) CROSS JOIN LATERAL (
        SELECT {ALL_COLUMNS} FROM redemption_refusals
        WHERE customer = v.customer AND {IN_PAGE} AND (CAST(:reference AS text) = '' OR reference = :reference)
        ORDER BY at_ms DESC, refusal_id DESC LIMIT :limit
    ) AS r
    ORDER BY at_ms DESC, refusal_id DESC LIMIT :limit
""")
)
LIST_BY_REFERENCE = Statement(
    text(f"""
    SELECT {ALL_COLUMNS} FROM redemption_refusals
    WHERE reference = :reference AND reference <> '' AND {IN_PAGE}
    ORDER BY at_ms DESC, refusal_id DESC LIMIT :limit
""")
)


def to_columns(refusals: Sequence[Refusal]) -> dict[str, list[Any]]:
    """Convert refusals to one array per column."""
    rows = [_to_row(refusal) for refusal in refusals]
    return {name: [row[name] for row in rows] for name in COLUMNS}


def _to_row(refusal: Refusal) -> dict[str, Any]:
    reasons = [(reason.code, reason.reason, reason.message, dict(reason.metadata)) for reason in refusal.reasons]
    row = {name: getattr(refusal, name) for name in COLUMNS}
    return row | {"method": refusal.method.value, "reasons": json.dumps(reasons)}


def read_refusal(row: Row) -> Refusal:
    """Build a refusal from a row of redemption_refusals."""
    values = {name: row[name] for name in ("merchant_id", *COLUMNS)}
    reasons = tuple(RefusalReason(*fields) for fields in json.loads(row.reasons))
    return Refusal(**{**values, "method": RefusedMethod(row.method), "reasons": reasons})
