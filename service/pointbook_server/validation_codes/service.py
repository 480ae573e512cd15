"""Issuing and checking one-time codes: what happens between the database and the provider, and in which order."""

import asyncio
import hmac
from collections.abc import Mapping

import structlog

from pointbook_server.clock import Clock
from pointbook_server.database import Connection
from pointbook_server.delivery.sender import DeliveryFailedError, Message, Sender
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.programs.model import Channel, Program
from pointbook_server.validation_codes.model import (
    COOLDOWN_MS,
    DELIVERY_MS_MAX,
    Challenge,
    Delivery,
    Issued,
    Purpose,
    Route,
    code_digest,
    message_text,
    new_code,
)
from pointbook_server.validation_codes.store import ValidationCodesStore

DELIVERY_TIMEOUT_SECONDS = DELIVERY_MS_MAX / 1_000

RETRY_AFTER_SECONDS = 1.0

log = structlog.get_logger()


class ValidationCodes:
    """Issues codes through one sender a channel, and checks guesses.

    `keys` are the signing keys by id, the signing one first; without any, no code is issued.
    """

    def __init__(
        self,
        store: ValidationCodesStore,
        keys: Mapping[str, bytes],
        senders: Mapping[Channel, Sender],
        clock: Clock,
    ) -> None:
        self._store = store
        self._keys = dict(keys)
        self._senders = dict(senders)
        self._clock = clock

    async def issue(self, purpose: Purpose, program: Program, channel: Channel | None) -> Issued:
        """Send the customer a code for a purpose, unless the one that was sent lately still holds.

        The challenge commits before the provider is called, and no transaction is open while it is. Raises
        CHANNEL_NOT_ENABLED, NO_DESTINATION, DELIVERY_FAILED and CODE_KEY_UNKNOWN.
        """
        route = self._route(program, channel)
        if not self._keys:
            raise _key_unknown()
        key_id, key = next(iter(self._keys.items()))
        code = new_code(program.validation)
        now_ms = self._clock()

        def make(challenge_id: str) -> Challenge:
            return Challenge(
                challenge_id=challenge_id,
                purpose=purpose,
                route=route,
                key_id=key_id,
                code_digest=code_digest(
                    key, code, key_id=key_id, challenge_id=challenge_id, purpose=purpose, route=route
                ),
                attempts=0,
                delivery=Delivery.PENDING,
                resend_at_ms=now_ms + COOLDOWN_MS,
                expires_at_ms=now_ms + program.validation.code_life_ms,
            )

        challenge, fresh = await self._store.claim(purpose, route, make, now_ms)
        if not fresh:
            if challenge.is_uncertain(now_ms):
                raise _delivery_failed((challenge.may_resend_at_ms - now_ms) / 1_000)
            return Issued(challenge, sent=False)
        text = message_text(program.validation, code, purpose.points, program.display_name)
        await self._deliver(challenge, Message(route.destination, text, challenge.challenge_id))
        return Issued(challenge, sent=True)

    async def check(self, purpose: Purpose, channel: Channel | None, challenge_id: str, code: str) -> bool:
        """Tell whether a code is the one for a purpose, without consuming it; no channel means whichever it went by.

        Raises CODE_KEY_UNKNOWN, which counts no attempt.
        """
        challenge = await self.guess(purpose, channel, challenge_id, code)
        if challenge is None:
            return False
        await self.give_back(challenge, challenge_id)
        return True

    async def guess(self, purpose: Purpose, channel: Channel | None, challenge_id: str, code: str) -> Challenge | None:
        """Compare a code, and return its challenge where it is right, whose attempt is then used or given back.

        The attempt commits before the comparison is answered. Raises CODE_KEY_UNKNOWN, which counts no attempt.
        """
        now_ms = self._clock()
        challenge = await self._store.count_attempt(purpose, challenge_id, tuple(self._keys), now_ms)
        if challenge is None:
            if await self._store.has_unknown_key(purpose, challenge_id, tuple(self._keys), now_ms):
                raise _key_unknown()
            return None
        guess = code_digest(
            self._keys[challenge.key_id],
            code,
            key_id=challenge.key_id,
            challenge_id=challenge.challenge_id,
            purpose=purpose,
            route=challenge.route,
        )
        same_channel = channel in {None, challenge.route.channel}
        return challenge if hmac.compare_digest(guess, challenge.code_digest) and same_channel else None

    async def give_back(self, challenge: Challenge, challenge_id: str) -> None:
        """Give the attempt of a right guess back: a caller that leaves now must not cost the customer one."""
        await asyncio.shield(self._store.return_attempt(challenge, challenge_id))

    async def consume(self, connection: Connection, challenge: Challenge, challenge_id: str) -> bool:
        """Use a code up in somebody's transaction; False where another call has, or where it ended meanwhile."""
        return await self._store.consume(connection, challenge, challenge_id, self._clock())

    def _route(self, program: Program, channel: Channel | None) -> Route:
        """Choose how the code goes out: the channel asked for, or the program's first one with a destination.

        Only a sender that needs no destination can serve a customer whom we know as a buyer alone.
        """
        enabled = program.validation.enabled_channels
        if channel is not None and channel not in enabled:
            raise PointbookError(
                Reason.CHANNEL_NOT_ENABLED,
                "The program does not send codes by this channel.",
                metadata={"validation_type": channel.value},
            )
        for candidate in enabled if channel is None else (channel,):
            sender = self._senders.get(candidate)
            if sender is not None and not sender.needs_destination:
                return Route(candidate)
        raise PointbookError(Reason.NO_DESTINATION, "There is nowhere to send a code to for this customer.")

    async def _deliver(self, challenge: Challenge, message: Message) -> None:
        """Send a message and keep what became of it. After a definite failure there is no cooldown."""
        sender = self._senders[challenge.route.channel]
        try:
            async with asyncio.timeout(DELIVERY_TIMEOUT_SECONDS):
                await sender.send(message)
        except DeliveryFailedError as error:
            log.warning("delivery failed", challenge_id=challenge.challenge_id, error=str(error))
            await self._store.record_delivery(challenge, Delivery.FAILED, self._clock())
            raise _delivery_failed(0) from error
        except Exception as error:
            # Nobody knows whether the message arrived, so it is never blindly sent again.
            log.warning("delivery uncertain", challenge_id=challenge.challenge_id, error=type(error).__name__)
            await self._store.record_delivery(challenge, Delivery.UNCERTAIN, challenge.resend_at_ms)
            raise _delivery_failed((challenge.resend_at_ms - self._clock()) / 1_000) from error
        await self._store.record_delivery(challenge, Delivery.SENT, challenge.resend_at_ms)


def _key_unknown() -> PointbookError:
    return PointbookError(
        Reason.CODE_KEY_UNKNOWN,
        "This server lacks the key of the code; see POINTBOOK_CODE_KEYS.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )


def _delivery_failed(retry_after_seconds: float) -> PointbookError:
    return PointbookError(
        Reason.DELIVERY_FAILED,
        "The code could not be delivered.",
        retry_after_seconds=max(retry_after_seconds, 0.0),
    )
