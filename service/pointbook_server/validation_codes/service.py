"""Issuing and checking one-time codes: transactions and providers in order."""

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
from pointbook_server.metrics import BatchMetrics, Metrics, Timer
from pointbook_server.programs.model import Channel
from pointbook_server.rpc.batching import Batcher
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.validation_codes.audit import HELD, SEEN, GuessOutcome
from pointbook_server.validation_codes.code_errors import delivery_failed, key_unknown
from pointbook_server.validation_codes.code_format import generate_code
from pointbook_server.validation_codes.commands import (
    Command,
    GuessCommand,
    GuessResult,
    IssueCommand,
    RecordDeliveryCommand,
    RecordRefusalCommand,
    ResetCommand,
)
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.locked_state import SendCounter
from pointbook_server.validation_codes.message_texts import message_text, message_title
from pointbook_server.validation_codes.model import (
    DELIVERY_TIMEOUT_MS,
    Challenge,
    ChallengeKind,
    ChallengeSubject,
    Delivery,
    IssuedChallenge,
    MissedCall,
    Route,
    ValidationEvent,
)
from pointbook_server.validation_codes.routing import choose_route, route_by
from pointbook_server.validation_codes.rules import is_valid_for, new_challenge
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions

DELIVERY_TIMEOUT_SECONDS = DELIVERY_TIMEOUT_MS / 1_000
COMMANDS_IN_BATCH_MAX = 100
COMMANDS_WAITING_MAX = 10_000
CONCURRENT_BATCHES_MAX = 4
"""The most merchants whose commands run at the same time; the commands of one merchant share transactions."""

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CodePolicy:
    """The server's limits for codes."""

    contact_pause_ms: int
    """The time for which a changed contact gets no codes."""
    merchant_sends_max: int
    """The most messages of a merchant in ten minutes."""


class ValidationCodes:
    """Issues codes through one sender for each channel, and checks guesses."""

    def __init__(
        self,
        transactions: ValidationCodeTransactions,
        keys: KeyRing,
        senders: Mapping[Channel, Sender],
        clock: Clock,
        *,
        metrics: Metrics,
        policy: CodePolicy,
    ) -> None:
        self._transactions = transactions
        self._keys = keys
        self._senders = dict(senders)
        self._needs_destination = {channel: sender.needs_destination for channel, sender in senders.items()}
        self._clock = clock
        self._metrics = metrics
        self._policy = policy
        self._issue_tasks: set[asyncio.Task[IssuedChallenge]] = set()
        self._batcher: Batcher[str, Command[Any], Any] = Batcher(
            self._run_batch,
            batch_max=COMMANDS_IN_BATCH_MAX,
            waiting_max=COMMANDS_WAITING_MAX,
            max_concurrent_batches=CONCURRENT_BATCHES_MAX,
            observer=BatchMetrics(metrics, "codes"),
        )

    async def issue(self, subject: ChallengeSubject, channel: Channel | None) -> IssuedChallenge:
        """Send a code, or open a challenge for a missed call.

        In its cooldown, the live challenge is returned unchanged. The challenge is committed before the provider is
        called, and no transaction is open during that call. Raises CHANNEL_NOT_ENABLED, NO_DESTINATION,
        CONTACT_CHANGED, SEND_LIMIT_REACHED, DELIVERY_FAILED and KEY_NOT_CONFIGURED.
        """
        # Delivery continues if the caller is cancelled, so that its outcome is recorded.
        task = asyncio.create_task(self._issue_and_count(subject, channel))
        self._issue_tasks.add(task)
        task.add_done_callback(self._consume_exception)
        return await asyncio.shield(task)

    async def check(
        self, subject: ChallengeSubject, channel: Channel | None, challenge_id: str, code: str
    ) -> Challenge | None:
        """Return the challenge of a right code, or None. Does not use the code.

        No channel matches every channel. A wrong guess is counted before this returns. Raises CODE_KEY_UNKNOWN, which
        counts nothing. Source: docs/reference/validation-codes.md#checking-a-code
        """
        purpose = subject.purpose

        def is_right(challenge: Challenge) -> bool:
            route = route_by(subject.customer, challenge.channel)
            digest = self._keys.code_digest(challenge.key_id, code, challenge.challenge_id, purpose, route)
            has_channel = channel in {None, challenge.channel}
            return hmac.compare_digest(digest, challenge.code_digest) and has_channel

        command = GuessCommand(purpose, challenge_id, self._keys, is_right, subject.actor)
        result = await self._submit(purpose.merchant_id, command)
        if result.outcome is GuessOutcome.KEY_UNKNOWN:
            raise key_unknown()
        return result.challenge if result.outcome is GuessOutcome.RIGHT else None

    async def find_confirmed_call(self, subject: ChallengeSubject, challenge_id: str) -> Challenge | None:
        """Return a challenge whose missed call is confirmed; None for another purpose."""
        purpose, now_ms = subject.purpose, self._clock()
        live = await self._transactions.read_live(purpose.merchant_id, purpose.customer, ChallengeKind.MISSED_CALL)
        if live is None or live.challenge_id != challenge_id or live.confirmed_at_ms is None:
            return None
        route = route_by(subject.customer, Channel.MISSED_CALL)
        return live if is_valid_for(live, purpose, route, self._keys, now_ms) else None

    async def confirm(self, call: MissedCall, actor: str) -> str:
        """Confirm the caller's newest live challenge, and return its id or "".

        Each call confirms at most one challenge.

        Source: docs/reference/validation-codes.md#missed-calls
        """
        digests = self._keys.destination_digests(call.merchant_id, call.caller_number)
        challenge_id = await self._transactions.confirm(call, digests, actor, self._clock())
        self._metrics.missed_calls.labels(SEEN if challenge_id else "NO_CHALLENGE").inc()
        return challenge_id

    async def reset(
        self, merchant_id: str, customer_ref: str, customer: Customer | None, actor: str, reason: str
    ) -> None:
        """Reset a customer's counters of guesses, missed calls and messages."""
        contacts = {route_by(customer, channel).bound_to for channel in Channel} - {""}
        sends = tuple(SendCounter.of(self._keys, merchant_id, contact) for contact in sorted(contacts))
        await self._submit(merchant_id, ResetCommand(customer_ref, sends, actor, reason))

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of some customers' events, the newest first.

        An empty challenge_id matches every challenge.
        """
        return await self._transactions.events(merchant_id, customers, challenge_id, query)

    async def drain(self) -> None:
        """Wait until no delivery and no transaction is running."""
        while self._issue_tasks:
            await asyncio.wait(self._issue_tasks)
        await self._batcher.drain()

    async def _issue_and_count(self, subject: ChallengeSubject, channel: Channel | None) -> IssuedChallenge:
        try:
            issued = await self._issue(subject, channel)
        except PointbookError as error:
            self._metrics.issues.labels("" if channel is None else channel.value, error.reason.value).inc()
            raise
        outcome = Delivery.SENT.value if issued.sent else HELD
        self._metrics.issues.labels(issued.route.channel.value, outcome).inc()
        return issued

    async def _issue(self, subject: ChallengeSubject, channel: Channel | None) -> IssuedChallenge:
        purpose, program, key_id = subject.purpose, subject.program, self._keys.signing_id
        try:
            route = choose_route(
                program,
                subject.customer,
                channel,
                self._needs_destination,
                points=purpose.points,
                pause_ms=self._policy.contact_pause_ms,
                now_ms=self._clock(),
            )
        except PointbookError as error:
            refusal = RecordRefusalCommand(purpose, error.reason.value, subject.actor)
            await self._submit(purpose.merchant_id, refusal)
            raise
        code = generate_code(program.validation)

        def make_challenge(challenge_id: str, now_ms: int) -> Challenge:
            return new_challenge(
                subject, route, self._keys, key_id=key_id, challenge_id=challenge_id, code=code, now_ms=now_ms
            )

        sends = SendCounter.of(self._keys, purpose.merchant_id, route.bound_to)
        merchant_max = self._policy.merchant_sends_max
        command = IssueCommand(purpose, route, self._keys, sends, make_challenge, merchant_max, subject.actor)
        challenge, must_send = await self._submit(purpose.merchant_id, command)
        if must_send:
            delivery = await self._deliver(subject, route, challenge.challenge_id, code)
            record = RecordDeliveryCommand(challenge, sends, delivery, subject.actor)
            await self._submit(purpose.merchant_id, record)
            _raise_if_undelivered(delivery, challenge, self._clock())
        return IssuedChallenge(challenge, route, sent=must_send)

    async def _deliver(self, subject: ChallengeSubject, route: Route, challenge_id: str, code: str) -> Delivery:
        """Send the message with a code, and return the outcome."""
        program, customer = subject.program, subject.customer
        language = "" if customer is None else customer.language
        text = message_text(program, language, code, subject.purpose.points)
        message = Message(
            route.destination, text, challenge_id, message_title(program), code, subject.purpose.merchant_id
        )
        try:
            with Timer(self._metrics.send_seconds.labels(route.channel.value)):
                async with asyncio.timeout(DELIVERY_TIMEOUT_SECONDS):
                    await self._senders[route.channel].send(message)
        except DeliveryFailedError as error:
            log.warning("delivery failed", challenge_id=challenge_id, error=str(error))
            return Delivery.FAILED
        except Exception as error:  # noqa: BLE001 - after any other error the message may have arrived
            log.warning("delivery uncertain", challenge_id=challenge_id, error=type(error).__name__)
            return Delivery.UNCERTAIN
        return Delivery.SENT

    async def _submit(self, merchant_id: str, command: Command[T]) -> T:
        """Run a command in a transaction shared with the merchant's other commands."""
        self._batcher.check_capacity(1)
        result: T = await self._batcher.run(merchant_id, command)
        return result

    async def _run_batch(self, merchant_id: str, commands: Sequence[Command[Any]]) -> list[Any]:
        results = await self._transactions.run(merchant_id, commands, self._clock())
        # Counted for the batch, because a guess counts even if its caller has been cancelled.
        for outcome in (result.outcome for result in results if isinstance(result, GuessResult)):
            self._metrics.guesses.labels(outcome.value).inc()
            if outcome in {GuessOutcome.RIGHT, GuessOutcome.WRONG}:
                self._metrics.comparisons.labels(outcome.value).inc()
        return results

    def _consume_exception(self, task: asyncio.Task[IssuedChallenge]) -> None:
        """Retrieve the exception so that asyncio does not log it as unhandled.

        The caller of the task may have been cancelled.
        """
        self._issue_tasks.discard(task)
        if not task.cancelled():
            task.exception()


def _raise_if_undelivered(delivery: Delivery, challenge: Challenge, now_ms: int) -> None:
    """Raise DELIVERY_FAILED if a message was not sent, or may not have been."""
    if delivery is Delivery.FAILED:
        raise delivery_failed(0)
    if delivery is Delivery.UNCERTAIN:
        raise delivery_failed((challenge.resend_at_ms - now_ms) / 1_000)
