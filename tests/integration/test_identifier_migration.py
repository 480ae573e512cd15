"""The migration that adds keys and written forms of identifiers."""

from typing import Any

import asyncpg
import pytest

from pointbook_server.db import migrations
from support.embedded_database import Cluster
from support.schema_revisions import revisions_before

EMPTY = "pointbook_without_forms"
ROWS = [
    # customer, kind, source, stored value
    ("ar-mobile", "MOBILE", "", "+5491123456789"),
    ("ar-landline", "MOBILE", "", "+541143215678"),
    ("br-old", "MOBILE", "", "+551187650000"),
    ("br-landline", "MOBILE", "", "+551133334444"),
    ("br-radio", "MOBILE", "", "+551178123456"),
    ("br-not-radio", "MOBILE", "", "+5511978123456"),
    ("br-mobile", "MOBILE", "", "+5511987654321"),
    ("mx", "MOBILE", "", "+525512345678"),
    ("mx-old", "MOBILE", "", "+5218112345678"),
    ("cn", "MOBILE", "", "+8613800000000"),
    ("unreadable", "MOBILE", "", "+549"),
    ("ar-mobile", "MOBILE", "LINE", "+5491123456789"),
    ("folded", "EMAIL", "", "strasse@example.com"),
    ("umlaut", "EMAIL", "", "\u00e4da@b\u00fccher.example"),
    ("greek", "EMAIL", "", "\u03b9\u0308\u0301@example.com"),  # As casefold writes U+0390.
    ("cherokee", "EMAIL", "", "\u13a0@example.com"),  # Casefold makes upper case of it, and lower case the other one.
    ("card", "CARD_NUMBER", "", "+5491123456789"),
    # Two customers with forms of one number: it stays with the one whose form is the key.
    ("keeps-ar", "MOBILE", "", "+543515123456"),
    ("loses-ar", "MOBILE", "", "+5493515123456"),
    ("keeps-br", "MOBILE", "", "+5511987651111"),
    ("loses-br", "MOBILE", "", "+551187651111"),
    # One customer with both, which only a source can have.
    ("both", "MOBILE", "LINE", "+543515123456"),
    ("both", "MOBILE", "LINE", "+5493515123456"),
]
EXPECTED = {
    ("ar-mobile", "", "+541123456789", "+5491123456789"),
    ("ar-landline", "", "+541143215678", None),
    ("br-old", "", "+5511987650000", None),
    ("br-landline", "", "+551133334444", None),
    ("br-radio", "", "+551178123456", None),
    ("br-not-radio", "", "+5511978123456", None),
    ("br-mobile", "", "+5511987654321", None),
    ("mx", "", "+525512345678", None),
    ("mx-old", "", "+528112345678", None),
    ("cn", "", "+8613800000000", None),
    ("unreadable", "", "+549", None),
    ("ar-mobile", "LINE", "+541123456789", "+5491123456789"),
    ("folded", "", "strasse@example.com", None),
    ("umlaut", "", "\u00e4da@b\u00fccher.example", None),
    ("greek", "", "\u0390@example.com", "\u03b9\u0308\u0301@example.com"),
    ("cherokee", "", "\uab70@example.com", "\u13a0@example.com"),
    ("card", "", "+5491123456789", None),
    ("keeps-ar", "", "+543515123456", None),
    ("keeps-br", "", "+5511987651111", None),
    ("both", "LINE", "+543515123456", None),
}


@pytest.fixture
async def old_url(cluster: Cluster) -> str:
    """A database before the migration."""

    async def leave_empty(_url: str) -> None:
        pass

    await cluster.template(EMPTY, leave_empty)
    url = await cluster.clone(EMPTY)
    await migrations.migrate(url, revisions=revisions_before("0013"))
    return url


async def insert(connection: Any, merchant_id: str, rows: list[tuple[str, str, str, str]]) -> None:
    """Insert customers of a merchant as an earlier release did."""
    await connection.executemany(
        "INSERT INTO customers VALUES ($1, $2, '', false, 1, 0, 0) ON CONFLICT DO NOTHING",
        [(customer_id, merchant_id) for customer_id, *_ in rows],
    )
    await connection.executemany(
        """
        INSERT INTO customer_identifiers (value, kind, source, account_id, merchant_id, customer_id, since_ms)
        VALUES ($1, $2, $3, '', $4, $5, 7)
        """,
        [(value, kind, source, merchant_id, customer_id) for customer_id, kind, source, value in rows],
    )


async def test_rows_get_their_keys_keep_their_forms_and_are_never_merged(old_url: str) -> None:
    """The audit names customers who lose a number, but not the number."""
    connection = await asyncpg.connect(old_url)
    try:
        for merchant_id in ("m-1", "m-2"):
            await insert(connection, merchant_id, ROWS)
            await connection.executemany(
                "INSERT INTO customer_claims VALUES ($1, 'MOBILE', $2, $3, 's', 'b', 0, 0, 'e')",
                [("loses-ar", merchant_id, "+5491123456789"), ("folded", merchant_id, "+8613800000000")],
            )
        await migrations.migrate(old_url)

        for merchant_id in ("m-1", "m-2"):
            stored = await connection.fetch(
                """
                SELECT customer_id, source, value, written FROM customer_identifiers
                WHERE merchant_id = $1 AND since_ms = 7
                """,
                merchant_id,
            )
            assert sorted(map(tuple, stored), key=str) == sorted(EXPECTED, key=str)
            audit = await connection.fetch("SELECT * FROM customer_audit WHERE merchant_id = $1", merchant_id)
            audited = {(row["customer_id"], row["to_customer_id"], row["action"], row["kind"]) for row in audit}
            assert audited == {
                ("loses-ar", "keeps-ar", "DETACH", "MOBILE"),
                ("loses-br", "keeps-br", "DETACH", "MOBILE"),
            }
            assert not [row for row in audit if "3515123456" in str(row) or "87651111" in str(row)]
            changed = await connection.fetch(
                "SELECT customer_id FROM customers WHERE revision = 2 AND merchant_id = $1", merchant_id
            )
            assert {row["customer_id"] for row in changed} == {"loses-ar", "loses-br"}
            claims = await connection.fetch(
                "SELECT customer_id, value, written FROM customer_claims WHERE merchant_id = $1", merchant_id
            )
            assert {tuple(row) for row in claims} == {
                ("loses-ar", "+541123456789", "+5491123456789"),
                ("folded", "+8613800000000", None),
            }
    finally:
        await connection.close()


async def test_more_rows_than_a_page_are_migrated(old_url: str) -> None:
    rows = [(f"c-{number}", "MOBILE", "", f"+5491123{number:06}") for number in range(2_500)]
    rows += [(f"d-{number}", "MOBILE", "", f"+861380{number:07}") for number in range(100)]
    connection = await asyncpg.connect(old_url)
    try:
        await insert(connection, "m-1", rows)
        await migrations.migrate(old_url)

        stored = await connection.fetch("SELECT customer_id, value, written FROM customer_identifiers")
    finally:
        await connection.close()
    expected = {(c, value.replace("+549", "+54"), value if c.startswith("c") else None) for c, _, _, value in rows}
    assert {tuple(row) for row in stored} == expected
