"""The authentication of calls: by token, and by certificate for bound tokens."""

import time
from typing import Any

import structlog

from pointbook_server.access.model import UNRESTRICTED, Principal
from pointbook_server.access.token_cache import TokenCache
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.rpc.tls import client_names

MISUSE_LOG_INTERVAL_SECONDS = 60.0

log = structlog.get_logger()


class Authenticator:
    """Finds the caller of each call.

    Without tokens (`pointbook dev` on loopback), every caller may do everything.
    """

    def __init__(self, tokens: TokenCache | None) -> None:
        self._tokens = tokens
        self._misuse_logged_at: dict[str, float] = {}
        """When the misuse of a bound token was last logged; only valid tokens get here, so it is bounded."""

    async def authenticate(self, bearer: str | None, context: Any) -> Principal:
        """Return the caller that sends a token; `bearer` is None if it sends none.

        Raises TOKEN_MISSING, TOKEN_INVALID, TOKEN_EXPIRED, DATABASE_UNAVAILABLE and QUEUE_FULL.
        """
        if self._tokens is None:
            return UNRESTRICTED
        if bearer is None:
            raise PointbookError(Reason.TOKEN_MISSING, "Send `authorization: Bearer TOKEN` metadata.")
        principal = await self._tokens.authenticate(bearer)
        if principal.client_names:
            self._check_client(principal, context)
        return principal

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
