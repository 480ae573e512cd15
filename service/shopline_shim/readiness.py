"""The readiness of the shim: the server serves, and the token has the scopes."""

import asyncio
import time
from typing import Protocol

import grpc
import structlog

from pointbook.v1 import access_pb2
from pointbook_client import PointbookError, UnauthenticatedError
from shopline_shim.settings import ShimSettings

TOKEN_CHECK_SECONDS = 1.0
"""How long the result of a token check is reused, so that frequent probes do not load the server."""
_WEBHOOK_SCOPES = ("points.write", "webhooks")
_MISSED_CALL_SCOPE = "telephony"
_TOKEN_CAUSES = {
    "TOKEN_MISSING": "POINTBOOK_TOKEN is not set, and the gRPC server requires a token.",
    "TOKEN_INVALID": "POINTBOOK_TOKEN is unknown to the gRPC server, or revoked.",
    "TOKEN_EXPIRED": "POINTBOOK_TOKEN has expired.",
}

log = structlog.get_logger()


class ServerProbe(Protocol):
    """The calls to the gRPC server that readiness depends on."""

    async def is_serving(self) -> bool:
        """Return whether the server's health is SERVING. Raises nothing."""

    async def caller_access(self) -> access_pb2.GetCallerAccessResponse:
        """Return the scopes and merchants of the token. Raises PointbookError."""


class ReadinessCheck:
    """The check behind `/readyz`. It logs every change of its result."""

    def __init__(self, settings: ShimSettings) -> None:
        self._scopes = (*_WEBHOOK_SCOPES, *((_MISSED_CALL_SCOPE,) if settings.missed_call_secrets else ()))
        self._token_cause = ""
        self._checked_at = float("-inf")
        self._check_lock = asyncio.Lock()
        self._logged_cause = ""

    async def find_cause(self, server: ServerProbe) -> str:
        """Return why the shim is not ready, in a sentence; empty if it is ready."""
        cause = await self._find_cause(server)
        if cause != self._logged_cause:
            self._logged_cause = cause
            if cause:
                log.error("not ready", cause=cause)
            else:
                log.info("ready")
        return cause

    async def _find_cause(self, server: ServerProbe) -> str:
        if not await server.is_serving():
            return "The gRPC server is not serving."
        async with self._check_lock:
            if time.monotonic() - self._checked_at >= TOKEN_CHECK_SECONDS:
                self._token_cause = await self._check_token(server)
                self._checked_at = time.monotonic()
            return self._token_cause

    async def _check_token(self, server: ServerProbe) -> str:
        try:
            access = await server.caller_access()
        except PointbookError as error:
            return _token_cause(error)
        missing = [scope for scope in self._scopes if scope not in access.scopes]
        return f"POINTBOOK_TOKEN lacks scopes: {', '.join(missing)}." if missing else ""


def _token_cause(error: PointbookError) -> str:
    """Return why the token is unusable; empty if the server is too old to check."""
    if error.grpc_code is grpc.StatusCode.UNIMPLEMENTED:
        return ""
    if isinstance(error, UnauthenticatedError):
        return _TOKEN_CAUSES.get(error.reason, "The gRPC server rejects POINTBOOK_TOKEN.")
    return f"POINTBOOK_TOKEN cannot be checked: the gRPC server returned {error.grpc_code.name}."
