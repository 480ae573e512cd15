"""Codes and contacts that must not appear in the database or in logs."""

import re
from collections.abc import Iterable

import asyncpg

from pointbook_server.delivery.sender import Message

CODE = re.compile(r"[2-9A-HJ-NP-Z]{10}")
"""Codes of ten letters and digits, which do not occur by chance."""
TABLES_WITH_CONTACTS = {"customer_identifiers", "customer_claims"}
"""The tables that may contain a number or an address in clear."""
CONTENTS = """
    SELECT relname,
        format(
            $$SELECT coalesce(string_agg(concat_ws(E'\\n', %s), E'\\n'), '') FROM %I$$,
            string_agg(quote_ident(attname), ', '),
            relname
        )
    FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND attnum > 0 AND NOT attisdropped
        AND attname <> 'merchant_id'
    GROUP BY relname
"""
"""Queries for the text of each table, without merchant_id, which a caller for all merchants may choose at will."""
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
        for table, query in await connection.fetch(CONTENTS):
            texts[table] = await connection.fetchval(query)
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
