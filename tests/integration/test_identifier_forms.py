"""Written forms of identifiers: look-up, comparison and sending."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS, guess_code, issue_and_read_code, issue_code
from support.customers import (
    CREATED,
    TAKEN,
    TYPE_EMAIL,
    TYPE_MOBILE,
    contacts_of_buyer,
    customer_update,
    find_customer_id,
    skipped_causes,
    update_outcome,
)
from support.redemption import customer_ref, earn, redeem, redeem_request, validate_request, violation_codes
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
VALIDATION = {**CODE_SETTINGS, "required": True, "channels": [redemption_pb2.VALIDATION_TYPE_SMS, EMAIL]}
CALLED = "+862112345678"
ADDRESSES = [
    "stra\u00df@example.com",
    "Ada.Lovelace@example.com",
    "\u0130.\u017f.\ufb01@example.com",
    "\uff21da@example.com",
    "\u039f\u0394\u039f\u03a3@example.com",
    "cafe\u0301@example.com",
    "a@b\u00fccher.example",
    "a@xn--bcher-kva.example",
    "ada.@docomo.ne.jp",
    "a..b@docomo.ne.jp",
    ".A..b.@t.vodafone.ne.jp",
]
SUBSCRIBERS = [
    # The form in responses and for sending.
    {"+5491123456789": "+5491123456789", "+541123456789": "+541123456789", "+54 11 15 2345 6789": "+5491123456789"},
    {"+5215512345678": "+525512345678", "+525512345678": "+525512345678", "+52 044 55 1234 5678": "+525512345678"},
    {"+551187654321": "+5511987654321", "+5511987654321": "+5511987654321"},
    {"+55 51 6765-4321": "+5551967654321", "+5551967654321": "+5551967654321"},
]
FORMS = [(forms, written) for forms in SUBSCRIBERS for written in forms]


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program requires codes, with a buyer who has 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=VALIDATION)
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def put_customer(
    client: Client, shop: Shop, customer_id: str = "c-1", **identifiers: Any
) -> customers_pb2.Customer:
    """Put a customer who owns the buyer of the same number."""
    buyer_id = "buyer" if customer_id == "c-1" else f"buyer of {customer_id}".replace(" ", "-")
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)]
    return await client.put_customer(shop.merchant_id, customer_id, buyers=buyers, **identifiers)


# E-mail addresses.


@pytest.mark.parametrize("address", ADDRESSES)
async def test_a_code_is_sent_to_the_address_as_written(service: Service, shop: Shop, address: str) -> None:
    stored = await put_customer(service.client, shop, email=address)
    await issue_and_read_code(service, shop, validation_type=EMAIL)

    assert (stored.email, service.outbox.messages[-1].destination) == (address, address)
    assert (await service.client.customer(shop.merchant_id, "c-1")).email == address


async def test_an_address_is_found_in_any_case_but_no_other_folding(client: Client, shop: Shop) -> None:
    await put_customer(client, shop, "c-1", email="Stra\u00dfe@Example.com")
    await put_customer(client, shop, "c-2", email="strasse@example.com")
    await put_customer(client, shop, "c-3", email="CAFE\u0301@b\u00fccher.example")
    await put_customer(client, shop, "c-4", email="\ufb01@example.com")

    for written, owner in {
        "stra\u00dfe@example.com": "c-1",
        "STRA\u1e9eE@EXAMPLE.COM": "c-1",
        "strasse@example.com": "c-2",
        "STRASSE@example.com": "c-2",
        "caf\u00e9@XN--BCHER-KVA.example": "c-3",
        "cafe@b\u00fccher.example": "",
        "fi@example.com": "",
        "\ufb01@EXAMPLE.com": "c-4",
    }.items():
        assert (written, await find_customer_id(client, shop, email=written)) == (written, owner)


async def test_another_case_of_an_address_is_taken(client: Client, shop: Shop) -> None:
    await put_customer(client, shop, email="Ada@example.com")
    taken = await refused(put_customer(client, shop, "c-2", email="aDA@Example.com"))
    applied = customer_update(shop, "other", kind=CREATED, email="ADA@example.com")
    left_out = await client.customers.ApplyCustomerUpdate(applied)

    assert (taken.reason, set(taken.fields)) == ("IDENTIFIER_TAKEN", {"customer.email"})
    assert skipped_causes(left_out) == {TYPE_EMAIL: TAKEN}
    twice = [
        identity_pb2.SourceIdentity(source=identity_pb2.USER_SOURCE_LINE, identifier_type=TYPE_EMAIL, value=address)
        for address in ("Ada@example.com", "ada@example.com")
    ]
    assert set((await refused(put_customer(client, shop, source_identities=twice))).fields) == {
        "customer.source_identities[1]"
    }


async def test_a_new_written_form_of_an_address_starts_no_pause(service: Service, shop: Shop) -> None:
    """The open code stays valid, and the next code goes to the new form."""
    client = service.client
    await put_customer(client, shop, email="Ada@example.com")
    _, code = await issue_and_read_code(service, shop, validation_type=EMAIL)

    assert (await put_customer(client, shop, email="ADA@Example.com")).email == "ADA@Example.com"
    assert await guess_code(client, shop, code)
    applied = await client.customers.ApplyCustomerUpdate(customer_update(shop, email=" ada@example.com\u200b"))
    assert (update_outcome(applied), skipped_causes(applied), (await contacts_of_buyer(client, shop))[1]) == (
        "APPLIED",
        {},
        "ada@example.com",
    )
    assert await guess_code(client, shop, code)
    await issue_and_read_code(service, shop, 50, validation_type=EMAIL)
    assert service.outbox.messages[-1].destination == "ada@example.com"


async def test_a_claimed_contact_has_the_written_form_of_its_claimant(service: Service, shop: Shop) -> None:
    client = service.client
    await put_customer(client, shop, "c-2", email="ada@example.com", mobile="+541123456789")
    applied = customer_update(shop, "claimant", kind=CREATED, email="ADA@Example.com", mobile="+5491123456789")
    assert skipped_causes(await client.customers.ApplyCustomerUpdate(applied)) == {
        TYPE_EMAIL: TAKEN,
        TYPE_MOBILE: TAKEN,
    }
    await put_customer(client, shop, "c-2")

    assert await contacts_of_buyer(client, shop, "claimant") == ("+5491123456789", "ADA@Example.com")


async def test_written_forms_of_an_address_share_its_send_limit(client: Client, shop: Shop) -> None:
    for points, address in enumerate(("ada@example.com", "Ada@example.com", "ADA@example.com"), start=1):
        await put_customer(client, shop, email=address)
        assert (await issue_code(client, shop, points, validation_type=EMAIL)).sent
    await put_customer(client, shop, email="aDa@example.com")

    assert (await refused(issue_code(client, shop, 4, validation_type=EMAIL))).reason == "SEND_LIMIT_REACHED"


async def test_source_identities_are_returned_as_written(client: Client, shop: Shop) -> None:
    known = identity_pb2.SourceIdentity(
        source=identity_pb2.USER_SOURCE_LINE, identifier_type=TYPE_EMAIL, value="Stra\u00dfe@example.com"
    )
    stored = await put_customer(client, shop, source_identities=[known])
    await client.put_group(
        shop.merchant_id, "g", primary_customer_id="c-1", members=[{"customer_id": "c-1", "can_redeem": True}]
    )
    group = identity_pb2.UserGroupRef(
        primary_user_source=known.source,
        primary_user_identifier_type=TYPE_EMAIL,
        primary_user_identifier_value=" STRA\u1e9eE@example.com\u200b",
    )

    assert list(stored.source_identities) == [known]
    assert await violation_codes(client, validate_request(shop, user_group2=group)) == await violation_codes(
        client, validate_request(shop, user_group2={"id": "g"})
    )


# Phone numbers.


@pytest.mark.parametrize(("forms", "written"), FORMS)
async def test_every_form_of_a_number_finds_the_same_customer(
    service: Service, client: Client, shop: Shop, forms: dict[str, str], written: str
) -> None:
    assert (await put_customer(client, shop, mobile=written)).mobile == forms[written]
    await issue_and_read_code(service, shop)
    assert service.outbox.messages[-1].destination == forms[written]

    for number, form in enumerate(forms):
        assert await find_customer_id(client, shop, mobile=form) == "c-1"
        request = redemption_pb2.GetCustomerPointsRequest(customer=customer_ref(shop, mobile=form), program_id=1)
        assert (await client.redemption.GetCustomerPoints(request)).active_points == 500
        assert (await refused(put_customer(client, shop, "c-2", mobile=form))).reason == "IDENTIFIER_TAKEN"
        applied = customer_update(shop, f"other-{number}", kind=CREATED, mobile=form.replace(" ", ""))
        assert skipped_causes(await client.customers.ApplyCustomerUpdate(applied)) == {TYPE_MOBILE: TAKEN}


@pytest.mark.parametrize(
    ("region", "stored", "national"),
    [
        ("AR", "+541123456789", "011 15-2345-6789"),
        ("MX", "+525512345678", "044 55 1234 5678"),
        ("BR", "+5511987654321", "(11) 8765-4321"),
    ],
)
async def test_national_forms_are_read_by_the_region_of_the_program(
    client: Client, shop: Shop, region: str, stored: str, national: str
) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, default_region=region)
    await put_customer(client, shop, mobile=stored)

    assert await violation_codes(client, validate_request(shop, customer=customer_ref(shop, mobile=national))) == []
    answer = await redeem(client, redeem_request(shop, customer=customer_ref(shop, mobile=f"\u202a{national}\u202c")))
    assert answer.points == 10


@pytest.mark.parametrize(
    ("without", "mobile"),
    [
        ("+551133334444", "+5511933334444"),
        ("+551123456789", "+5511923456789"),
        ("+551178123456", "+5511978123456"),
    ],
)
async def test_brazils_trunked_radio_numbers_get_no_ninth_digit(
    client: Client, shop: Shop, without: str, mobile: str
) -> None:
    await put_customer(client, shop, "c-1", mobile=without)
    await put_customer(client, shop, "c-2", mobile=mobile)

    assert (await client.customer(shop.merchant_id, "c-1")).mobile == without
    assert await find_customer_id(client, shop, mobile=without) == "c-1"
    assert await find_customer_id(client, shop, mobile=mobile) == "c-2"


async def test_a_new_written_form_of_a_number_starts_no_pause(service: Service, shop: Shop) -> None:
    client = service.client
    await put_customer(client, shop, mobile="+541123456789")
    assert (await put_customer(client, shop, mobile="+5491123456789")).mobile == "+5491123456789"
    _, code = await issue_and_read_code(service, shop)
    assert service.outbox.messages[-1].destination == "+5491123456789"

    applied = await client.customers.ApplyCustomerUpdate(customer_update(shop, mobile="+541123456789"))
    assert (update_outcome(applied), await contacts_of_buyer(client, shop)) == ("APPLIED", ("+541123456789", ""))
    assert await guess_code(client, shop, code)
    await put_customer(client, shop, mobile="+54 11 15 2345 6789")
    await issue_and_read_code(service, shop, 50)
    assert service.outbox.messages[-1].destination == "+5491123456789"


@pytest.mark.parametrize(
    ("caller", "called"),
    [
        (("+5491123456789", "+541123456789"), (CALLED, CALLED)),
        (("+541123456789", "+5491123456789"), (CALLED, CALLED)),
        (("+525512345678", "+5215512345678"), ("+528112345678", "+5218112345678")),
        (("+5215512345678", "+525512345678"), ("+5218112345678", "+528112345678")),
        (("+551187654321", "+5511987654321"), ("+5511986543210", "+551186543210")),
        (("+5511987654321", "+551187654321"), ("+551186543210", "+5511986543210")),
        (("+5491123456789", "\u202a+54 9 11 2345\u20116789\u202c"), ("+5491143210000", "+541143210000")),
        (("+5491123456789", "+5491123456789"), ("+541143210000", "+5491143210000")),
    ],
)
async def test_a_missed_call_confirms_its_challenge_in_every_form(
    client: Client, shop: Shop, caller: tuple[str, str], called: tuple[str, str]
) -> None:
    validation = {**VALIDATION, "channels": [MISSED_CALL], "missed_call_number": called[0]}
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=validation)
    await put_customer(client, shop, mobile=caller[0])
    challenge = await issue_code(client, shop)
    assert challenge.missed_call_number == called[0]

    call = redemption_pb2.ConfirmMissedCallRequest(
        merchant_id=shop.merchant_id,
        caller_number=caller[1],
        called_number=called[1],
        provider_call_id=unique("call"),
        call_time=at(NOW_MS + 1),
    )
    assert (await client.redemption.ConfirmMissedCall(call)).challenge_id == challenge.challenge_id
    proof = {"challenge_id": challenge.challenge_id, "validation_type": MISSED_CALL}
    assert await violation_codes(client, validate_request(shop, 100, **proof)) == []


# Pasted identifiers.


@pytest.mark.parametrize(
    ("name", "clean", "pasted"),
    [
        ("mobile", "+85291236001", "\u202a+852\u00a09123\u20116001\u202c"),
        ("mobile", "+85291236002", "\uff0b\uff18\uff15\uff12\uff19\uff11\uff12\uff13\uff16\uff10\uff10\uff12"),
        ("email", "ada@example.com", "\u200bada@example.com\u00a0\r\n"),
        ("external_id", "crm-17", " crm\u200b-17\ufeff"),
        ("card_number", "4710815", "\u2066\uff14\uff17\uff11\uff10815\u2069"),
        ("card_external_id", "Card-1", "Card-\u00ad1\t"),
    ],
)
async def test_pasted_identifiers_are_found_and_stored_without_invisible_characters(
    client: Client, shop: Shop, name: str, clean: str, pasted: str
) -> None:
    fields: dict[str, Any] = {
        f"{name}s" if name.startswith("card") else name: [pasted] if name.startswith("card") else pasted
    }
    customer = await put_customer(client, shop, **fields)

    assert clean in {customer.mobile, customer.email, customer.external_id, *customer.card_numbers} | {
        *customer.card_external_ids
    }
    for written in (clean, pasted, f" {clean}\u200b"):
        assert await find_customer_id(client, shop, **{name: written}) == "c-1"
        points = redemption_pb2.GetCustomerPointsRequest(customer=customer_ref(shop, **{name: written}), program_id=1)
        assert (await client.redemption.GetCustomerPoints(points)).active_points == 500


@pytest.mark.parametrize(
    "identifier",
    [
        {"email": "a@example.com\nb@example.com"},
        {"mobile": "+8613800000000\n+8613900000000"},
        {"card_number": "47 11"},
        {"external_id": "\u200b"},
        {"external_id": "a\u0000b"},
    ],
)
async def test_control_characters_inside_a_value_make_it_invalid(
    client: Client, shop: Shop, identifier: dict[str, str]
) -> None:
    ref = identity_pb2.CustomerRef(**identifier)  # type: ignore[arg-type] # names
    request = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer=ref)
    found = await refused(client.customers.GetCustomer(request))

    assert (found.reason, set(found.fields)) == ("INVALID_FIELDS", {f"customer.{next(iter(identifier))}"})
