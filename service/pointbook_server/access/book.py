"""The tokens in memory, so that no call waits for the database to know its caller."""

import asyncio
import time

from pointbook_server.access.model import Principal, Token, admit, split_bearer
from pointbook_server.access.store import AccessStore
from pointbook_server.clock import Clock
from pointbook_server.database import database_unavailable
from pointbook_server.errors import PointbookError

MAX_AGE_SECONDS = 2.0
"""How long a revoked token may still be heard."""
UNKNOWN_PAUSE_SECONDS = 0.2
"""An unknown token may be brand new, so it makes us look again, but not for every forged one."""
LOAD_TIMEOUT_SECONDS = 2.0


class TokenBook:
    """All tokens as they were a moment ago. While the database is away the last ones stay in force."""

    def __init__(self, store: AccessStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._tokens: dict[str, Token] | None = None
        self._read_at = float("-inf")
        self._loading = asyncio.Lock()
        self._used_at_ms: dict[str, int] = {}
        """When each token was last used since that was written: of known tokens alone, so that it is bounded."""

    async def admit(self, bearer: str) -> Principal:
        """Tell who calls with a bearer string. Raises TOKEN_INVALID, TOKEN_EXPIRED and DATABASE_UNAVAILABLE."""
        token_id, secret = split_bearer(bearer)
        now = time.monotonic()
        token = (await self._read_after(now - MAX_AGE_SECONDS)).get(token_id)
        if token is None and token_id:
            # All that come within the pause share one more look, which sees what was there when they came.
            await asyncio.sleep(self._read_at + UNKNOWN_PAUSE_SECONDS - now)
            token = (await self._read_after(now)).get(token_id)
        now_ms = self._clock()
        principal = admit(token, secret, now_ms)
        self._used_at_ms[principal.token_id] = now_ms
        return principal

    async def write_use(self) -> None:
        """Write when tokens were last used, which calls only note. Raises DATABASE_UNAVAILABLE, and keeps it then."""
        used_at_ms, self._used_at_ms = self._used_at_ms, {}
        if not used_at_ms:
            return
        try:
            await self._store.write_use(used_at_ms)
        except BaseException:
            self._used_at_ms = used_at_ms | self._used_at_ms
            raise

    async def _read_after(self, moment: float) -> dict[str, Token]:
        """Give the tokens as they were read after a moment."""
        if self._read_at <= moment:
            async with self._loading:
                if self._read_at <= moment:
                    await self._load()
        if self._tokens is None:
            raise database_unavailable()
        return self._tokens

    async def _load(self) -> None:
        """Load all tokens; where the database is away, keep the old ones and look again a moment later."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_SECONDS):
                tokens = await self._store.tokens()
        except (PointbookError, TimeoutError):
            self._read_at = time.monotonic()
        else:
            self._tokens = {token.token_id: token for token in tokens}
            self._read_at = started
