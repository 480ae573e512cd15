"""Migrations of tables with rows from earlier releases."""

from typing import Any

import asyncpg

from pointbook_server.db.migrations import migrate
from support.embedded_database import Cluster
from support.schema_revisions import revisions_before

REDEMPTION = """
    INSERT INTO redemptions (
        redemption_id, merchant_id, reference, redeemer, program_id, points, group_redemption, group_id,
        transaction_number, notes, redeem_value, redeem_local_value, points_currency_ratio, active_points,
        created_at_ms, settle_by_ms, draws, holds, open_points, released_points, reversed_points
    ) VALUES ($1, 'm', $1, $2, 1, 100, false, '', '', '', '', '', '', 0, 1, 2, '[]', '[]', 0, 0, $3)
"""
REVERSAL = """
    INSERT INTO redemption_reversals (reference, merchant_id, redemption_id, points, notes, created_at_ms)
    VALUES ($1, 'm', $2, $3, '', 5)
"""
AUDIT = """
    INSERT INTO redemption_audit (audit_id, merchant_id, redemption_id, action, reason, at_ms)
    VALUES ('a', 'm', $1, 'RELEASE', '', 5)
"""


async def migrated_before(cluster: Cluster, number: str) -> str:
    """Return a new database at the revision before another one."""

    async def leave_empty(_url: str) -> None:
        pass

    await cluster.template("pointbook_history", leave_empty)
    url = await cluster.clone("pointbook_history")
    await migrate(url, revisions=revisions_before(number))
    return url


async def test_older_reversals_get_their_points_and_customer(cluster: Cluster) -> None:
    """A reversal of all remaining points gets their number."""
    url = await migrated_before(cluster, "0017")
    connection: Any = await asyncpg.connect(url)
    for redemption_id, redeemer, reversed_points, reversals in (
        ("r-1", "customer c-1", 100, {"a": 30, "b": 0, "c": 20}),
        ("r-2", "buyer s b", 40, {"d": 40}),
        ("r-3", "buyer s b", 100, {"e": 0}),
    ):
        await connection.execute(REDEMPTION, redemption_id, redeemer, reversed_points)
        for reference, points in reversals.items():
            await connection.execute(REVERSAL, reference, redemption_id, points)
    await connection.execute(AUDIT, "r-2")

    await migrate(url)

    rows = await connection.fetch("SELECT reference, reversed_points, redeemer FROM redemption_reversals ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        ("a", 30, "customer c-1"),
        ("b", 50, "customer c-1"),
        ("c", 20, "customer c-1"),
        ("d", 40, "buyer s b"),
        ("e", 100, "buyer s b"),
    ]
    assert await connection.fetchval("SELECT redeemer FROM redemption_audit") == "buyer s b"
    await connection.close()
