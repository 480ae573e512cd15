"""The rows that a batch of commands has locked, and the changes to write."""

from dataclasses import dataclass, field
from typing import NamedTuple

from pointbook_server.validation_codes.audit import AuditRecord
from pointbook_server.validation_codes.code_errors import send_limit_reached
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.model import Challenge, ChallengeKind, ChallengeState
from pointbook_server.validation_codes.rate_limits import (
    MERCHANT_GRAIN_MS,
    MERCHANT_WINDOW_MS,
    SENDS_TO_DESTINATION,
    Limit,
    SlidingWindowCounter,
)

MERCHANT_SENDS = "sends"
"""The name of the counter of all messages of a merchant."""


@dataclass
class LockedState:
    """The locked challenges and counters of some commands, and their changes."""

    now_ms: int
    live: dict[tuple[str, ChallengeKind], Challenge]
    """By customer and kind."""
    counters: dict[str, SlidingWindowCounter]
    changed_challenges: dict[str, Challenge] = field(default_factory=dict)
    """By id, in their last state."""
    opened_ids: set[str] = field(default_factory=set)
    changed_counters: set[str] = field(default_factory=set)
    audit: list[AuditRecord] = field(default_factory=list)

    def open_challenge(self, challenge: Challenge) -> None:
        """Replace the customer's live challenge of its kind by a new one."""
        live = self.live.get((challenge.purpose.customer, challenge.kind))
        if live is not None:
            self.changed_challenges[live.challenge_id] = live._replace(state=ChallengeState.REPLACED)
        self.opened_ids.add(challenge.challenge_id)
        self.update_challenge(challenge)

    def update_challenge(self, challenge: Challenge) -> None:
        """Change the customer's live challenge of its kind."""
        self.changed_challenges[challenge.challenge_id] = challenge
        self.live[challenge.purpose.customer, challenge.kind] = challenge

    def update_counter(self, name: str, counter: SlidingWindowCounter) -> None:
        """Change a counter."""
        self.counters[name] = counter
        self.changed_counters.add(name)


class SendCounter(NamedTuple):
    """The counters of messages to a destination: one for its digest under each key."""

    names: tuple[str, ...]
    """The names of the counters, that of the signing key first."""

    @classmethod
    def of(cls, keys: KeyRing, merchant_id: str, destination: str) -> "SendCounter":
        """Return the counters of a destination.

        Without a destination, as for a console, only the merchant's messages count.
        """
        digests = keys.destination_digests(merchant_id, destination) if destination else []
        return cls(tuple(f"sends {digest.hex()}" for digest in digests))

    def check(self, state: LockedState, merchant_max: int) -> None:
        """Raise SEND_LIMIT_REACHED at the limit of the destination or of the merchant."""
        counts = sorted(count for name in self.names for count in state.counters[name].counts)
        for limit_name, counter, limits in (
            ("destination", SlidingWindowCounter(tuple(counts)), SENDS_TO_DESTINATION),
            ("merchant", state.counters[MERCHANT_SENDS], (Limit(merchant_max, MERCHANT_WINDOW_MS),)),
        ):
            wait_ms = counter.allowed_at_ms(limits, state.now_ms) - state.now_ms
            if wait_ms > 0:
                raise send_limit_reached(limit_name, wait_ms / 1_000)

    def add(self, state: LockedState) -> None:
        """Count one more message."""
        for name in self.names[:1]:
            state.update_counter(name, state.counters[name].add(state.now_ms))
        counter = state.counters[MERCHANT_SENDS].add(
            state.now_ms, window_ms=MERCHANT_WINDOW_MS, grain_ms=MERCHANT_GRAIN_MS
        )
        state.update_counter(MERCHANT_SENDS, counter)

    def remove(self, state: LockedState, sent_at_ms: int) -> None:
        """Remove a message that was not sent from the counts."""
        for name in self.names[:1]:
            state.update_counter(name, state.counters[name].remove(sent_at_ms))
        counter = state.counters[MERCHANT_SENDS].remove(sent_at_ms, grain_ms=MERCHANT_GRAIN_MS)
        state.update_counter(MERCHANT_SENDS, counter)
