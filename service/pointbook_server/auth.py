"""The interceptor that knows callers by their bearer tokens. Whatever it does not know, it refuses."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from pointbook_server.access.book import TokenBook
from pointbook_server.access.model import (
    EVERYBODY,
    METHODS,
    Access,
    Principal,
    current_principal,
    merchants_of,
)
from pointbook_server.errors import PointbookError, Reason

PACKAGE = "/pointbook.v1."
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection."
BEARER = "bearer "


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Admits callers by the table of methods, before anything else of a request is looked at.

    Health is open, so that load balancers need no token; reflection takes any valid token. Without a book of tokens
    (`pointbook dev` on loopback) everybody may call everything.
    """

    def __init__(self, tokens: TokenBook | None) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Find the caller, and hand the call on, or to a handler that refuses it."""
        method = handler_call_details.method
        if method.startswith(HEALTH):
            return await continuation(handler_call_details)
        try:
            principal = await self._admit(handler_call_details)
            handler = await continuation(handler_call_details)
            if handler is None or method.startswith(REFLECTION):
                return handler
            access = _access(method, principal)
        except Exception as error:  # noqa: BLE001 - it is raised again inside the call, where it becomes a status
            return _refuse(error)
        return grpc.unary_unary_rpc_method_handler(
            _guard(handler.unary_unary, principal, access),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _admit(self, details: grpc.HandlerCallDetails) -> Principal:
        if self._tokens is None:
            return EVERYBODY
        for key, value in details.invocation_metadata or ():
            if key == "authorization" and isinstance(value, str) and value[: len(BEARER)].lower() == BEARER:
                return await self._tokens.admit(value[len(BEARER) :])
        raise PointbookError(Reason.TOKEN_MISSING, "Send `authorization: Bearer TOKEN` metadata.")


def _access(method: str, principal: Principal) -> Access:
    """Find what a method asks of its caller, and check the scope. A method outside the table is refused."""
    access = METHODS.get(method.removeprefix(PACKAGE)) if method.startswith(PACKAGE) else None
    if access is None:
        raise PointbookError(Reason.SCOPE_MISSING, "There is no scope for this method.")
    principal.check_scope(access.scope)
    return access


def _guard(behaviour: Callable[[Any, Any], Awaitable[Any]], principal: Principal, access: Access) -> Any:
    """Check the merchants that a request names before its servicer sees it."""

    async def call(request: Any, context: Any) -> Any:
        principal.check_merchants(merchants_of(request, access))
        current_principal.set(principal)
        return await behaviour(request, context)

    return call


def _refuse(error: Exception) -> Any:
    async def refuse(_request: bytes, _context: object) -> None:
        raise error

    return grpc.unary_unary_rpc_method_handler(refuse)
