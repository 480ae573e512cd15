"""Digests of codes, and everything that they are bound to."""

import pytest

from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.model import Purpose, Route

PURPOSE = Purpose("m", "buyer s b", 1, 100)
KEY = b"k" * 32


def digest(
    *, key: bytes = KEY, code: str = "012345", key_id: str = "k1", challenge_id: str = "c", **changes: object
) -> bytes:
    """Return the digest of a code with a changed binding."""
    channel, destination = changes.pop("channel", Channel.SMS), changes.pop("destination", "")
    assert isinstance(channel, Channel)
    purpose = PURPOSE._replace(**changes)  # type: ignore[arg-type] # each test names a field and its own kind of value
    route = Route(channel, str(destination))
    return KeyRing({key_id: key}).code_digest(key_id, code, challenge_id, purpose, route)


def test_digest_of_the_same_code_is_the_same() -> None:
    """A guess is compared by its digest."""
    assert digest() == digest()
    assert len(digest()) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"x" * 32},
        {"code": "012346"},
        {"code": "12345"},
        {"key_id": "k2"},
        {"challenge_id": "d"},
        {"merchant_id": "n"},
        {"customer": "buyer s c"},
        {"program_id": 2},
        {"points": 110},
        {"group_redemption": True},
        {"group_id": "g"},
        {"channel": Channel.EMAIL},
        {"destination": "+8613800000000"},
    ],
)
def test_code_is_bound_to_every_field(change: dict[str, object]) -> None:
    assert digest() != digest(**change)  # type: ignore[arg-type] # each case names a parameter and its kind of value


def test_fields_cannot_move_text_between_each_other() -> None:
    """Field lengths are part of the digest."""
    assert digest(key_id="k", challenge_id="1c") != digest(key_id="k1", challenge_id="c")
    assert digest(merchant_id="mb", customer="uyer s b") != digest(merchant_id="m", customer="buyer s b")
    assert digest(program_id=11, points=0) != digest(program_id=1, points=10)
    assert digest(destination="+1", code="23456") != digest(destination="+12", code="3456")
