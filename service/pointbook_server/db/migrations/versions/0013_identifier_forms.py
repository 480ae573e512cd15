"""Two forms of an identifier: one to compare, one to return and send to.

Existing rows keep their form. A row gets a new key if its form is now compared by another one: Argentine mobile numbers
without the 9, old mobile numbers of Brazil and Mexico, and a few letters for which case folding differs from lower
case. Nothing is merged: if two customers of a merchant have forms of one identifier, the customer whose form already is
the key keeps it. The other form is detached, and customer_audit records both customers as DETACH, without the value.
"""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from alembic import op
from sqlalchemy import text

from pointbook_server.customers import emails, phones

revision = "0013"
down_revision = "0012"

STATEMENTS = (
    "ALTER TABLE customer_identifiers ADD COLUMN written text",
    """
    COMMENT ON COLUMN customer_identifiers.written IS
    'As it is answered and sent to; NULL where that is the value, which is compared.'
    """,
    "ALTER TABLE customer_claims ADD COLUMN written text",
    "COMMENT ON COLUMN customer_claims.written IS 'As customer_identifiers has it.'",
    "ALTER TABLE customer_audit DROP CONSTRAINT ck_customer_audit_action",
    """
    ALTER TABLE customer_audit ADD CONSTRAINT ck_customer_audit_action
    CHECK (action IN ('MOVE', 'REDACT', 'ERASE_STORE', 'DETACH'))
    """,
)
PAGE_SIZE = 1_000
KEY = ("value", "kind", "source", "account_id", "merchant_id")
IN_QUESTION = """(
    (kind = 'MOBILE' AND (value LIKE '+52%' OR value LIKE '+54%' OR value LIKE '+55%'))
    OR (kind = 'EMAIL' AND value ~ '[^ -~]')
)"""
"""Rows whose key may differ from their value; ASCII addresses equal their key."""
READ = text(f"""
    SELECT {", ".join(KEY)}, customer_id, since_ms FROM customer_identifiers
    WHERE ({", ".join(KEY)}) > (:value, :kind, :source, :account_id, :merchant_id) AND {IN_QUESTION}
    ORDER BY {", ".join(KEY)} LIMIT {PAGE_SIZE}
""")  # noqa: S608 - constants of this module
DELETE = text("""
    DELETE FROM customer_identifiers AS i USING unnest(
        CAST(:value AS text[]), CAST(:kind AS text[]), CAST(:source AS text[]), CAST(:account_id AS text[]),
        CAST(:merchant_id AS text[])
    ) AS v (value, kind, source, account_id, merchant_id)
    WHERE i.value = v.value AND i.kind = v.kind AND i.source = v.source AND i.account_id = v.account_id
        AND i.merchant_id = v.merchant_id
""")
INSERT = text("""
    INSERT INTO customer_identifiers
        (value, kind, source, account_id, merchant_id, customer_id, since_ms, written)
    SELECT * FROM unnest(
        CAST(:key AS text[]), CAST(:kind AS text[]), CAST(:source AS text[]), CAST(:account_id AS text[]),
        CAST(:merchant_id AS text[]), CAST(:customer_id AS text[]), CAST(:since_ms AS bigint[]),
        CAST(:written AS text[])
    )
    ON CONFLICT DO NOTHING RETURNING value AS key, kind, source, account_id, merchant_id, customer_id
""")
OWNER = text("""
    SELECT customer_id FROM customer_identifiers
    WHERE value = :key AND kind = :kind AND source = :source AND account_id = :account_id
        AND merchant_id = :merchant_id
""")
COUNT_CHANGE = text("""
    UPDATE customers SET revision = revision + 1, updated_at_ms = :now_ms
    WHERE customer_id = :customer_id AND merchant_id = :merchant_id
""")
AUDIT = text("""
    INSERT INTO customer_audit (audit_id, merchant_id, customer_id, action, kind, to_customer_id, reason, at_ms)
    VALUES (:audit_id, :merchant_id, :customer_id, 'DETACH', :audit_kind, :owner, :reason, :now_ms)
""")
# There are few claims, and their value is not part of a key, so they need no pages.
READ_CLAIMS = text(f"""
    SELECT customer_id, kind, merchant_id, value FROM customer_claims WHERE {IN_QUESTION}
""")  # noqa: S608 - constants of this module
WRITE_CLAIM = text("""
    UPDATE customer_claims SET value = :key, written = :written
    WHERE customer_id = :customer_id AND kind = :kind AND merchant_id = :merchant_id
""")
REASON = "another customer has another form of the same identifier"


def upgrade() -> None:
    """Add the written form, and rewrite each row whose key changed."""
    for statement in STATEMENTS:
        op.execute(statement)
    now_ms = time.time_ns() // 1_000_000
    for page in _pages():
        changed = [row | keyed for row in page if (keyed := _keyed(row))]
        if changed:
            _rewrite(changed, now_ms)
    for row in _fetch(READ_CLAIMS, {}):
        if keyed := _keyed(row):
            op.get_bind().execute(WRITE_CLAIM, row | keyed)


def _pages() -> Iterator[list[dict[str, Any]]]:
    """Read the affected rows in pages, in key order."""
    after = dict.fromkeys(KEY, "")
    while page := _fetch(READ, after):
        yield page
        after = {name: page[-1][name] for name in KEY}


def _keyed(row: dict[str, Any]) -> dict[str, str | None]:
    """Return the new key and form of a row; empty if they do not change."""
    if row["kind"] == "MOBILE":
        phone = phones.read(row["value"])
        key, form = ("", "") if phone is None else (phone.key, phone.e164)
    else:
        address = emails.read(row["value"])
        key, form = ("", "") if address is None else (address.key, address.written)
    if not key or key == row["value"]:
        return {}
    return {"key": key, "written": None if form == key else form}


def _rewrite(rows: list[dict[str, Any]], now_ms: int) -> None:
    """Replace rows by ones with the new keys; detach those whose key is taken."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    op.get_bind().execute(DELETE, columns)
    names = ("key", *KEY[1:], "customer_id")
    inserted = {tuple(row[name] for name in names) for row in _fetch(INSERT, columns)}
    for row in rows:
        if tuple(row[name] for name in names) not in inserted:
            _detach(row, now_ms)


def _detach(row: dict[str, Any], now_ms: int) -> None:
    """Audit a detached identifier, and increment its customer's revision."""
    [owner] = [other["customer_id"] for other in _fetch(OWNER, row)]
    if owner == row["customer_id"]:
        return
    values = {
        **row,
        "owner": owner,
        "now_ms": now_ms,
        "audit_id": secrets.token_hex(12),
        "audit_kind": f"{row['source']} {row['kind']}".strip(),
        "reason": REASON,
    }
    op.get_bind().execute(COUNT_CHANGE, values)
    op.get_bind().execute(AUDIT, values)


def _fetch(statement: Any, values: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in op.get_bind().execute(statement, values).mappings()]
