"""Tokens, scopes, and the merchants that a request names: the pure rules."""

import contextlib
import re
from pathlib import Path

import pytest

from pointbook.v1 import points_pb2, redemption_pb2, webhooks_pb2
from pointbook_server.access.methods import METHODS, merchants_at, merchants_of
from pointbook_server.access.model import ALL_MERCHANTS, UNRESTRICTED, Principal, Scope, Token
from pointbook_server.access.rules import authenticate, new_token, split_bearer
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.services import SERVICE_NAMES

NOW_MS = 1_000
PROTOS = Path(__file__).parents[2] / "proto/pointbook/v1"


def make(expires_at_ms: int | None = None) -> tuple[Token, str]:
    """Return a token and the secret of its bearer string."""
    token, bearer = new_token("pos", ["m-2", "m-1", "m-2"], [Scope.REDEEM, Scope.CODES], NOW_MS, expires_at_ms)
    token_id, secret = split_bearer(bearer)
    assert token_id == token.token_id
    return token, secret


def reason_of(token: Token | None, secret: str, now_ms: int = NOW_MS) -> Reason:
    """Return why a secret is refused."""
    with pytest.raises(PointbookError) as caught:
        authenticate(token, secret, now_ms)
    return caught.value.reason


def test_a_secret_authenticates_with_the_tokens_merchants_and_scopes() -> None:
    token, secret = make()
    principal = authenticate(token, secret, NOW_MS)

    assert principal == Principal(frozenset({"m-1", "m-2"}), frozenset({"redeem", "codes"}), token.token_id)


def test_a_stored_token_does_not_reveal_its_secret() -> None:
    token, secret = make()

    assert secret not in repr(token)
    assert secret.encode() not in token.secret_hash
    assert len(secret) >= 43
    assert (token.merchants, token.scopes) == (("m-1", "m-2"), ("codes", "redeem"))


def test_another_secret_is_refused() -> None:
    token, secret = make()

    assert reason_of(token, make()[1]) is Reason.TOKEN_INVALID
    assert reason_of(token, "") is Reason.TOKEN_INVALID
    assert reason_of(None, secret) is Reason.TOKEN_INVALID


def test_a_revoked_token_is_refused() -> None:
    token, secret = make()
    revoked = Token(**{name: getattr(token, name) for name in token.__slots__} | {"revoked_at_ms": NOW_MS})

    assert reason_of(revoked, secret) is Reason.TOKEN_INVALID


def test_a_token_is_expired_from_its_expiry_on() -> None:
    """A wrong secret does not reveal the expiry."""
    token, secret = make(expires_at_ms=2_000)

    assert authenticate(token, secret, 1_999)
    assert reason_of(token, secret, 2_000) is Reason.TOKEN_EXPIRED
    assert reason_of(token, "guess", 2_000) is Reason.TOKEN_INVALID


@pytest.mark.parametrize(
    "bearer", ["", "pb", "pb_", "pb__", "pb_id", "pb_id_", "pb__secret", "xx_id_secret", "PB_id_secret", "_id_secret"]
)
def test_malformed_bearer_strings_have_no_token_id(bearer: str) -> None:
    assert split_bearer(bearer) == ("", "")


def test_a_secret_may_contain_underscores() -> None:
    """Secrets are URL-safe base64."""
    assert split_bearer("pb_id_a_b-c_") == ("id", "a_b-c_")


def test_a_missing_scope_is_refused() -> None:
    principal = Principal(frozenset({"m"}), frozenset({Scope.REDEEM}))

    principal.check_scope(Scope.REDEEM)
    with pytest.raises(PointbookError) as caught:
        principal.check_scope(Scope.REDEEM_SKIP)
    assert caught.value.reason is Reason.SCOPE_MISSING
    assert caught.value.metadata == {"scope": "redeem.skip"}


@pytest.mark.parametrize(
    ("allowed", "named", "is_right"),
    [
        ({"m"}, {"m"}, True),
        ({"m", "n"}, {"m", "n"}, True),
        ({"m"}, {"m", "n"}, False),
        ({"m"}, {"M"}, False),
        ({"m"}, {""}, False),
        ({"m"}, set(), False),
        (set(), {"m"}, False),
        ({ALL_MERCHANTS}, {"m"}, True),
        ({ALL_MERCHANTS}, {""}, True),
        ({ALL_MERCHANTS}, set(), True),
    ],
)
def test_a_token_must_be_for_every_named_merchant(allowed: set[str], named: set[str], *, is_right: bool) -> None:
    principal = Principal(frozenset(allowed), frozenset())
    expectation = contextlib.nullcontext() if is_right else pytest.raises(PointbookError, match="not for the merchant")

    with expectation:
        principal.check_merchants(named)


def test_the_unrestricted_caller_passes_every_check() -> None:
    for scope in Scope:
        UNRESTRICTED.check_scope(scope)
    UNRESTRICTED.check_merchants(["anyone"])


def test_merchants_are_found_at_every_depth_of_a_request() -> None:
    account = points_pb2.GetPointsAccountRequest(merchant_id="m")
    ask = redemption_pb2.ValidateRedemptionRequest()
    ask.customer.merchant_id = "m"
    batch = points_pb2.BatchApplyPointsUpdatesRequest()
    for merchant_id in ("m", "n", "m"):
        batch.updates.add(merchant_id=merchant_id)

    assert list(merchants_at(account, "merchant_id")) == ["m"]
    assert list(merchants_at(ask, "customer.merchant_id")) == ["m"]
    assert list(merchants_at(batch, "updates.merchant_id")) == ["m", "n", "m"]
    assert list(merchants_at(redemption_pb2.ValidateRedemptionRequest(), "customer.merchant_id")) == []


def test_a_replay_names_the_merchants_of_the_quarantine_and_of_its_update() -> None:
    access = METHODS["WebhooksService/ReplayQuarantinedWebhook"]
    points = webhooks_pb2.ReplayQuarantinedWebhookRequest(merchant_id="m")
    assert merchants_of(points, access) == {"m"}
    points.points_update.merchant_id = "n"
    erasure = webhooks_pb2.ReplayQuarantinedWebhookRequest(merchant_id="m")
    erasure.store_erasure.merchant_id = "n"
    customers = webhooks_pb2.ReplayQuarantinedWebhookRequest(merchant_id="m")
    customers.customer_update.SetInParent()

    assert merchants_of(points, access) == merchants_of(erasure, access) == {"m", "n"}
    assert merchants_of(customers, access) == {"m", ""}


def test_every_method_requires_the_scope_that_its_proto_comment_states() -> None:
    comments = [line for proto in PROTOS.glob("*.proto") for line in proto.read_text().splitlines()]
    documented: dict[str, str] = {}
    service = scope = ""
    for line in comments:
        if found := re.match(r"service (\w+)", line):
            service = found[1]
        elif found := re.match(r"  // Scope `([a-z.]+)`", line):
            scope = found[1]
        elif found := re.match(r"  rpc (\w+)", line):
            documented[f"{service}/{found[1]}"] = scope
            scope = ""

    assert documented == {method: access.scope.value if access.scope else "" for method, access in METHODS.items()}


def test_every_scope_is_used() -> None:
    """`redeem.skip` is required by a field, not by a method."""
    assert {access.scope for access in METHODS.values()} - {None} == set(Scope) - {Scope.REDEEM_SKIP}
    assert {method.partition("/")[0] for method in METHODS} == {name.rpartition(".")[2] for name in SERVICE_NAMES}
