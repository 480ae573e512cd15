"""Who may call what, as pure functions: tokens, scopes, and the merchants that a request names."""

import contextlib
import re
from pathlib import Path

import pytest

from pointbook.v1 import points_pb2, redemption_pb2, webhooks_pb2
from pointbook_server.access.model import (
    ALL_MERCHANTS,
    EVERYBODY,
    METHODS,
    Principal,
    Scope,
    Token,
    admit,
    merchants_named,
    merchants_of,
    new_token,
    split_bearer,
)
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.server import SERVICES

NOW_MS = 1_000
PROTOS = Path(__file__).parents[2] / "proto/pointbook/v1"


def make(expires_at_ms: int | None = None) -> tuple[Token, str]:
    """Make a token: what is kept, and the secret of its bearer string."""
    kept, bearer = new_token("pos", ["m-2", "m-1", "m-2"], [Scope.REDEEM, Scope.CODES], NOW_MS, expires_at_ms)
    token_id, secret = split_bearer(bearer)
    assert token_id == kept.token_id
    return kept, secret


def reason_of(kept: Token | None, secret: str, now_ms: int = NOW_MS) -> Reason:
    """Tell why a bearer is not admitted."""
    with pytest.raises(PointbookError) as caught:
        admit(kept, secret, now_ms)
    return caught.value.reason


def test_the_holder_of_the_secret_is_admitted() -> None:
    """With the merchants and scopes that the token was made for, and no others."""
    kept, secret = make()
    principal = admit(kept, secret, NOW_MS)

    assert principal == Principal(frozenset({"m-1", "m-2"}), frozenset({"redeem", "codes"}), kept.token_id)


def test_what_is_kept_holds_no_secret() -> None:
    """A leaked table of tokens opens nothing."""
    kept, secret = make()

    assert secret not in repr(kept)
    assert secret.encode() not in kept.secret_hash
    assert len(secret) >= 43
    assert (kept.merchants, kept.scopes) == (("m-1", "m-2"), ("codes", "redeem"))


def test_another_secret_is_refused() -> None:
    """Knowing a token's id is not enough."""
    kept, secret = make()

    assert reason_of(kept, make()[1]) is Reason.TOKEN_INVALID
    assert reason_of(kept, "") is Reason.TOKEN_INVALID
    assert reason_of(None, secret) is Reason.TOKEN_INVALID


def test_a_revoked_token_is_refused() -> None:
    """For good, and like an unknown one."""
    kept, secret = make()
    revoked = Token(**{name: getattr(kept, name) for name in kept.__slots__} | {"revoked_at_ms": NOW_MS})

    assert reason_of(revoked, secret) is Reason.TOKEN_INVALID


def test_a_token_expires_at_its_very_millisecond() -> None:
    """It is admitted until then; a wrong secret is not told about the expiry."""
    kept, secret = make(expires_at_ms=2_000)

    assert admit(kept, secret, 1_999)
    assert reason_of(kept, secret, 2_000) is Reason.TOKEN_EXPIRED
    assert reason_of(kept, "guess", 2_000) is Reason.TOKEN_INVALID


@pytest.mark.parametrize(
    "bearer", ["", "pb", "pb_", "pb__", "pb_id", "pb_id_", "pb__secret", "xx_id_secret", "PB_id_secret", "_id_secret"]
)
def test_other_strings_are_no_tokens(bearer: str) -> None:
    """Whatever has not the form of a token names none."""
    assert split_bearer(bearer) == ("", "")


def test_a_secret_may_have_any_letters() -> None:
    """Secrets are URL-safe base64, which has underscores too."""
    assert split_bearer("pb_id_a_b-c_") == ("id", "a_b-c_")


def test_scopes() -> None:
    """A scope that is not named is not there."""
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
def test_merchants(allowed: set[str], named: set[str], *, is_right: bool) -> None:
    """Every merchant of a request must be the token's; a request that names none is for tokens of all merchants."""
    principal = Principal(frozenset(allowed), frozenset())
    expectation = contextlib.nullcontext() if is_right else pytest.raises(PointbookError, match="not for the merchant")

    with expectation:
        principal.check_merchants(named)


def test_everybody_may_do_everything() -> None:
    """Only `pointbook dev` has this caller."""
    for scope in Scope:
        EVERYBODY.check_scope(scope)
    EVERYBODY.check_merchants(["anyone"])


def test_merchants_are_found_where_requests_name_them() -> None:
    """At the top, in a message, and in each item of a list."""
    account = points_pb2.GetPointsAccountRequest(merchant_id="m")
    ask = redemption_pb2.ValidateRedemptionRequest()
    ask.customer.merchant_id = "m"
    batch = points_pb2.BatchApplyPointsUpdatesRequest()
    for merchant_id in ("m", "n", "m"):
        batch.updates.add(merchant_id=merchant_id)

    assert list(merchants_named(account, "merchant_id")) == ["m"]
    assert list(merchants_named(ask, "customer.merchant_id")) == ["m"]
    assert list(merchants_named(batch, "updates.merchant_id")) == ["m", "n", "m"]
    assert list(merchants_named(redemption_pb2.ValidateRedemptionRequest(), "customer.merchant_id")) == []


def test_a_replay_names_two_merchants() -> None:
    """The quarantine's and the update's, of whichever kind it is; an update that is not there names none."""
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


def test_every_method_asks_for_the_scope_of_its_comment() -> None:
    """The comments of the proto are the reference manual."""
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
    """A scope that no method asks for would promise something; `redeem.skip` is asked for by a field."""
    assert {access.scope for access in METHODS.values()} - {None} == set(Scope) - {Scope.REDEEM_SKIP}
    assert {method.partition("/")[0] for method in METHODS} == {name.rpartition(".")[2] for name in SERVICES}
