"""What the files of code tests share: codes that are issued, guessed and redeemed for a shop's customers."""

from typing import Any

from pointbook.v1 import redemption_pb2
from support.harness import Client, Service, Shop
from support.points import superuser
from support.redemption import customer_ref, validate_request

CODES = {"code_length": 10, "alphanumeric": True, "message_templates": {"": "$code"}}
"""Codes that nobody guesses by chance, and messages that are nothing but the code."""
WRONG = "0000000000"
"""What no code of letters and digits can be: it has zeros."""


async def issue(client: Client, shop: Shop, points: int = 100, **changes: Any) -> redemption_pb2.IssuedCode:
    """Ask for a code."""
    values: dict[str, Any] = {"customer": customer_ref(shop), "program_id": 1, "points": points}
    request = redemption_pb2.IssueValidationCodeRequest(**{**values, **changes})
    return (await client.redemption.IssueValidationCode(request)).issued_code


async def issued(service: Service, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, str]:
    """Have a code issued; answers its challenge, and the code as the customer reads it."""
    count = len(service.outbox.messages)
    answer = await issue(service.client, shop, points, **changes)
    (message,) = service.outbox.messages[count:]
    return answer.challenge_id, message.text


async def is_right(client: Client, shop: Shop, code: str, points: Any = 100, **changes: Any) -> bool:
    """Guess a code."""
    request = validate_request(shop, points, **{"validation_code": code, **changes})
    return (await client.redemption.ValidateRedemption(request)).redeemable


async def audit(service: Service, shop: Shop) -> list[tuple[str, ...]]:
    """What the audit tells of a merchant, in its order: action, outcome, customer; repeated events one by one."""
    query = """
        SELECT action, outcome, customer FROM validation_audit, generate_series(1, event_count)
        WHERE merchant_id = $1 ORDER BY at_ms, audit_id
    """
    async with superuser(service) as connection:
        return [tuple(row) for row in await connection.fetch(query, shop.merchant_id)]
