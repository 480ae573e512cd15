"""The shared secret of a telephony provider's callbacks."""

import pytest

from shopline_shim import callback_secret
from support.http_clients import basic_authorization


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer old"},
        {"authorization": "bearer  new "},
        {"authorization": basic_authorization("", "old")},
        {"authorization": basic_authorization("any user", "new").replace("Basic", "BASIC")},
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
        {"authorization": basic_authorization("new", "")},
        {"authorization": basic_authorization("user", "new:")},
        {"x-pointbook-secret": "NEW"},
        {"x-pointbook-secret": "\u00fc"},
    ],
    ids=str,
)
def test_missing_wrong_or_malformed_secret_is_rejected(headers: dict[str, str]) -> None:
    assert not callback_secret.verify(["new", "old"], headers)
    assert not callback_secret.verify([], headers)
