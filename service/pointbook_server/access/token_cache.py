"""The tokens in memory, so that no call waits for the database to know its caller."""

import asyncio
import contextlib
import re
import time

import structlog

from pointbook_server.access.model import Principal, Token, admit, split_bearer
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.clock import Clock
from pointbook_server.db.database import database_unavailable
from pointbook_server.errors import PointbookError, Reason

RELOAD_SECONDS = 1.0
"""How long after the last load the tokens are loaded again: how long a revoked one stays good."""
RETRY_SECONDS = 0.5
"""The same after a load that failed."""
UNKNOWN_PAUSE_SECONDS = 0.2
"""How soon an unknown token, which may be brand new, makes us load again, however many there are."""
LOAD_TIMEOUT_SECONDS = 2.0
WAITING_MAX = 100
"""How many calls with unknown tokens may wait for the next load; others are sent away."""
MISSES_MAX = 10_000
MISS_SECONDS = 300.0
"""How long an id that no token has waits for no other load: ids are random, so that none is made for it."""
RETRY_AFTER_SECONDS = 1.0
_TOKEN_ID = re.compile(r"[0-9a-f]{16}")
"""What ids are made of. Others are found where they are stored, and are worth no extra load."""

log = structlog.get_logger()


class TokenCache:
    """All tokens as they were a moment ago. `start` it, and `close` it in the same event loop.

    A known token never waits. While the database is away the last tokens stay in force for a while, after which
    every call is refused with DATABASE_UNAVAILABLE: what is revoked meanwhile must not stay good.
    """

    def __init__(self, store: TokenTransactions, clock: Clock, *, staleness_seconds: float) -> None:
        self._store = store
        self._clock = clock
        self._staleness_seconds = staleness_seconds
        self._tokens: dict[str, Token] = {}
        self._read_at = float("-inf")
        self._misses: dict[str, float] = {}
        """When ids were looked for in vain, the oldest first."""
        self._wanted = asyncio.Event()
        self._next_load: asyncio.Future[bool]
        """Whether the load that begins next succeeds."""
        self._waiting = 0
        """How many calls wait for a load."""
        self._has_defect = False
        """Whether a load met a defect of ours, which is logged once, and none has succeeded since."""
        self._reloading: asyncio.Task[None] | None = None
        self._used_at_ms: dict[str, int] = {}
        """When each token was last used since that was written: of known tokens alone, so that it is bounded."""

    async def start(self) -> None:
        """Load the tokens, if the database answers in time, and again and again from now on."""
        self._next_load = asyncio.get_running_loop().create_future()
        loaded = await self._load()
        self._reloading = asyncio.create_task(self._reload_forever(loaded=loaded))

    async def close(self) -> None:
        """Stop loading, and refuse calls that wait for a load."""
        if self._reloading is None:
            return
        self._reloading.cancel()
        await asyncio.wait({self._reloading})
        self._next_load.set_result(False)

    async def admit(self, bearer: str) -> Principal:
        """Return who calls with a bearer string.

        Raises TOKEN_INVALID, TOKEN_EXPIRED, DATABASE_UNAVAILABLE, and QUEUE_FULL where too many unknown tokens wait.
        """
        token_id, secret = split_bearer(bearer)
        token = self._fresh_tokens().get(token_id)
        if token is None and self._may_be_new(token_id):
            token = await self._find_new(token_id)
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

    def _fresh_tokens(self) -> dict[str, Token]:
        """Return the tokens in memory. Raises DATABASE_UNAVAILABLE where they are too old, or were never loaded."""
        if time.monotonic() - self._read_at > self._staleness_seconds:
            raise database_unavailable()
        return self._tokens

    def _may_be_new(self, token_id: str) -> bool:
        """Return whether a token of this id may have been made since the last load."""
        missed_at = self._misses.get(token_id, float("-inf"))
        return _TOKEN_ID.fullmatch(token_id) is not None and time.monotonic() - missed_at > MISS_SECONDS

    async def _find_new(self, token_id: str) -> Token | None:
        """Return a token after one more load, which all that wait share, and remember where there is none.

        Raises QUEUE_FULL, and DATABASE_UNAVAILABLE where the load fails: the token may be good.
        """
        if self._waiting >= WAITING_MAX:
            raise PointbookError(
                Reason.QUEUE_FULL,
                "Too many calls with unknown tokens wait; retry.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        self._waiting += 1
        self._wanted.set()
        try:
            loaded = await asyncio.shield(self._next_load)
        finally:
            self._waiting -= 1
        if not loaded:
            raise database_unavailable()
        token = self._fresh_tokens().get(token_id)
        if token is None:
            self._remember_miss(token_id)
        return token

    def _remember_miss(self, token_id: str) -> None:
        self._misses.pop(token_id, None)
        if len(self._misses) >= MISSES_MAX:
            del self._misses[next(iter(self._misses))]
        self._misses[token_id] = time.monotonic()

    async def _reload_forever(self, *, loaded: bool) -> None:
        while True:
            # However many unknown tokens come, this pause passes between two loads.
            await asyncio.sleep(UNKNOWN_PAUSE_SECONDS)
            interval = RELOAD_SECONDS if loaded else RETRY_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval - UNKNOWN_PAUSE_SECONDS):
                    await self._wanted.wait()
            self._wanted.clear()
            # A call that comes from now on may have a token that this load does not see.
            load, self._next_load = self._next_load, asyncio.get_running_loop().create_future()
            loaded = False
            try:
                loaded = await self._load()
            finally:
                load.set_result(loaded)

    async def _load(self) -> bool:
        """Load all tokens, and return whether that succeeded; otherwise the old ones stay."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_SECONDS):
                tokens = await self._store.tokens()
        except (PointbookError, TimeoutError):
            return False
        except Exception:
            if not self._has_defect:
                log.exception("the tokens cannot be loaded")
            self._has_defect = True
            return False
        self._tokens = {token.token_id: token for token in tokens}
        self._read_at = started
        self._has_defect = False
        return True
