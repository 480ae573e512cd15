"""Identifiers, customer webhooks and tombstones: the pure rules."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointbook_server.customers.model import (
    NEVER,
    BuyerState,
    CannotReceiveError,
    Customer,
    CustomerUpdate,
    Identifier,
    IdentifierKind,
    Stamp,
    UpdateKind,
    format_stamp,
    parse_stamp,
)
from pointbook_server.customers.rules import newest_stamps, normalize_identifier, read_identifier, stated_contacts
from pointbook_server.customers.tombstones import Tombstones
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.reasons import Reason

BUYER = AccountKey("s", "b")


def update(**changes: object) -> CustomerUpdate:
    """Return a customer update."""
    values: dict[str, object] = {
        "event_id": "e",
        "merchant_id": "m",
        "buyer": BUYER,
        "kind": UpdateKind.UPDATED,
        "mobile": None,
        "email": None,
        "updated_at_ms": 1_000,
    }
    return CustomerUpdate(**(values | changes))  # type: ignore[arg-type] # each is of its field's type


@pytest.mark.parametrize(
    ("written", "region", "expected"),
    [
        ("+8613800000000", "", "+8613800000000"),
        ("+86 138-0000 (0000)", "", "+8613800000000"),
        ("13800000000", "CN", "+8613800000000"),
        ("+12025550123", "CN", "+12025550123"),
        ("0171 2345678", "DE", "+491712345678"),
        ("(010) 62770334", "CN", "+861062770334"),
        ("13800000000", "", None),
        ("008613800000000", "", None),
        ("+86138000000001", "", None),
        ("+8613800000000x5", "", None),
        ("+8613800000000;ext=5", "", None),
        ("+1 800 FLOWERS", "", None),
        ("tel:+8613800000000", "", None),
        (" +8613800000000\n", "", "+8613800000000"),
        ("+\u0668\u0666\u0661\u0663\u0668\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660", "", "+8613800000000"),
        ("5215512345678", "MX", "+525512345678"),
        ("+5491123456789", "", "+541123456789"),
        ("+", "", None),
        ("", "CN", None),
        ("13800000000", "XX", None),
        ("+" + "1" * 40, "", None),
        ("+8613800000000" + " " * 19 + "1", "", None),
        ("+8613800000000" + " " * 1_000, "", None),
    ],
)
def test_mobile_numbers_are_normalized_to_e164(written: str, region: str, expected: str | None) -> None:
    assert normalize_identifier(IdentifierKind.MOBILE, written, region) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Ada.Lovelace@Example.COM", "ada.lovelace@example.com"),
        ("ÄDA@example.com", "äda@example.com"),
        ("a@BÜCHER.example", "a@bücher.example"),
        ("a@xn--bcher-kva.example", "a@bücher.example"),
        ("strasse@straße.de", "strasse@straße.de"),
        ("a+b@example.com", "a+b@example.com"),
        ("unknown", None),
        ("", None),
        ("a@b", None),
        ("a@@example.com", None),
        ("Ada <a@example.com>", None),
        ("a@example.com\r\nBcc: b@example.com", None),
        ("a@[127.0.0.1]", None),
        ("a\x00@example.com", None),
        (f"a@{'b' * 250}.com", None),
    ],
)
def test_email_addresses_are_compared_in_lower_case_and_idna(written: str, expected: str | None) -> None:
    assert normalize_identifier(IdentifierKind.EMAIL, written) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("aB-1", "aB-1"),
        (" aB-1\t\r\n", "aB-1"),
        ("\ufeffaB\u200b-\u20601\u202c", "aB-1"),
        ("\uff14\uff12", "42"),
        ("\u06f4\u06f2", "42"),
        ("", None),
        (" \u200b", None),
        ("a b", None),
        ("a\nb", None),
        ("é", None),
        ("\uff21", None),
        ("a" * 65, None),
    ],
)
def test_other_identifiers_are_compared_exactly_but_for_invisible_characters(value: str, expected: str | None) -> None:
    for kind in (
        IdentifierKind.EXTERNAL_ID,
        IdentifierKind.CARD_NUMBER,
        IdentifierKind.CARD_EXTERNAL_ID,
        IdentifierKind.CUSTOMER_ID,
    ):
        assert normalize_identifier(kind, value) == expected


def test_an_identifier_is_compared_by_its_value_alone() -> None:
    one, other = (read_identifier(IdentifierKind.EMAIL, address) for address in ("Ada@example.com", "aDA@example.com"))
    assert one is not None
    assert other is not None
    assert (one, hash(one)) == (other, hash(other))
    assert (one.written_form, other.written_form) == ("Ada@example.com", "aDA@example.com")
    customer = Customer("m", "c", (one,))
    assert customer.own_values(IdentifierKind.EMAIL) == ["ada@example.com"]
    assert customer.own_written_forms(IdentifierKind.EMAIL) == ["Ada@example.com"]
    assert [new.written_form for new in customer.rewritten([other])] == ["aDA@example.com"]
    assert customer.rewritten([one]) == set()
    assert customer.rewritten([Identifier(IdentifierKind.EMAIL, "b@example.com")]) == set()


def test_argentinas_nine_is_part_of_the_written_form_only() -> None:
    with_nine, without = (
        read_identifier(IdentifierKind.MOBILE, number) for number in ("+5491123456789", "+541123456789")
    )
    assert with_nine is not None
    assert without is not None
    assert with_nine == without
    assert [new.written_form for new in Customer("m", "c", (with_nine,)).rewritten([without])] == ["+541123456789"]
    assert [new.written_form for new in Customer("m", "c", (without,)).rewritten([with_nine])] == ["+5491123456789"]


@given(
    st.sampled_from([IdentifierKind.MOBILE, IdentifierKind.EMAIL]),
    st.text(max_size=40),
    st.sampled_from(["", "CN", "DE"]),
)
def test_normalizing_is_idempotent_and_never_fails(kind: IdentifierKind, value: str, region: str) -> None:
    once = normalize_identifier(kind, value, region)
    assert once is None or normalize_identifier(kind, once) == once


@given(
    st.integers(0, 2**53), st.integers(0, 3), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)
)
def test_stamps_survive_formatting_and_parsing(at_ms: int, rank: int, event_id: str) -> None:
    stamp = Stamp(at_ms, rank, event_id)
    assert parse_stamp(format_stamp(stamp)) == stamp
    assert parse_stamp(format_stamp(NEVER)) == NEVER < stamp


def test_contacts_stated_by_an_update() -> None:
    contacts = {"mobile": "+8613800000000", "email": "unknown"}
    assert stated_contacts(update(**contacts)) == {IdentifierKind.MOBILE: "+8613800000000", IdentifierKind.EMAIL: None}
    assert stated_contacts(update(email=" Stra\u00dfe@Example.com\u200b")) == {
        IdentifierKind.EMAIL: "Stra\u00dfe@Example.com"
    }
    assert stated_contacts(update(mobile="")) == {IdentifierKind.MOBILE: ""}
    assert stated_contacts(update()) == {}
    assert stated_contacts(update(kind=UpdateKind.DELETED, **contacts)) == {
        IdentifierKind.MOBILE: "",
        IdentifierKind.EMAIL: "",
    }
    assert stated_contacts(update(kind=UpdateKind.REDACTED, **contacts)) == {}


def test_updates_of_the_same_time_are_ordered_by_kind_and_event_id() -> None:
    stamps = [update(kind=kind, event_id="z").stamp for kind in UpdateKind]
    assert stamps == sorted(stamps)
    assert update(event_id="b").stamp > update(event_id="a").stamp
    assert update(updated_at_ms=1_001).stamp > stamps[-1]


def test_the_digest_covers_every_field() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"buyer": AccountKey("sb", "")},
        {"kind": UpdateKind.CREATED},
        {"mobile": ""},
        {"email": ""},
        {"updated_at_ms": 1_001},
    ]
    assert len({update(**change).digest for change in changes}) == len(changes)
    assert update(event_id="f").digest == update().digest


def test_the_newest_stamp_of_all_buyers_counts() -> None:
    one = BuyerState("c", {IdentifierKind.MOBILE: Stamp(5, 1, "a"), IdentifierKind.EMAIL: NEVER})
    two = BuyerState("c", {IdentifierKind.MOBILE: Stamp(7, 1, "b"), IdentifierKind.EMAIL: Stamp(3, 1, "c")})

    assert newest_stamps([one, two]) == {
        IdentifierKind.MOBILE: Stamp(7, 1, "b"),
        IdentifierKind.EMAIL: Stamp(3, 1, "c"),
    }
    assert two.without_stamps_until(3).as_of == {IdentifierKind.MOBILE: Stamp(7, 1, "b"), IdentifierKind.EMAIL: NEVER}
    assert newest_stamps([]) == {IdentifierKind.MOBILE: NEVER, IdentifierKind.EMAIL: NEVER}


def test_the_first_key_signs_tombstones_and_all_keys_verify() -> None:
    parts = [b"pointbook.tombstone.v1", b"m", b"s", b"b"]
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    new, old = (hmac.new(key, message, hashlib.sha256).digest() for key in (b"new", b"old"))
    tombstones = Tombstones([b"new", b"old"])

    assert tombstones.digests("m", BUYER) == [new, old]
    assert tombstones.digest("m", BUYER) == new
    assert tombstones.digest("ms", AccountKey("", "b")) != new
    assert Tombstones([]).digests("m", BUYER) == []
    with pytest.raises(PointbookError) as caught:
        Tombstones([]).digest("m", BUYER)
    assert caught.value.reason is Reason.KEY_NOT_CONFIGURED


def test_limits_of_keys_that_a_customer_can_receive() -> None:
    cards = tuple(Identifier(IdentifierKind.CARD_NUMBER, str(number)) for number in range(50))
    known = tuple(Identifier(IdentifierKind.CUSTOMER_ID, str(number), "LINE") for number in range(50))
    mobile = Identifier(IdentifierKind.MOBILE, "+8613800000000")
    customer = Customer("m", "c", (*cards, *known, mobile), (BUYER,))

    assert customer.keys_replaced_by(Identifier(IdentifierKind.MOBILE, "+12025550123")) == {mobile}
    assert customer.keys_replaced_by(Identifier(IdentifierKind.MOBILE, "+12025550123", "LINE")) == set()
    customer.check_can_receive(Identifier(IdentifierKind.CARD_EXTERNAL_ID, "x"))
    customer.check_can_receive(AccountKey("t", "b"))
    for key in (
        Identifier(IdentifierKind.CARD_NUMBER, "x"),
        Identifier(IdentifierKind.MOBILE, "x", "LINE"),
        AccountKey("s", "c"),
    ):
        with pytest.raises(CannotReceiveError):
            customer.check_can_receive(key)
