"""Key rotation on servers that are restarted one after the other."""

import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_code
from support.redemption import earn, redeem, redeem_request, validate_request
from support.refusals import refused
from support.servers import CODE_KEY, Service, server_settings
from support.shops import Shop
from support.unique_names import unique

NEW_KEY = base64.b64encode(b"n" * 32).decode()
OLD, NEW = {"k1": CODE_KEY}, {"k2": NEW_KEY}
STEPS = [(OLD, OLD | NEW), (OLD | NEW, NEW | OLD), (NEW | OLD, NEW | OLD)]
"""The new key is added last on all servers, and then moved to the first place."""
MOBILE, CALLED = "+8613812345678", "+8675512345678"
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop with codes and missed calls, and a customer with a mobile number."""
    channels = [redemption_pb2.VALIDATION_TYPE_SMS, MISSED_CALL]
    validation = {**CODE_SETTINGS, "channels": channels, "missed_call_number": CALLED}
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=validation)
    await earn(service.client, shop, 500)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await service.client.put_customer(shop.merchant_id, "c-1", mobile=MOBILE, buyers=buyers)
    yield shop
    service.clock.now_ms = NOW_MS


@asynccontextmanager
async def run_servers(service: Service, token: str, *all_keys: dict[str, str]) -> AsyncIterator[list[Client]]:
    """Run servers on the same database, each with its own keys."""
    async with AsyncExitStack() as stack:
        clients = []
        for keys in all_keys:
            senders = {Channel.SMS: service.outbox}
            settings = server_settings(code_keys=keys)
            server = Server(settings, service.database_url, senders=senders, clock=service.clock)
            await server.start()
            stack.push_async_callback(server.stop)
            client = Client(server.port, token)
            stack.push_async_callback(client.close)
            clients.append(client)
        yield clients


@pytest.mark.parametrize("both", STEPS, ids=["new last", "new first", "new first in all"])
@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backward"])
async def test_servers_with_old_and_new_keys_accept_each_others_codes(
    service: Service, shop: Shop, admin_token: str, both: tuple[dict[str, str], ...], direction: int
) -> None:
    """Codes, counters and missed calls of one server hold for the other."""
    async with run_servers(service, admin_token, *both[::direction]) as (one, other):
        # A code, its attempts and its cooldown.
        challenge = await issue_code(one, shop)
        code = service.outbox.messages[-1].text
        evidence = {"challenge_id": challenge.challenge_id}
        assert not (await issue_code(other, shop)).sent
        for _ in range(4):
            assert not await guess_code(other, shop, WRONG_CODE, **evidence)
        assert await guess_code(other, shop, code, **evidence)
        service.clock.move(60)
        assert (await issue_code(other, shop)).challenge_id == challenge.challenge_id
        assert not await guess_code(one, shop, code, **evidence)
        assert not await guess_code(one, shop, service.outbox.messages[-1].text, **evidence)

        # The third message to the number, and the first above the limit.
        assert (await issue_code(one, shop, 110)).sent
        for client in (one, other):
            found = await refused(issue_code(client, shop, 120))
            assert (found.reason, found.metadata["limit"]) == ("SEND_LIMIT_REACHED", "destination")
            assert found.retry_seconds == 540

        # A missed call.
        opened = await issue_code(one, shop, validation_type=MISSED_CALL)
        call = redemption_pb2.ConfirmMissedCallRequest(
            merchant_id=shop.merchant_id,
            caller_number=MOBILE,
            called_number=CALLED,
            provider_call_id=unique("call"),
            call_time=at(service.clock.now_ms),
        )
        assert (await other.redemption.ConfirmMissedCall(call)).challenge_id == opened.challenge_id
        assert (await redeem(one, redeem_request(shop, 100, challenge_id=opened.challenge_id))).points == 100


async def test_old_key_can_be_removed_when_no_code_is_signed_with_it(
    service: Service, shop: Shop, admin_token: str
) -> None:
    async with run_servers(service, admin_token, NEW | OLD, NEW) as (one, other):
        await issue_code(one, shop)
        code = service.outbox.messages[-1].text
        answer = await other.redemption.ValidateRedemption(validate_request(shop, 100, validation_code=code))

        assert answer.redeemable
        assert not (await issue_code(other, shop)).sent
