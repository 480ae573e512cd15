"""The interceptor that authenticates callers before their requests are read."""

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import structlog

from pointbook_server.access.methods import METHODS, merchants_of
from pointbook_server.access.model import UNRESTRICTED, Principal, current_principal
from pointbook_server.access.token_cache import TokenCache
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.rpc.admission import Admission
from pointbook_server.rpc.request_fields import parse
from pointbook_server.rpc.request_reader import RequestReader
from pointbook_server.rpc.tls import client_names

PACKAGE = "/pointbook.v1."
HEALTH = "/grpc.health.v1.Health/"
BEARER = "bearer "
MISUSE_LOG_INTERVAL_SECONDS = 60.0
REQUEST_SECONDS_MAX = 10.0
"""How long the request of an authenticated caller may take to arrive: 1 MiB at just under 1 Mbit/s."""

log = structlog.get_logger()


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Authorizes each call by its token and the table of methods.

    Health is open, so that load balancers need no token; reflection needs any valid token. Without tokens
    (`pointbook dev` on loopback) every call is allowed.
    """

    def __init__(self, tokens: TokenCache | None, admission: Admission) -> None:
        self._tokens = tokens
        self._admission = admission
        self._requests = RequestReader(REQUEST_SECONDS_MAX)
        self._misuse_logged_at: dict[str, float] = {}
        """When the misuse of a bound token was last logged; only valid tokens get here, so it is bounded."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler.

        Streaming and unknown methods are authenticated immediately. Unary methods are served as streams, because gRPC
        calls the handler of a stream before the request arrives.
        """
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method.startswith(HEALTH):
            return handler
        if handler is None or handler.request_streaming:
            try:
                principal = await self._authenticate(handler_call_details.invocation_metadata)
                if handler is not None:
                    # The certificate is not known here, so a token that is bound to one cannot use reflection.
                    principal.check_client(frozenset())
            except Exception as error:  # noqa: BLE001 - raised again inside the call, where it becomes a status
                return _refusing_handler(error)
            return handler
        return grpc.stream_unary_rpc_method_handler(
            self._authorize(handler.unary_unary, handler.request_deserializer, method),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    def _authorize(
        self, behaviour: Callable[[Any, Any], Awaitable[Any]], deserialize: Callable[[bytes], Any] | None, method: str
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """Return a handler that checks scope and merchants before calling the servicer."""
        access = METHODS.get(method.removeprefix(PACKAGE)) if method.startswith(PACKAGE) else None

        async def call(metadata: Iterable[tuple[str, str | bytes]], context: Any) -> Any:
            principal = await self._authenticate(metadata)
            if principal.client_names:
                self._check_client(principal, context)
            if access is None:
                raise PointbookError(Reason.SCOPE_MISSING, "No scope allows this method.")
            if access.scope is not None:
                principal.check_scope(access.scope)
            current_principal.set(principal)
            await self._admission.enter(principal.token_id)
            try:
                message = parse(deserialize, await self._requests.read(context))
                if access.scope is not None:
                    principal.check_merchants(merchants_of(message, access))
                return await behaviour(message, context)
            except PointbookError as error:
                if (visible := principal.visible_error(error)) is not error:
                    raise visible from error
                raise
            finally:
                self._admission.leave(principal.token_id)

        return call

    def _check_client(self, principal: Principal, context: Any) -> None:
        """Raise TOKEN_INVALID if a bound token comes from another client.

        It is logged once a minute per token.
        """
        try:
            principal.check_client(client_names(context))
        except PointbookError:
            now = time.monotonic()
            if now >= self._misuse_logged_at.get(principal.token_id, float("-inf")) + MISUSE_LOG_INTERVAL_SECONDS:
                self._misuse_logged_at[principal.token_id] = now
                log.warning("token used by a client that it is not bound to", token_id=principal.token_id)
            raise

    async def _authenticate(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Principal:
        if self._tokens is None:
            return UNRESTRICTED
        for key, value in metadata or ():
            if key == "authorization" and isinstance(value, str) and value[: len(BEARER)].lower() == BEARER:
                return await self._tokens.authenticate(value[len(BEARER) :])
        raise PointbookError(Reason.TOKEN_MISSING, "Send `authorization: Bearer TOKEN` metadata.")


def _refusing_handler(error: Exception) -> Any:
    async def refuse(_metadata: object, _context: object) -> None:
        raise error

    return grpc.stream_unary_rpc_method_handler(refuse)
