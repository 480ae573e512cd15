"""Codes and contacts that must not appear in the database or in logs."""

import re
from collections.abc import Iterable

import asyncpg

from pointbook_server.delivery.sender import Message

CODE = re.compile(r"[2-9A-HJ-NP-Z]{10}")
"""Codes of ten letters and digits, which do not occur by chance."""
TABLES_WITH_CONTACTS = {"customer_identifiers", "customer_claims"}
"""The tables that may contain a number or an address in clear."""
TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
CONTACTS = """
    SELECT DISTINCT unnest(array_remove(ARRAY[value, written], NULL)) FROM customer_identifiers
    WHERE kind IN ('MOBILE', 'EMAIL')
"""


async def find_leaks(database_url: str, messages: Iterable[Message], logs: str) -> list[str]:
    """Return codes and contacts that a database or logs contain, and where.

    The codes are those of some messages, the contacts those of all customers.
    """
    connection = await asyncpg.connect(database_url)
    try:
        texts = {"logs": logs}
        for (table,) in await connection.fetch(TABLES):
            # Without merchant_id, which a caller for all merchants may choose at will.
            query = f"SELECT (to_jsonb(t) - 'merchant_id')::text FROM \"{table}\" AS t"  # noqa: S608 - a table's name
            rows = await connection.fetch(query)
            texts[table] = "\n".join(row[0] for row in rows)
        contacts = {row[0] for row in await connection.fetch(CONTACTS)}
    finally:
        await connection.close()
    sent = list(messages)
    codes = {code for message in sent for code in CODE.findall(message.text)}
    contacts |= {message.destination for message in sent} - {""}
    found = [f"a code in {place}" for place, text in texts.items() for code in codes if code in text]
    return found + [
        f"{contact} in {place}"
        for place, text in texts.items()
        if place not in TABLES_WITH_CONTACTS
        for contact in contacts
        if contact.lstrip("+") in text
    ]
