"""Issuing and checking one-time codes: what happens between the database and the provider, and in which order."""

import asyncio
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from pointbook_server.clock import Clock
from pointbook_server.customers.model import Customer
from pointbook_server.delivery.sender import DeliveryFailedError, Message, Sender
from pointbook_server.errors import PointbookError
from pointbook_server.maintenance import merchant_by_merchant
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import Channel
from pointbook_server.rpc.batching import Batcher
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.validation_codes.commands import (
    Answer,
    Command,
    Deliver,
    Guess,
    Issue,
    Refuse,
    Reset,
    SendCounter,
    Verdict,
)
from pointbook_server.validation_codes.model import (
    DELIVERY_MS_MAX,
    Challenge,
    ChallengeSubject,
    Delivery,
    Family,
    Issued,
    KeyRing,
    MissedCall,
    Route,
    ValidationEvent,
    choose_route,
    delivery_failed,
    key_unknown,
    message_text,
    new_challenge,
    new_code,
    route_to,
)
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions

DELIVERY_TIMEOUT_SECONDS = DELIVERY_MS_MAX / 1_000
STEPS_IN_BATCH_MAX = 100
STEPS_WAITING_MAX = 10_000
LANES = 4
"""How many merchants' steps are done at a time; one merchant's share their transactions."""

DEFAULT_SUBJECT = "Your code"

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Rules:
    """How long a contact that has changed gets no codes, and how many a merchant sends in ten minutes at most."""

    pause_ms: int
    merchant_sends_max: int


class ValidationCodes:
    """Issues codes through one sender a channel, and checks guesses."""

    def __init__(
        self,
        store: ValidationCodeTransactions,
        keys: KeyRing,
        senders: Mapping[Channel, Sender],
        clock: Clock,
        *,
        metrics: Metrics,
        rules: Rules,
    ) -> None:
        self._store = store
        self._keys = keys
        self._senders = dict(senders)
        self._clock = clock
        self._metrics = metrics
        self._rules = rules
        self._issuing: set[asyncio.Task[Issued]] = set()
        self._batcher: Batcher[str, Command[Any], Any] = Batcher(
            self._run, batch_max=STEPS_IN_BATCH_MAX, waiting_max=STEPS_WAITING_MAX, max_concurrent_batches=LANES
        )

    async def issue(self, proving: ChallengeSubject, channel: Channel | None) -> Issued:
        """Send a code, unless the one that was sent lately still holds; or open a challenge for a missed call.

        The challenge commits before the provider is called, and no transaction is open while it is. Raises
        CHANNEL_NOT_ENABLED, NO_DESTINATION, CONTACT_CHANGED, SEND_LIMIT_REACHED, DELIVERY_FAILED, KEY_NOT_CONFIGURED.
        """
        # A message that is on its way goes on where the caller goes away, so that what became of it is known.
        issuing = asyncio.create_task(self._issue(proving, channel))
        self._issuing.add(issuing)
        issuing.add_done_callback(self._hear_out)
        try:
            issued = await asyncio.shield(issuing)
        except PointbookError as error:
            self._metrics.issues.labels("" if channel is None else channel.value, error.reason.value).inc()
            raise
        self._metrics.issues.labels(issued.route.channel.value, "SENT" if issued.sent else "HELD").inc()
        return issued

    async def check(
        self, proving: ChallengeSubject, channel: Channel | None, challenge_id: str, code: str
    ) -> Challenge | None:
        """Compare a code, and return its challenge where it is right, which is not used up by that.

        No channel means whichever the code went by. A wrong guess is counted before it is answered. Raises
        CODE_KEY_UNKNOWN, which counts nothing.
        """
        purpose = proving.purpose

        def is_right(challenge: Challenge) -> bool:
            route = route_to(proving.customer, challenge.channel)
            guess = self._keys.code_digest(challenge.key_id, code, challenge.challenge_id, purpose, route)
            same_channel = channel in {None, challenge.channel}
            return hmac.compare_digest(guess, challenge.code_digest) and same_channel

        answer = await self._do(purpose.merchant_id, Guess(purpose, challenge_id, self._keys, is_right, proving.actor))
        if answer.verdict is Verdict.KEY_UNKNOWN:
            raise key_unknown()
        return answer.challenge if answer.verdict is Verdict.RIGHT else None

    async def seen_call(self, proving: ChallengeSubject, challenge_id: str) -> Challenge | None:
        """Return a challenge whose missed call was seen; None where it was not, or is for something else."""
        purpose, now_ms = proving.purpose, self._clock()
        live = await self._store.live(purpose.merchant_id, purpose.customer, Family.MISSED_CALL)
        if live is None or live.challenge_id != challenge_id or live.confirmed_at_ms is None:
            return None
        route = route_to(proving.customer, Channel.MISSED_CALL)
        return live if live.is_for(purpose, route, self._keys, now_ms) else None

    async def confirm(self, call: MissedCall, actor: str) -> str:
        """Let a missed call meet the caller's newest live challenge, once per call; answers its id, or nothing."""
        digests = self._keys.destination_digests(call.merchant_id, call.caller_number)
        challenge_id = await self._store.confirm(call, digests, actor, self._clock())
        self._metrics.missed_calls.labels("SEEN" if challenge_id else "NO_CHALLENGE").inc()
        return challenge_id

    async def reset(self, merchant_id: str, name: str, customer: Customer | None, actor: str, reason: str) -> None:
        """Forget a customer's wrong guesses, and the messages to their contacts, so that codes work again."""
        contacts = {route_to(customer, channel).bound_to for channel in Channel} - {""}
        sends = tuple(SendCounter.to(self._keys, merchant_id, contact) for contact in sorted(contacts))
        await self._do(merchant_id, Reset(name, sends, actor, reason))

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of what happened to the codes under some names, the newest first."""
        return await self._store.events(merchant_id, customers, challenge_id, query)

    async def clean_up(self, now_ms: int) -> int:
        """Delete what is not needed any more by the database's time, and return how much that was."""
        store = self._store
        return await merchant_by_merchant(
            lambda: store.old_merchants(now_ms), lambda merchant_id: store.clean_up(merchant_id, now_ms)
        )

    async def drain(self) -> None:
        """Wait until nothing is being delivered or written any more."""
        while self._issuing:
            await asyncio.wait(self._issuing)
        await self._batcher.drain()

    async def _issue(self, proving: ChallengeSubject, channel: Channel | None) -> Issued:
        purpose, program, key_id = proving.purpose, proving.program, self._keys.signing_id
        try:
            route = self._route(proving, channel)
        except PointbookError as error:
            await self._do(purpose.merchant_id, Refuse(purpose, error.reason.value, proving.actor))
            raise
        code = new_code(program.validation)

        def make(challenge_id: str, now_ms: int) -> Challenge:
            return new_challenge(
                proving, route, self._keys, key_id=key_id, challenge_id=challenge_id, code=code, now_ms=now_ms
            )

        sends = SendCounter.to(self._keys, purpose.merchant_id, route.bound_to)
        step = Issue(purpose, route, self._keys, sends, make, self._rules.merchant_sends_max, proving.actor)
        claim = await self._do(purpose.merchant_id, step)
        if claim.is_fresh:
            delivery = await self._deliver(proving, route, claim.challenge, code)
            await self._do(purpose.merchant_id, Deliver(claim.challenge, sends, delivery, proving.actor))
            _check_delivered(delivery, claim.challenge, self._clock())
        return Issued(claim.challenge, route, sent=claim.is_fresh)

    def _route(self, proving: ChallengeSubject, channel: Channel | None) -> Route:
        return choose_route(
            proving.program,
            proving.customer,
            channel,
            {each: sender.needs_destination for each, sender in self._senders.items()},
            points=proving.purpose.points,
            pause_ms=self._rules.pause_ms,
            now_ms=self._clock(),
        )

    async def _deliver(self, proving: ChallengeSubject, route: Route, challenge: Challenge, code: str) -> Delivery:
        """Write the message and send it."""
        program, customer = proving.program, proving.customer
        language = "" if customer is None else customer.language
        text = message_text(program.validation, language, code, proving.purpose.points, program.display_name)
        subject = program.display_name or DEFAULT_SUBJECT
        message = Message(route.destination, text, challenge.challenge_id, subject)
        return await self._send(route.channel, message)

    async def _send(self, channel: Channel, message: Message) -> Delivery:
        """Call the provider, and tell what is known then."""
        try:
            async with asyncio.timeout(DELIVERY_TIMEOUT_SECONDS):
                await self._senders[channel].send(message)
        except DeliveryFailedError as error:
            log.warning("delivery failed", challenge_id=message.challenge_id, error=str(error))
            return Delivery.FAILED
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody knows whether the message arrived
            log.warning("delivery uncertain", challenge_id=message.challenge_id, error=type(error).__name__)
            return Delivery.UNCERTAIN
        return Delivery.SENT

    async def _do(self, merchant_id: str, step: Command[T]) -> T:
        """Let a step wait for its transaction, together with others of the merchant."""
        self._batcher.check_capacity(1)
        (waiting,) = self._batcher.submit(merchant_id, [step])
        answer: T | PointbookError = await waiting
        if isinstance(answer, PointbookError):
            raise answer
        return answer

    async def _run(self, merchant_id: str, steps: Sequence[Command[Any]]) -> list[Any]:
        answers = await self._store.run(merchant_id, steps, self._clock())
        # Here, since whoever guessed may not wait for an answer any more.
        for verdict in (answer.verdict.value for answer in answers if isinstance(answer, Answer)):
            self._metrics.guesses.labels(verdict).inc()
            if verdict in {Verdict.RIGHT, Verdict.WRONG}:
                self._metrics.comparisons.labels(verdict).inc()
        return answers

    def _hear_out(self, issuing: asyncio.Task[Issued]) -> None:
        """Hear an error, which nobody else does where the caller has gone away."""
        self._issuing.discard(issuing)
        if not issuing.cancelled():
            issuing.exception()


def _check_delivered(delivery: Delivery, challenge: Challenge, now_ms: int) -> None:
    """Raise DELIVERY_FAILED where a message did not go, or may not have."""
    if delivery is Delivery.FAILED:
        raise delivery_failed(0)
    if delivery is Delivery.UNCERTAIN:
        raise delivery_failed((challenge.resend_at_ms - now_ms) / 1_000)
