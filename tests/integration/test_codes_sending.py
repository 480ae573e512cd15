"""The destination and language of codes."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import identity_pb2, programs_pb2, redemption_pb2
from support.clients import Client
from support.clocks import NOW_MS
from support.codes import issue_code, read_audit
from support.redemption import customer_ref, earn, validate_request
from support.refusals import refused
from support.servers import Service
from support.shops import Shop

SMS = redemption_pb2.VALIDATION_TYPE_SMS
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
MOBILE, LANDLINE, TOLL_FREE = "+8613812345678", "+862112345678", "+18005551234"
PREMIUM_RATE, UNIVERSAL_ACCESS, PAGER = "+19005551234", "+445555123456", "+447640123456"
VOIP, PERSONAL, MOBILE_OR_FIXED_LINE = "+815012345678", "+447011234567", "+12025550123"
CALLED = "+862187654321"
"""The number to call for a missed call."""


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes, with a buyer who has 500 points."""
    await put_program(service.client, shop)
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def put_program(client: Client, shop: Shop, **validation: Any) -> None:
    """Put the shop's program with some validation settings."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=validation)


async def put_customer(client: Client, shop: Shop, **changes: Any) -> None:
    """Put the buyer as a customer with contacts."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "c-1", buyers=buyers, **changes)


# Numbers.


@pytest.mark.parametrize(
    ("mobile", "number_type"),
    [
        (LANDLINE, "FIXED_LINE"),
        (TOLL_FREE, "TOLL_FREE"),
        (PREMIUM_RATE, "PREMIUM_RATE"),
        (UNIVERSAL_ACCESS, "UAN"),
        (PAGER, "PAGER"),
        (VOIP, "VOIP"),
        (PERSONAL, "PERSONAL_NUMBER"),
    ],
)
async def test_no_sms_is_sent_to_numbers_of_other_types(
    service: Service, client: Client, shop: Shop, mobile: str, number_type: str
) -> None:
    await put_customer(client, shop, mobile=mobile)
    before = len(service.outbox.messages)
    for validation_type in (SMS, redemption_pb2.VALIDATION_TYPE_UNSPECIFIED):
        await put_program(client, shop, channels=[SMS])
        found = await refused(issue_code(client, shop, validation_type=validation_type))
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_DESTINATION")
        assert found.metadata == {"status_code": "860", "validation_type": "SMS", "number_type": number_type}
        assert found.retry_seconds is None
    answer = await client.redemption.ValidateRedemption(validate_request(shop, 100, issue_otp=True))

    assert (answer.redeemable, answer.status.code, answer.HasField("issued_code")) == (True, 800, False)
    ((code, metadata),) = [(warning.code, dict(warning.metadata)) for warning in answer.warnings]
    assert (code, metadata) == (
        876,
        {"cause": "NO_DESTINATION", "validation_type": "SMS", "number_type": number_type},
    )
    assert len(service.outbox.messages) == before
    assert await read_audit(service, shop) == [("ISSUE", "NO_DESTINATION", "customer c-1")] * 3


@pytest.mark.parametrize("mobile", [MOBILE, MOBILE_OR_FIXED_LINE, "+85291236001"])
async def test_sms_are_sent_to_mobile_numbers(service: Service, client: Client, shop: Shop, mobile: str) -> None:
    """Some regions number fixed lines and mobile phones alike."""
    await put_customer(client, shop, mobile=mobile)

    assert (await issue_code(client, shop, validation_type=SMS)).sent
    assert service.outbox.messages[-1].destination == mobile


async def test_program_may_choose_the_number_types_for_sms(service: Service, client: Client, shop: Shop) -> None:
    await put_program(client, shop, sms_number_types=[programs_pb2.PHONE_NUMBER_TYPE_VOIP], channels=[SMS])
    await put_customer(client, shop, mobile=VOIP)
    assert (await issue_code(client, shop)).sent
    assert service.outbox.messages[-1].destination == VOIP

    await earn(client, shop, 500, "other")
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="other")]
    await client.put_customer(shop.merchant_id, "c-2", mobile=MOBILE, buyers=buyers)
    found = await refused(issue_code(client, shop, customer=customer_ref(shop, "other")))
    assert found.metadata["number_type"] == "MOBILE"


async def test_next_channel_is_used_if_the_number_gets_no_sms(service: Service, client: Client, shop: Shop) -> None:
    await put_customer(client, shop, mobile=LANDLINE, email="buyer@example.com")

    assert (await issue_code(client, shop)).destination == "b***@example.com"
    assert service.outbox.messages[-1].destination == "buyer@example.com"
    assert (await refused(issue_code(client, shop, 110, validation_type=SMS))).reason == "NO_DESTINATION"


async def test_missed_call_may_come_from_any_phone(client: Client, shop: Shop) -> None:
    await put_program(client, shop, channels=[SMS, MISSED_CALL], missed_call_number=CALLED)
    await put_customer(client, shop, mobile=LANDLINE)

    assert (await issue_code(client, shop)).missed_call_number == CALLED
    assert (await issue_code(client, shop, validation_type=MISSED_CALL)).missed_call_number == CALLED


# Languages.

TEMPLATES = {"zh-Hant": "zh-Hant $code", "zh": "zh $code", "pt-BR": "pt-BR $code", "": "default $code"}


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("zh-Hant-TW", "zh-Hant"),
        ("zh-Hant", "zh-Hant"),
        ("ZH-hant-tw", "zh-Hant"),
        ("zh_Hant_HK", "zh-Hant"),
        ("zh-Hant-TW-x-shop", "zh-Hant"),
        ("zh-TW", "zh"),
        ("zh-Hans-CN", "zh"),
        ("pt-BR-u-nu-latn", "pt-BR"),
        ("pt-PT", "default"),
        ("pt", "default"),
        ("de", "default"),
        ("", "default"),
    ],
)
async def test_message_is_in_the_best_matching_language(
    service: Service, client: Client, shop: Shop, language: str, expected: str
) -> None:
    await put_program(client, shop, message_templates=TEMPLATES)
    await put_customer(client, shop, mobile=MOBILE, language=language)
    await issue_code(client, shop)

    assert service.outbox.messages[-1].text.split()[0] == expected
