"""What must never be seen anywhere: codes that were sent, and where they and other messages go."""

import re
from collections.abc import Iterable

import asyncpg

from pointbook_server.delivery.sender import Message

CODE = re.compile(r"[2-9A-HJ-NP-Z]{10}")
"""The codes of ten letters and digits, which cannot turn up anywhere by chance."""
PLACES_OF_CONTACTS = {"customer_identifiers", "customer_claims"}
"""The tables in which a number or an address may stand in clear."""
TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
CONTACTS = """
    SELECT DISTINCT unnest(array_remove(ARRAY[value, written], NULL)) FROM customer_identifiers
    WHERE kind IN ('MOBILE', 'EMAIL')
"""


async def leaks(database_url: str, messages: Iterable[Message], logs: str) -> list[str]:
    """Tell what of some messages, and of all customers' contacts, stands in a database or in logs, and where."""
    connection = await asyncpg.connect(database_url)
    try:
        places = {"logs": logs}
        for (table,) in await connection.fetch(TABLES):
            # Under whatever name of a merchant a caller of all merchants makes up.
            query = f"SELECT (to_jsonb(t) - 'merchant_id')::text FROM \"{table}\" AS t"  # noqa: S608 - a table of ours
            rows = await connection.fetch(query)
            places[table] = "\n".join(row[0] for row in rows)
        contacts = {row[0] for row in await connection.fetch(CONTACTS)}
    finally:
        await connection.close()
    sent = list(messages)
    codes = {code for message in sent for code in CODE.findall(message.text)}
    contacts |= {message.destination for message in sent} - {""}
    found = [f"a code in {place}" for place, text in places.items() for code in codes if code in text]
    return found + [
        f"{contact} in {place}"
        for place, text in places.items()
        if place not in PLACES_OF_CONTACTS
        for contact in contacts
        if contact.lstrip("+") in text
    ]
