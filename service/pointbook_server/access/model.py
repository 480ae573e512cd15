"""Who may call what: scopes, tokens, and the one table of methods. Whatever is not in the table is refused."""

import hmac
import secrets
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any

from pointbook_server.errors import REGISTERED_ELSEWHERE, PointbookError, Reason, store_not_found

TOKEN_PREFIX = "pb"  # noqa: S105 - the mark by which leaked tokens are recognised
ALL_MERCHANTS = "*"


class Scope(StrEnum):
    """What a token may do."""

    POINTS_READ = "points.read"
    POINTS_WRITE = "points.write"
    REDEEM = "redeem"
    REDEEM_SKIP = "redeem.skip"
    CODES = "codes"
    TELEPHONY = "telephony"
    STORES = "stores"
    ADMIN = "admin"
    WEBHOOKS = "webhooks"
    SUPPORT = "support"


@dataclass(frozen=True, slots=True)
class Access:
    """What a method asks of its caller: a scope, and where the request names its merchant, and further ones.

    A method without a scope is about its caller alone: any valid token may call it, and its request names no merchant.
    """

    scope: Scope | None
    merchant_path: str = "merchant_id"
    further_merchant_paths: tuple[str, ...] = ()
    for_all_merchants: bool = False
    """Whether the token must be for all merchants, whichever one the request names."""


METHODS = {
    "AccessService/GetCallerAccess": Access(None),
    "PointsService/ApplyPointsUpdate": Access(Scope.POINTS_WRITE, "update.merchant_id"),
    "PointsService/BatchApplyPointsUpdates": Access(Scope.POINTS_WRITE, "updates.merchant_id"),
    "PointsService/GetPointsAccount": Access(Scope.POINTS_READ),
    "PointsService/ListPointsEntries": Access(Scope.POINTS_READ),
    "PointsService/ListDriftingAccounts": Access(Scope.POINTS_READ),
    "PointsService/ListExpiringPoints": Access(Scope.POINTS_READ),
    "PointsService/VoidPointsEntries": Access(Scope.ADMIN),
    "PointsService/UnvoidPointsEntries": Access(Scope.ADMIN),
    "RedemptionService/ValidateRedemption": Access(Scope.REDEEM, "customer.merchant_id"),
    "RedemptionService/IssueValidationCode": Access(Scope.CODES, "customer.merchant_id"),
    "RedemptionService/ConfirmMissedCall": Access(Scope.TELEPHONY),
    "RedemptionService/ResetValidationLimits": Access(Scope.ADMIN, "customer.merchant_id"),
    "RedemptionService/RedeemPoints": Access(Scope.REDEEM, "customer.merchant_id"),
    "RedemptionService/ReverseRedemption": Access(Scope.REDEEM),
    "RedemptionService/SettleRedemption": Access(Scope.ADMIN),
    "RedemptionService/GetRedemption": Access(Scope.REDEEM),
    "RedemptionService/ListRedemptions": Access(Scope.REDEEM),
    "RedemptionService/ListValidationEvents": Access(Scope.SUPPORT),
    "RedemptionService/ListRefusals": Access(Scope.SUPPORT),
    "RedemptionService/ListCustomerTimeline": Access(Scope.SUPPORT),
    "RedemptionService/GetCustomerPoints": Access(Scope.POINTS_READ, "customer.merchant_id"),
    "ProgramsService/PutStore": Access(Scope.STORES, "store.merchant_id"),
    "ProgramsService/GetStore": Access(Scope.STORES),
    "ProgramsService/ListStores": Access(Scope.STORES),
    "ProgramsService/RequestStoreErasure": Access(Scope.WEBHOOKS),
    "ProgramsService/ListStoreErasures": Access(Scope.STORES),
    "ProgramsService/EraseStore": Access(Scope.ADMIN),
    "ProgramsService/ReleaseStore": Access(Scope.ADMIN, for_all_merchants=True),
    "ProgramsService/PutProgram": Access(Scope.ADMIN, "program.merchant_id"),
    "ProgramsService/GetProgram": Access(Scope.REDEEM),
    "ProgramsService/ListPrograms": Access(Scope.REDEEM),
    "BenefitsService/PutBenefit": Access(Scope.ADMIN, "benefit.merchant_id"),
    "BenefitsService/GetBenefit": Access(Scope.POINTS_READ),
    "BenefitsService/ListBenefits": Access(Scope.POINTS_READ),
    "BenefitsService/DeleteBenefit": Access(Scope.ADMIN),
    "BenefitsService/PreviewBenefitSchedule": Access(Scope.POINTS_READ),
    "BenefitsService/ListApplicableBenefits": Access(Scope.POINTS_READ),
    "BenefitsService/PutCustomPrivilege": Access(Scope.ADMIN, "custom_privilege.merchant_id"),
    "BenefitsService/GetCustomPrivilege": Access(Scope.POINTS_READ),
    "BenefitsService/ListCustomPrivileges": Access(Scope.POINTS_READ),
    "BenefitsService/DeleteCustomPrivilege": Access(Scope.ADMIN),
    "CustomersService/PutCustomer": Access(Scope.ADMIN, "customer.merchant_id"),
    "CustomersService/GetCustomer": Access(Scope.ADMIN),
    "CustomersService/ApplyCustomerUpdate": Access(Scope.POINTS_WRITE),
    "CustomersService/MoveIdentifier": Access(Scope.ADMIN),
    "CustomersService/RedactCustomer": Access(Scope.ADMIN),
    "CustomersService/PutUserGroup": Access(Scope.ADMIN, "user_group.merchant_id"),
    "CustomersService/GetUserGroup": Access(Scope.POINTS_READ),
    "CustomersService/DeleteUserGroup": Access(Scope.ADMIN),
    "WebhooksService/QuarantineWebhook": Access(Scope.WEBHOOKS),
    "WebhooksService/ListQuarantinedWebhooks": Access(Scope.WEBHOOKS),
    "WebhooksService/GetQuarantinedWebhook": Access(Scope.WEBHOOKS),
    "WebhooksService/ReplayQuarantinedWebhook": Access(
        Scope.WEBHOOKS,
        further_merchant_paths=(
            "points_update.merchant_id",
            "customer_update.merchant_id",
            "store_erasure.merchant_id",
        ),
    ),
    "WebhooksService/DropQuarantinedWebhook": Access(Scope.ADMIN),
}
"""The methods of package pointbook.v1, by service and method."""


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token as it is kept: the hash of its secret, never the secret."""

    token_id: str
    secret_hash: bytes
    name: str
    merchants: tuple[str, ...]
    scopes: tuple[str, ...]
    created_at_ms: int
    expires_at_ms: int | None = None
    revoked_at_ms: int | None = None
    last_used_at_ms: int | None = None
    rotated_to: str | None = None
    client_names: tuple[str, ...] = ()

    def not_rotatable(self, now_ms: int) -> str:
        """Return why it cannot be replaced by another token now; empty where it can."""
        if self.revoked_at_ms is not None:
            return "is revoked"
        if self.rotated_to is not None:
            return f"was rotated before: rotate {self.rotated_to}, which replaced it"
        if self.expires_at_ms is not None and self.expires_at_ms <= now_ms:
            return "has expired"
        return ""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: what a token allows, or everything where `pointbook dev` runs without tokens.

    With `client_names` the token is good only for clients whose certificate has one of these names.
    """

    merchants: frozenset[str]
    scopes: frozenset[str]
    token_id: str = ""
    client_names: frozenset[str] = frozenset()

    def check_client(self, names: frozenset[str]) -> None:
        """Raise TOKEN_INVALID where the token is bound to other clients than the one with these names.

        The error is that of an unknown token: it tells the holder of a stolen one nothing.
        """
        if self.client_names and self.client_names.isdisjoint(names):
            raise _token_invalid()

    @property
    def is_for_all_merchants(self) -> bool:
        """Whether it may name any merchant, as the shim's and an operator's tokens may."""
        return ALL_MERCHANTS in self.merchants

    @property
    def may_register_stores(self) -> bool:
        """Whether it may register a store that no merchant has, without a proof."""
        return Scope.ADMIN in self.scopes and self.is_for_all_merchants

    def visible(self, error: PointbookError) -> PointbookError:
        """Return an error without what another merchant has, unless the caller is for all merchants."""
        if REGISTERED_ELSEWHERE not in error.metadata or self.is_for_all_merchants:
            return error
        return store_not_found(error.metadata["store_id"])

    def check_scope(self, scope: Scope) -> None:
        """Raise SCOPE_MISSING unless the scope is allowed."""
        if scope not in self.scopes:
            raise PointbookError(
                Reason.SCOPE_MISSING, f"The token lacks the scope {scope}.", metadata={"scope": scope.value}
            )

    def check_merchants(self, merchants: Collection[str]) -> None:
        """Raise MERCHANT_FORBIDDEN unless every merchant is allowed; none at all takes a token for all merchants."""
        if self.is_for_all_merchants:
            return
        for merchant_id in merchants or ("",):
            if merchant_id not in self.merchants:
                raise PointbookError(
                    Reason.MERCHANT_FORBIDDEN,
                    "The token is not for the merchant that the request names.",
                    metadata={"merchant_id": merchant_id[:64]},
                )


EVERYBODY = Principal(frozenset({ALL_MERCHANTS}), frozenset(Scope))
"""The caller where no tokens are asked for."""
current_principal: ContextVar[Principal] = ContextVar("current_principal")
"""The caller of the running call."""


def merchants_of(message: Any, access: Access) -> set[str]:
    """Read all merchants that a request names where its method says; none where only a token for all may call it."""
    if access.for_all_merchants:
        return set()
    paths = (access.merchant_path, *access.further_merchant_paths)
    return {merchant_id for path in paths for merchant_id in merchants_named(message, path)}


def merchants_named(message: Any, path: str) -> Iterator[str]:
    """Read the merchants that a request names at a path, through repeated fields too; an absent message names none."""
    name, _, rest = path.partition(".")
    value = getattr(message, name)
    if not rest:
        yield value
    elif hasattr(value, "DESCRIPTOR"):
        if message.HasField(name):
            yield from merchants_named(value, rest)
    else:
        for item in value:
            yield from merchants_named(item, rest)


def new_token(
    name: str,
    merchants: Collection[str],
    scopes: Iterable[Scope],
    now_ms: int,
    expires_at_ms: int | None,
    *,
    client_names: Collection[str] = (),
) -> tuple[Token, str]:
    """Make a token: what is kept of it, and the bearer string that is shown once."""
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    kept = Token(
        token_id=token_id,
        secret_hash=_hash(secret),
        name=name,
        merchants=tuple(sorted(set(merchants))),
        scopes=tuple(sorted(set(scopes))),
        created_at_ms=now_ms,
        expires_at_ms=expires_at_ms,
        client_names=tuple(sorted(set(client_names))),
    )
    return kept, f"{TOKEN_PREFIX}_{token_id}_{secret}"


def rotated(token: Token, now_ms: int, overlap_ms: int) -> tuple[Token, Token, str]:
    """Return a token as it stands after its rotation, its replacement, and the bearer string of that one.

    The new token has the same name, merchants, scopes and client names, and as long a life as the old one was given.
    The old one lives on for the overlap, unless it expires before.
    """
    life_ms = None if token.expires_at_ms is None else token.expires_at_ms - token.created_at_ms
    expires_at_ms = None if life_ms is None else now_ms + life_ms
    new, bearer = new_token(
        token.name,
        token.merchants,
        map(Scope, token.scopes),
        now_ms,
        expires_at_ms,
        client_names=token.client_names,
    )
    end_ms = now_ms + overlap_ms
    old = replace(
        token,
        expires_at_ms=end_ms if token.expires_at_ms is None else min(token.expires_at_ms, end_ms),
        rotated_to=new.token_id,
    )
    return old, new, bearer


def split_bearer(bearer: str) -> tuple[str, str]:
    """Split a bearer string into token id and secret; both are empty where it has no such form."""
    prefix, _, rest = bearer.partition("_")
    token_id, _, secret = rest.partition("_")
    return (token_id, secret) if prefix == TOKEN_PREFIX and token_id and secret else ("", "")


def admit(token: Token | None, secret: str, now_ms: int) -> Principal:
    """Admit the holder of a secret. Raises TOKEN_INVALID and TOKEN_EXPIRED."""
    known = b"" if token is None else token.secret_hash
    matches = hmac.compare_digest(_hash(secret), known)
    if token is None or not matches or token.revoked_at_ms is not None:
        raise _token_invalid()
    if token.expires_at_ms is not None and token.expires_at_ms <= now_ms:
        raise PointbookError(
            Reason.TOKEN_EXPIRED, "The bearer token has expired.", metadata={"token_id": token.token_id}
        )
    return Principal(frozenset(token.merchants), frozenset(token.scopes), token.token_id, frozenset(token.client_names))


def _token_invalid() -> PointbookError:
    return PointbookError(Reason.TOKEN_INVALID, "The bearer token is unknown or revoked.")


def _hash(secret: str) -> bytes:
    """Hash a secret. It is 32 random bytes, so a fast hash is as good as a slow one."""
    return sha256(secret.encode()).digest()
