"""The shared secret of a telephony provider's callbacks."""

import base64

import pytest

from shopline_shim import callback_secret


def basic(user: str, password: str) -> str:
    """Return the Authorization header for the user and password of a URL."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer old"},
        {"authorization": "bearer  new "},
        {"authorization": basic("", "old")},
        {"authorization": basic("any user", "new").replace("Basic", "BASIC")},
        {"x-pointbook-secret": "new"},
        {"authorization": "Bearer of-a-gateway", "x-pointbook-secret": "old"},
    ],
    ids=str,
)
def test_secret_in_every_supported_header_is_accepted(headers: dict[str, str]) -> None:
    assert callback_secret.verify(["new", "old"], headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "new"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer newer"},
        {"authorization": "Bearer new,old"},
        {"authorization": "Digest new"},
        {"authorization": "Basic new"},
        {"authorization": "Basic \u00fc"},
        {"authorization": basic("new", "")},
        {"authorization": basic("user", "new:")},
        {"x-pointbook-secret": "NEW"},
        {"x-pointbook-secret": "\u00fc"},
    ],
    ids=str,
)
def test_missing_wrong_or_malformed_secret_is_rejected(headers: dict[str, str]) -> None:
    assert not callback_secret.verify(["new", "old"], headers)
    assert not callback_secret.verify([], headers)
