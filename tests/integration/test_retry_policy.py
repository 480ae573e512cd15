"""Calls under gRPC's standard retry policy: which errors a client retries."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.delivery.sender import DeliveryFailedError
from pointbook_server.programs.model import Channel
from pointbook_server.redemption.service import RedemptionService
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS
from support.codes import issue_code
from support.outbox import Outbox
from support.redemption import earn
from support.refusals import refused
from support.servers import CODE_KEY, Service, server_settings
from support.shops import Shop

SMS, EMAIL = redemption_pb2.VALIDATION_TYPE_SMS, redemption_pb2.VALIDATION_TYPE_EMAIL
ATTEMPTS = 4
POLICY = {
    "maxAttempts": ATTEMPTS,
    "initialBackoff": "0.01s",
    "maxBackoff": "0.1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
OPTIONS = [
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": POLICY}]})),
]
MOBILE, LANDLINE = "+8613812345678", "+862112345678"


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes by SMS, with a buyer who has 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation={"channels": [SMS]})
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def put_customer(service: Service, shop: Shop, mobile: str) -> None:
    """Register the buyer as a customer with a number."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await service.client.put_customer(shop.merchant_id, "c-1", mobile=mobile, buyers=buyers)


@asynccontextmanager
async def retrying_client(service: Service, token: str, sender: Outbox, **settings: Any) -> AsyncIterator[Client]:
    """Run a server with one sender, and a client with the retry policy."""
    server = Server(
        server_settings(**settings), service.database_url, senders={Channel.SMS: sender}, clock=service.clock
    )
    await server.start()
    client = Client(server.port, token, OPTIONS)
    try:
        yield client
    finally:
        await client.close()
        await server.stop()


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The merchants of the IssueValidationCode calls that reached a server."""
    calls: list[str] = []
    issue_code = RedemptionService.issue_code_for

    async def counted(self: RedemptionService, request: Any, assessment: Any, actor: str) -> Any:
        calls.append(request.merchant_id)
        return await issue_code(self, request, assessment, actor)

    monkeypatch.setattr(RedemptionService, "issue_code_for", counted)
    return calls


@pytest.mark.parametrize(
    ("mobiles", "changes", "code_keys", "reason"),
    [
        ([], {}, {"k1": CODE_KEY}, "NO_DESTINATION"),
        ([LANDLINE], {}, {"k1": CODE_KEY}, "NO_DESTINATION"),
        ([MOBILE], {"validation_type": EMAIL}, {"k1": CODE_KEY}, "CHANNEL_NOT_ENABLED"),
        (["+8613812345679", MOBILE], {}, {"k1": CODE_KEY}, "CONTACT_CHANGED"),
        ([MOBILE], {}, {}, "KEY_NOT_CONFIGURED"),
    ],
    ids=["no contact", "a landline", "a channel that is off", "a changed contact", "no key"],
)
async def test_permanent_errors_are_not_retried(
    service: Service,
    admin_token: str,
    shop: Shop,
    arrived: list[str],
    *,
    mobiles: list[str],
    changes: dict[str, Any],
    code_keys: dict[str, str],
    reason: str,
) -> None:
    for mobile in mobiles:
        await put_customer(service, shop, mobile)
    sender = Outbox(needs_destination=True)
    async with retrying_client(service, admin_token, sender, code_keys=code_keys) as client:
        status = await refused(issue_code(client, shop, **changes))

    assert status.reason == reason
    assert arrived == [shop.merchant_id]
    assert sender.messages == []


async def test_temporary_errors_are_retried(service: Service, admin_token: str, shop: Shop, arrived: list[str]) -> None:
    """The provider is unreachable for two attempts; the caller does not notice."""
    await put_customer(service, shop, MOBILE)

    class RestartingProvider(Outbox):
        async def send(self, message: Any) -> None:
            self.error = DeliveryFailedError("unreachable") if len(arrived) < 3 else None
            await super().send(message)

    sender = RestartingProvider(needs_destination=True)
    async with retrying_client(service, admin_token, sender) as client:
        assert (await issue_code(client, shop)).sent

    assert arrived == [shop.merchant_id] * 3
    assert len(sender.messages) == 1
