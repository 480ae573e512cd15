"""One-time codes of a shop's customers: issuing, guessing and the audit."""

from collections.abc import Sequence
from typing import Any

from pointbook.v1 import identity_pb2, redemption_pb2
from support.clients import Client
from support.connections import superuser
from support.redemption import customer_ref, earn, validate_request
from support.servers import Service
from support.shops import Shop

CODE_SETTINGS = {"code_length": 10, "alphanumeric": True, "message_templates": {"": "$code"}}
"""Codes that cannot be guessed by chance, and messages with nothing but the code."""
WRONG_CODE = "0000000000"
"""A wrong code: codes of letters and digits have no zeros."""


async def add_customers(client: Client, shop: Shop, names: Sequence[str]) -> None:
    """Add a program that sends codes, and customers with points and a number."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    for number, name in enumerate(names):
        await earn(client, shop, 500, name)
        buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id=name)]
        mobile = f"+861381234{number:04}"
        await client.put_customer(shop.merchant_id, name, mobile=mobile, external_id=name, buyers=buyers)


async def issue_code(client: Client, shop: Shop, points: int = 100, **changes: Any) -> redemption_pb2.IssuedCode:
    """Issue a code or open a challenge for a missed call."""
    values: dict[str, Any] = {"customer": customer_ref(shop), "program_id": 1, "points": points}
    request = redemption_pb2.IssueValidationCodeRequest(**{**values, **changes})
    return (await client.redemption.IssueValidationCode(request)).issued_code


async def issue_and_read_code(service: Service, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, str]:
    """Issue a code, and return its challenge_id and the code that was sent."""
    count = len(service.outbox.messages)
    answer = await issue_code(service.client, shop, points, **changes)
    (message,) = service.outbox.messages[count:]
    return answer.challenge_id, message.text


async def guess_code(client: Client, shop: Shop, code: str, points: Any = 100, **changes: Any) -> bool:
    """Return whether a code is right for a redemption."""
    request = validate_request(shop, points, **{"validation_code": code, **changes})
    return (await client.redemption.ValidateRedemption(request)).redeemable


async def read_audit(service: Service, shop: Shop) -> list[tuple[str, ...]]:
    """Return a merchant's audit in order: action, outcome and customer.

    A repeated event is returned as often as it happened.
    """
    query = """
        SELECT action, outcome, customer FROM validation_audit, generate_series(1, event_count)
        WHERE merchant_id = $1 ORDER BY at_ms, audit_id
    """
    async with superuser(service) as connection:
        return [tuple(row) for row in await connection.fetch(query, shop.merchant_id)]
