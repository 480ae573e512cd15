"""The SQL of refusals, and the transactions that run it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import text

from pointbook_server.db.database import Connection, Database, Row, Statement
from pointbook_server.redemption.refused import Refusal, RefusalReason, RefusedMethod
from pointbook_server.rpc.pagination import PageQuery

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
NAMES = ", ".join(("merchant_id", *COLUMNS))
CLEAN_UP_COUNT = 1_000
"""How many rows one transaction deletes at most."""
# A refusal that is written again after its write was broken off is stored once.
INSERT = Statement(
    text(f"""
    INSERT INTO redemption_refusals ({NAMES})
    SELECT :merchant_id, {", ".join(COLUMNS)}
    FROM unnest({", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in COLUMNS.items())}) AS v ({", ".join(COLUMNS)})
    ON CONFLICT DO NOTHING
""")  # noqa: S608 - there is nothing in it but our own names
)
BEFORE = """
    merchant_id = :merchant_id AND at_ms >= CAST(:start_ms AS bigint)
    AND (at_ms, refusal_id) < (CAST(:before_ms AS bigint), CAST(:before_id AS text))
"""
# The newest refusals of each name, by the key alone: what it costs grows with the page, not with the history.
LIST_OF_CUSTOMERS = Statement(
    text(f"""
    SELECT r.* FROM unnest(CAST(:customers AS text[])) AS v (customer) CROSS JOIN LATERAL (
        SELECT {NAMES} FROM redemption_refusals
        WHERE customer = v.customer AND {BEFORE} AND (CAST(:reference AS text) = '' OR reference = :reference)
        ORDER BY at_ms DESC, refusal_id DESC LIMIT :limit
    ) AS r
    ORDER BY at_ms DESC, refusal_id DESC LIMIT :limit
""")  # noqa: S608 - there is nothing in it but our own names
)
LIST_OF_REFERENCE = Statement(
    text(f"""
    SELECT {NAMES} FROM redemption_refusals
    WHERE reference = :reference AND reference <> '' AND {BEFORE}
    ORDER BY at_ms DESC, refusal_id DESC LIMIT :limit
""")  # noqa: S608 - there is nothing in it but our own names
)
LIST_OLD_MERCHANTS = Statement(
    text("""
    SELECT DISTINCT merchant_id FROM (
        SELECT merchant_id FROM redemption_refusals WHERE at_ms < :before_ms AND at_ms > 0 ORDER BY at_ms LIMIT :limit
    ) AS old
""")
)
DELETE_OLD_REFUSALS = Statement(
    text("""
    DELETE FROM redemption_refusals AS r USING (
        SELECT customer, at_ms, refusal_id FROM redemption_refusals
        WHERE at_ms < :before_ms AND at_ms > 0 AND merchant_id = :merchant_id
        ORDER BY at_ms LIMIT :limit FOR UPDATE SKIP LOCKED
    ) AS old
    WHERE r.customer = old.customer AND r.at_ms = old.at_ms AND r.refusal_id = old.refusal_id
        AND r.merchant_id = :merchant_id
""")
)


class RefusalTransactions:
    """Reads, writes and deletes refusals."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, merchant_id: str, refusals: Sequence[Refusal]) -> None:
        """Write refusals of one merchant in one statement. Those that are there already stay as they are."""
        rows = [_write(refusal) for refusal in refusals]
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        async with self._database.autocommit() as connection:
            await connection.execute(INSERT, {"merchant_id": merchant_id, **columns})

    async def of_customers(
        self, merchant_id: str, customers: Iterable[str], reference: str, query: PageQuery
    ) -> list[Refusal]:
        """Return a page of refusals under some names, the newest first; an empty reference means any."""
        values = {"merchant_id": merchant_id, "customers": sorted(customers), "reference": reference}
        async with self._database.autocommit() as connection:
            return list(map(_read, await connection.fetch(LIST_OF_CUSTOMERS, values | asdict(query))))

    async def of_reference(self, merchant_id: str, reference: str, query: PageQuery) -> list[Refusal]:
        """Return a page of refusals under a reference, the newest first."""
        values = {"merchant_id": merchant_id, "reference": reference}
        async with self._database.autocommit() as connection:
            return list(map(_read, await connection.fetch(LIST_OF_REFERENCE, values | asdict(query))))

    async def old_merchants(self, before_ms: int) -> list[str]:
        """Return merchants with refusals from before a time, without locking anything."""
        values = {"before_ms": before_ms, "limit": CLEAN_UP_COUNT}
        async with self._database.autocommit() as connection:
            return [row.merchant_id for row in await connection.fetch(LIST_OLD_MERCHANTS, values)]

    async def delete_old(self, merchant_id: str, before_ms: int) -> int:
        """Delete some of a merchant's refusals from before a time, and return how many; locked ones are left."""
        values = {"merchant_id": merchant_id, "before_ms": before_ms, "limit": CLEAN_UP_COUNT}

        async def work(connection: Connection) -> int:
            return await connection.execute(DELETE_OLD_REFUSALS, values)

        return await self._database.transaction(work)


def _write(refusal: Refusal) -> dict[str, Any]:
    reasons = [(each.code, each.reason, each.message, dict(each.values)) for each in refusal.reasons]
    row = {name: getattr(refusal, name) for name in COLUMNS}
    return row | {"method": refusal.method.value, "reasons": json.dumps(reasons)}


def _read(row: Row) -> Refusal:
    values = {name: row[name] for name in ("merchant_id", *COLUMNS)}
    reasons = tuple(RefusalReason(*each) for each in json.loads(row.reasons))
    return Refusal(**{**values, "method": RefusedMethod(row.method), "reasons": reasons})
