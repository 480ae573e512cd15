"""A cache of all tokens, so that no call waits for the database."""

import asyncio
import contextlib
import math
import re
import time

import structlog

from pointbook_common.durations import DAY_MS, HOUR_MS
from pointbook_server.access.model import Principal, Token
from pointbook_server.access.rules import authenticate, split_bearer
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.clock import Clock
from pointbook_server.db.errors import database_unavailable
from pointbook_server.errors import RETRY_AFTER_SECONDS, PointbookError
from pointbook_server.reasons import Reason

RELOAD_INTERVAL_SECONDS = 1.0
"""The time between two loads, and so how long a revoked token may stay valid."""
RETRY_INTERVAL_SECONDS = 0.5
"""The time between a load that failed and the next one."""
LOAD_INTERVAL_SECONDS_MIN = 0.2
"""The least time between two loads. An unknown token, which may be new, causes a load after this time."""
LOAD_TIMEOUT_SECONDS = 2.0
WAITING_MAX = 100
"""How many calls with unknown tokens may wait for the next load; further ones get QUEUE_FULL."""
MISSES_MAX = 10_000
MISS_SECONDS = 300.0
"""How long a token id that was not found causes no further load. Ids are random, so no token gets it later."""
USED_MS = 7 * DAY_MS
"""A token that was not used for this long is not in use: its expiry does no harm."""
ROTATED_USED_MS = HOUR_MS
_TOKEN_ID = re.compile(r"[0-9a-f]{16}")
"""The form of generated ids. An id of another form may be stored as well, but is not worth an extra load."""

log = structlog.get_logger()


class TokenCache:
    """All tokens as of the last load. Call `start` and `close` in the same event loop.

    A call with a known token never waits. While the database is unavailable, the last tokens stay valid for
    `staleness_seconds`; after that every call gets DATABASE_UNAVAILABLE, since a token may have been revoked meanwhile.
    """

    def __init__(self, transactions: TokenTransactions, clock: Clock, *, staleness_seconds: float) -> None:
        self._transactions = transactions
        self._clock = clock
        self._staleness_seconds = staleness_seconds
        self._tokens: dict[str, Token] = {}
        self._verified: dict[str, tuple[Principal, float]] = {}
        """The callers of bearer strings verified since the last load, and when their tokens expire, in ms."""
        self._loaded_at = float("-inf")
        self._misses: dict[str, float] = {}
        """When each token id was not found, the oldest first."""
        self._load_requested = asyncio.Event()
        self._next_load: asyncio.Future[bool]
        """Whether the load that begins next succeeds."""
        self._waiting = 0
        """How many calls wait for a load."""
        self._has_defect = False
        """Whether the last loads failed because of a defect, which is logged once."""
        self._reloading: asyncio.Task[None] | None = None
        self._used_at_ms: dict[str, int] = {}
        """When tokens were used since the last write. Only known tokens are in it, which bounds its size."""

    async def start(self) -> None:
        """Load the tokens, and start to reload them at intervals.

        If the database takes too long, the tokens come with a later load.
        """
        self._next_load = asyncio.get_running_loop().create_future()
        loaded = await self._load()
        self._reloading = asyncio.create_task(self._reload_forever(loaded=loaded))

    async def close(self) -> None:
        """Stop reloading, and refuse the calls that wait for a load."""
        if self._reloading is None:
            return
        self._reloading.cancel()
        await asyncio.wait({self._reloading})
        self._next_load.set_result(False)

    async def authenticate(self, bearer: str) -> Principal:
        """Return the caller that presents a bearer string.

        Raises TOKEN_INVALID, TOKEN_EXPIRED, DATABASE_UNAVAILABLE, and QUEUE_FULL if too many unknown tokens wait.
        """
        if (principal := self._find_verified(bearer)) is not None:
            return principal
        token_id, secret = split_bearer(bearer)
        token = self._fresh_tokens().get(token_id)
        if token is None and self._may_be_new(token_id):
            token = await self._find_new(token_id)
        now_ms = self._clock()
        principal = authenticate(token, secret, now_ms)
        self._used_at_ms[principal.token_id] = now_ms
        expires_at_ms = self._tokens[principal.token_id].expires_at_ms
        self._verified[bearer] = (principal, math.inf if expires_at_ms is None else expires_at_ms)
        return principal

    def next_expiry_ms(self) -> int | None:
        """Return when the next token in use expires, if any does.

        A token that was used in the last USED_MS, and has neither expired nor been revoked, is in use. One that was
        rotated has a successor, so it is in use only if it was used in the last ROTATED_USED_MS.
        """
        now_ms = self._clock()
        return min(
            (
                token.expires_at_ms
                for token in self._tokens.values()
                if token.expires_at_ms is not None
                and token.expires_at_ms > now_ms
                and token.revoked_at_ms is None
                and max(token.last_used_at_ms or 0, self._used_at_ms.get(token.token_id, 0))
                > now_ms - (USED_MS if token.rotated_to is None else ROTATED_USED_MS)
            ),
            default=None,
        )

    async def write_last_used(self) -> None:
        """Write when tokens were last used.

        If that raises DATABASE_UNAVAILABLE, the times stay for the next write.
        """
        used_at_ms, self._used_at_ms = self._used_at_ms, {}
        if not used_at_ms:
            return
        try:
            await self._transactions.write_last_used(used_at_ms)
        except BaseException:
            self._used_at_ms = used_at_ms | self._used_at_ms
            raise

    def _find_verified(self, bearer: str) -> Principal | None:
        """Return the caller of a bearer string that was verified since the last load.

        The look-up reveals nothing about secrets by its duration: a dict compares strings only if their hashes are
        equal, and the hashes have a random key.
        """
        principal, expires_at_ms = self._verified.get(bearer, (None, 0.0))
        if principal is None:
            return None
        now_ms = self._clock()
        if now_ms >= expires_at_ms or not self._is_fresh():
            return None
        self._used_at_ms[principal.token_id] = now_ms
        return principal

    def _fresh_tokens(self) -> dict[str, Token]:
        """Return the cached tokens.

        Raises DATABASE_UNAVAILABLE if they are stale or were never loaded.
        """
        if not self._is_fresh():
            raise database_unavailable()
        return self._tokens

    def _is_fresh(self) -> bool:
        """Return whether the last load is recent enough."""
        return time.monotonic() - self._loaded_at <= self._staleness_seconds

    def _may_be_new(self, token_id: str) -> bool:
        """Return whether a token with this id may have been created since the last load."""
        missed_at = self._misses.get(token_id, float("-inf"))
        return _TOKEN_ID.fullmatch(token_id) is not None and time.monotonic() - missed_at > MISS_SECONDS

    async def _find_new(self, token_id: str) -> Token | None:
        """Return a token after the next load; None if it does not exist.

        All waiting calls share the load.

        Raises QUEUE_FULL, and DATABASE_UNAVAILABLE if the load fails, since the token may be valid.
        """
        if self._waiting >= WAITING_MAX:
            raise PointbookError(
                Reason.QUEUE_FULL,
                "Too many calls with unknown tokens are waiting; retry.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        self._waiting += 1
        self._load_requested.set()
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
            # A flood of unknown tokens cannot make loads more frequent than this.
            await asyncio.sleep(LOAD_INTERVAL_SECONDS_MIN)
            interval = RELOAD_INTERVAL_SECONDS if loaded else RETRY_INTERVAL_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval - LOAD_INTERVAL_SECONDS_MIN):
                    await self._load_requested.wait()
            self._load_requested.clear()
            # This load may not see the token of a call that arrives from now on, so that call waits for the next one.
            load, self._next_load = self._next_load, asyncio.get_running_loop().create_future()
            loaded = False
            try:
                loaded = await self._load()
            finally:
                load.set_result(loaded)

    async def _load(self) -> bool:
        """Load all tokens, and return whether that succeeded.

        If it fails, the tokens of the last load stay.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_SECONDS):
                tokens = await self._transactions.read_all()
        except PointbookError:
            return False
        except TimeoutError as error:
            # Once the tokens are stale, calls no longer reach the database: only these show that it still hangs.
            self._transactions.note_timeout(error)
            return False
        except Exception:
            if not self._has_defect:
                log.exception("the tokens cannot be loaded")
            self._has_defect = True
            return False
        self._tokens = {token.token_id: token for token in tokens}
        self._verified = {}
        self._loaded_at = started
        self._has_defect = False
        return True
