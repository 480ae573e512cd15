"""Millions of ledger entries by SQL, as the service would write them.

Calls would take an hour.
"""

from collections.abc import AsyncIterator
from itertools import pairwise

import asyncpg

from pointbook_common.durations import HOUR_MS
from scenarios.populations import EVENT_POINTS, OPENED_AT_MS, OPENING_POINTS, YEAR_MS, Population

PAIRS_PER_STATEMENT = 250_000
STATEMENT_SECONDS_MAX = 3_600.0

# Pairs are assigned to the accounts in turn. In each pair an account gains points and spends them an hour later, so
# that only its opening lot stays open. Ids are digests like the shim's, so that the index has them in random order.
INSERT_PAIRS = f"""
    INSERT INTO points_entries (
        event_id, merchant_id, store_id, buyer_id, update_type, scene, updated_value, points_balance, expires_at_ms,
        updated_at_ms, webhook_id, shop_domain, api_version, received_at_ms, outcome,
        ordinal, balance_before, balance_after, drift, silently_expired, draws
    )
    SELECT
        event_id, $1::text || '-0', $1::text || '-0', $1::text || '-buyer-' || pair % $2::int,
        update_type, scene, {EVENT_POINTS}, after, expires, at, '', '', '', at, 'APPLIED', 0, before, after, 0, 0, draws
    FROM generate_series($3::bigint, $4::bigint - 1) AS pair
    CROSS JOIN LATERAL (SELECT {OPENED_AT_MS} + (2 * (pair / $2::int) + 1) * {HOUR_MS} AS gained_at) AS t
    CROSS JOIN LATERAL (
        SELECT
            'shopline-' || encode(sha256(convert_to($1::text || ' gains ' || pair, 'UTF8')), 'hex') AS gained,
            'shopline-' || encode(sha256(convert_to($1::text || ' spends ' || pair, 'UTF8')), 'hex') AS spent
    ) AS ids
    CROSS JOIN LATERAL (
        VALUES (
            gained, 'INCREASE', 'SUCCESSFUL_REGISTRATION', gained_at, gained_at + {YEAR_MS},
            {OPENING_POINTS}, {OPENING_POINTS + EVENT_POINTS}, '[]'::jsonb
        ), (
            spent, 'DECREASE', 'REDEEM_PRODUCTS', gained_at + {HOUR_MS}, NULL,
            {OPENING_POINTS + EVENT_POINTS}, {OPENING_POINTS},
            jsonb_build_array(jsonb_build_array({EVENT_POINTS}, gained_at + {YEAR_MS}, gained))
        )
    ) AS e (event_id, update_type, scene, at, expires, before, after, draws)
"""  # noqa: S608 - only our own constants
# $3 is the number of pairs; an account has every $2-th of them, from its own number.
UPDATE_ACCOUNTS = f"""
    UPDATE points_accounts AS a SET
        lifetime_points = {OPENING_POINTS} + {EVENT_POINTS} * pairs,
        newest_at_ms = {OPENED_AT_MS} + 2 * pairs * {HOUR_MS},
        drawn_to_ms = {OPENED_AT_MS} + (2 * pairs - 1) * {HOUR_MS} + {YEAR_MS},
        uncheckpointed = 1 + 2 * pairs
    FROM (
        SELECT $1::text || '-buyer-' || number AS buyer_id, ($3::bigint - number + $2::int - 1) / $2::int AS pairs
        FROM generate_series(0, $2::int - 1) AS number
    ) AS v
    WHERE a.buyer_id = v.buyer_id AND a.merchant_id = $1::text || '-0' AND pairs > 0
"""  # noqa: S608 - only our own constants
# Inserts in random order are slow in large indexes, so the indexes are dropped and created again afterwards.
SELECT_INDEXES = """
    SELECT format('ALTER TABLE points_entries DROP CONSTRAINT %I', conname) AS drop_index,
        format('ALTER TABLE points_entries ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid)) AS create_index
    FROM pg_constraint WHERE conrelid = 'points_entries'::regclass AND contype = 'p'
    UNION ALL
    SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
    FROM pg_index WHERE indrelid = 'points_entries'::regclass AND NOT indisprimary
"""


def count_steps(pairs: int) -> int:
    """Return the number of steps of `insert_entry_pairs`."""
    return -(-pairs // PAIRS_PER_STATEMENT) + 1 if pairs else 0


async def insert_entry_pairs(connection: asyncpg.Connection, population: Population, pairs: int) -> AsyncIterator[str]:
    """Insert pairs of entries into a population of one merchant.

    Yield the name of each step.
    """
    if not pairs:
        return
    indexes = await connection.fetch(SELECT_INDEXES)
    for index in indexes:
        await connection.execute(index["drop_index"])
    for begin, end in pairwise([*range(0, pairs, PAIRS_PER_STATEMENT), pairs]):
        yield f"{2 * end:,} of {2 * pairs:,} entries"
        values = (population.name, population.accounts, begin, end)
        await connection.execute(INSERT_PAIRS, *values, timeout=STATEMENT_SECONDS_MAX)
    yield "accounts, indexes and statistics"
    await connection.execute(
        UPDATE_ACCOUNTS, population.name, population.accounts, pairs, timeout=STATEMENT_SECONDS_MAX
    )
    await connection.execute("SET maintenance_work_mem = '512MB'")
    for index in indexes:
        await connection.execute(index["create_index"], timeout=STATEMENT_SECONDS_MAX)
    for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
        await connection.execute(statement, timeout=STATEMENT_SECONDS_MAX)
