"""What customers are found by, and what their webhooks say, as pure rules."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointbook_server.customers.model import (
    NEVER,
    Customer,
    CustomerUpdate,
    Identifier,
    Kind,
    KnownBuyer,
    NoRoomError,
    Stamp,
    Tombstones,
    UpdateKind,
    newest,
    normalised,
    read_identifier,
    read_stamp,
    write_stamp,
)
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import AccountKey

BUYER = AccountKey("s", "b")


def update(**changes: object) -> CustomerUpdate:
    """Make an update."""
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
def test_mobile_numbers(written: str, region: str, expected: str | None) -> None:
    """E.164 or nothing; a national number needs its region."""
    assert normalised(Kind.MOBILE, written, region) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Ada.Lovelace@Example.COM", "ada.lovelace@example.com"),
        ("ÄDA@example.com", "äda@example.com"),
        ("a@BÜCHER.example", "a@bücher.example"),
        ("a@xn--bcher-kva.example", "a@bücher.example"),
        ("strasse@straße.de", "strasse@straße.de"),
        ("a+b@example.com", "a+b@example.com"),
        ("nobody", None),
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
def test_email_addresses(written: str, expected: str | None) -> None:
    """In lower case before the @, and behind it as the domain's own rules say."""
    assert normalised(Kind.EMAIL, written) == expected


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
def test_other_identifiers_are_compared_exactly(value: str, expected: str | None) -> None:
    """But for what is pasted along with them and nobody sees, and digits of other scripts."""
    for kind in (Kind.EXTERNAL_ID, Kind.CARD_NUMBER, Kind.CARD_EXTERNAL_ID, Kind.CUSTOMER_ID):
        assert normalised(kind, value) == expected


def test_an_identifier_is_compared_by_its_value_alone() -> None:
    """Another spelling is the same identifier, of which a customer knows the form that counts."""
    one, other = (read_identifier(Kind.EMAIL, address) for address in ("Ada@example.com", "aDA@example.com"))
    assert one is not None
    assert other is not None
    assert (one, hash(one)) == (other, hash(other))
    assert (one.form, other.form) == ("Ada@example.com", "aDA@example.com")
    customer = Customer("m", "c", (one,))
    assert customer.own(Kind.EMAIL) == ["ada@example.com"]
    assert customer.own_forms(Kind.EMAIL) == ["Ada@example.com"]
    assert [new.form for new in customer.respelled([other])] == ["aDA@example.com"]
    assert customer.respelled([one]) == set()
    assert customer.respelled([Identifier(Kind.EMAIL, "b@example.com")]) == set()


def test_argentinas_nine_is_a_spelling() -> None:
    """It tells which kind a number is, never whose."""
    with_nine, without = (read_identifier(Kind.MOBILE, number) for number in ("+5491123456789", "+541123456789"))
    assert with_nine is not None
    assert without is not None
    assert with_nine == without
    assert [new.form for new in Customer("m", "c", (with_nine,)).respelled([without])] == ["+541123456789"]
    assert [new.form for new in Customer("m", "c", (without,)).respelled([with_nine])] == ["+5491123456789"]


@given(st.sampled_from([Kind.MOBILE, Kind.EMAIL]), st.text(max_size=40), st.sampled_from(["", "CN", "DE"]))
def test_normalising_twice_changes_nothing(kind: Kind, value: str, region: str) -> None:
    """And never fails, whatever the text."""
    once = normalised(kind, value, region)
    assert once is None or normalised(kind, once) == once


@given(
    st.integers(0, 2**53), st.integers(0, 3), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)
)
def test_stamps_are_read_as_written(at_ms: int, rank: int, event_id: str) -> None:
    """And what was never told is written as nothing."""
    stamp = Stamp(at_ms, rank, event_id)
    assert read_stamp(write_stamp(stamp)) == stamp
    assert read_stamp(write_stamp(NEVER)) == NEVER < stamp


def test_what_an_update_says() -> None:
    """Absent is not told, empty takes away, what is none is None; deletions take both, redactions tell nothing."""
    told = {"mobile": "+8613800000000", "email": "nobody"}
    assert update(**told).says() == {Kind.MOBILE: "+8613800000000", Kind.EMAIL: None}
    assert update(email=" Stra\u00dfe@Example.com\u200b").says() == {Kind.EMAIL: "Stra\u00dfe@Example.com"}
    assert update(mobile="").says() == {Kind.MOBILE: ""}
    assert update().says() == {}
    assert update(kind=UpdateKind.DELETED, **told).says() == {Kind.MOBILE: "", Kind.EMAIL: ""}
    assert update(kind=UpdateKind.REDACTED, **told).says() == {}


def test_the_order_of_one_moment() -> None:
    """A redaction is newer than a deletion, that than an update, and the ids tell the others apart."""
    stamps = [update(kind=kind, event_id="z").stamp for kind in UpdateKind]
    assert stamps == sorted(stamps)
    assert update(event_id="b").stamp > update(event_id="a").stamp
    assert update(updated_at_ms=1_001).stamp > stamps[-1]


def test_a_digest_is_of_the_whole_content() -> None:
    """Each field counts, and absent is not empty."""
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


def test_the_newest_of_all_buyers_counts() -> None:
    """And what is forgotten since a moment is as if it was never told."""
    one = KnownBuyer("c", {Kind.MOBILE: Stamp(5, 1, "a"), Kind.EMAIL: NEVER})
    two = KnownBuyer("c", {Kind.MOBILE: Stamp(7, 1, "b"), Kind.EMAIL: Stamp(3, 1, "c")})

    assert newest([one, two]) == {Kind.MOBILE: Stamp(7, 1, "b"), Kind.EMAIL: Stamp(3, 1, "c")}
    assert two.since(3).as_of == {Kind.MOBILE: Stamp(7, 1, "b"), Kind.EMAIL: NEVER}
    assert newest([]) == {Kind.MOBILE: NEVER, Kind.EMAIL: NEVER}


def test_tombstones() -> None:
    """HMAC-SHA256 of the length-prefixed parts; the first key signs, all verify, and without one none is signed."""
    parts = [b"pointbook.tombstone.v1", b"m", b"s", b"b"]
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    new, old = (hmac.new(key, message, hashlib.sha256).digest() for key in (b"new", b"old"))
    tombstones = Tombstones([b"new", b"old"])

    assert tombstones.digests("m", BUYER) == [new, old]
    assert tombstones.signed("m", BUYER) == new
    assert tombstones.signed("ms", AccountKey("", "b")) != new
    assert Tombstones([]).digests("m", BUYER) == []
    with pytest.raises(PointbookError) as caught:
        Tombstones([]).signed("m", BUYER)
    assert caught.value.reason is Reason.KEY_NOT_CONFIGURED


def test_room_for_what_is_moved() -> None:
    """A customer has one number, which is replaced, fifty cards, and one buyer for each store."""
    cards = tuple(Identifier(Kind.CARD_NUMBER, str(number)) for number in range(50))
    known = tuple(Identifier(Kind.CUSTOMER_ID, str(number), "LINE") for number in range(50))
    mobile = Identifier(Kind.MOBILE, "+8613800000000")
    customer = Customer("m", "c", (*cards, *known, mobile), (BUYER,))

    assert customer.replaced_by(Identifier(Kind.MOBILE, "+12025550123")) == {mobile}
    assert customer.replaced_by(Identifier(Kind.MOBILE, "+12025550123", "LINE")) == set()
    customer.check_room(Identifier(Kind.CARD_EXTERNAL_ID, "x"))
    customer.check_room(AccountKey("t", "b"))
    for key in (Identifier(Kind.CARD_NUMBER, "x"), Identifier(Kind.MOBILE, "x", "LINE"), AccountKey("s", "c")):
        with pytest.raises(NoRoomError):
            customer.check_room(key)
