"""Scopes, tokens, and the caller that a token stands for."""

from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from pointbook_server.errors import REGISTERED_ELSEWHERE, PointbookError, store_not_found
from pointbook_server.reasons import Reason

ALL_MERCHANTS = "*"


class Scope(StrEnum):
    """A permission of a token."""

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
class Token:
    """A bearer token as it is stored: with the hash of its secret, never the secret."""

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

    def rotation_obstacle(self, now_ms: int) -> str:
        """Return why the token cannot be rotated now; empty if it can."""
        if self.revoked_at_ms is not None:
            return "is revoked"
        if self.rotated_to is not None:
            return f"was rotated before: rotate {self.rotated_to}, which replaced it"
        if self.expires_at_ms is not None and self.expires_at_ms <= now_ms:
            return "has expired"
        return ""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller, as its token describes it.

    With `client_names`, the token is valid only for clients whose certificate has one of these names.
    """

    merchants: frozenset[str]
    scopes: frozenset[str]
    token_id: str = ""
    client_names: frozenset[str] = frozenset()

    def check_client(self, names: frozenset[str]) -> None:
        """Raise TOKEN_INVALID if the token is bound to clients with other names.

        The error is the same as for an unknown token, so that a stolen token reveals nothing.
        """
        if self.client_names and self.client_names.isdisjoint(names):
            raise token_invalid()

    @property
    def is_for_all_merchants(self) -> bool:
        """Whether the caller may name any merchant, as the shim and operators may."""
        return ALL_MERCHANTS in self.merchants

    @property
    def may_register_stores(self) -> bool:
        """Whether the caller may register any free store, without a proof."""
        return Scope.ADMIN in self.scopes and self.is_for_all_merchants

    def visible_error(self, error: PointbookError) -> PointbookError:
        """Return an error as this caller may see it.

        Only a caller for all merchants may see that another merchant has registered a store.
        """
        if REGISTERED_ELSEWHERE not in error.metadata or self.is_for_all_merchants:
            return error
        return store_not_found(error.metadata["store_id"])

    def check_scope(self, scope: Scope) -> None:
        """Raise SCOPE_MISSING unless the token has a scope."""
        if scope not in self.scopes:
            raise PointbookError(
                Reason.SCOPE_MISSING, f"The token lacks the scope {scope}.", metadata={"scope": scope.value}
            )

    def check_merchants(self, merchants: Collection[str]) -> None:
        """Raise MERCHANT_FORBIDDEN unless the token is for all named merchants.

        A request that names no merchant requires a token for all merchants.
        """
        if self.is_for_all_merchants:
            return
        for merchant_id in merchants or ("",):
            if merchant_id not in self.merchants:
                raise PointbookError(
                    Reason.MERCHANT_FORBIDDEN,
                    "The token is not for the merchant that the request names.",
                    metadata={"merchant_id": merchant_id[:64]},
                )


UNRESTRICTED = Principal(frozenset({ALL_MERCHANTS}), frozenset(Scope))
"""The caller of a server that requires no tokens (`pointbook dev`)."""
current_principal: ContextVar[Principal] = ContextVar("current_principal")
"""The caller of the running call."""


def token_invalid() -> PointbookError:
    """Return the error for an unknown, revoked or wrongly bound token."""
    return PointbookError(Reason.TOKEN_INVALID, "The bearer token is unknown or revoked.")
