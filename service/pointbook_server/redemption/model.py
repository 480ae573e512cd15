"""The stored redemption: its draws, its holds, and its state."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.reasons import Reason
from pointbook_server.redemption.allocation import Allocation, points_by_account
from pointbook_server.redemption.status_codes import STATUS_CODES


class RedemptionState(StrEnum):
    """The state of a redemption.

    Source: docs/reference/redemption.md#states-of-a-redemption
    """

    PENDING = "PENDING"
    SETTLED = "SETTLED"
    REVERSED = "REVERSED"
    UNSETTLED = "UNSETTLED"


class HoldState(StrEnum):
    """The state of a redemption's hold; SHOPLINE may still book a released one."""

    OPEN = "OPEN"
    SETTLED = "SETTLED"
    RELEASED = "RELEASED"


class AccountHold(NamedTuple):
    """The points of an account that a redemption holds: drawn less reversed points."""

    store_id: str
    buyer_id: str
    points: int
    state: HoldState

    @property
    def key(self) -> AccountKey:
        """The account."""
        return AccountKey(self.store_id, self.buyer_id)


class IdempotencyContent(NamedTuple):
    """The content that a repeated call must share: all but the code and the notes.

    Source: docs/reference/redemption.md#idempotency
    """

    redeemer: str
    program_id: int
    points: int
    group_redemption: bool
    group_id: str
    transaction_number: str


class Redemption(NamedTuple):
    """A redemption; `active_points` were left after it."""

    merchant_id: str
    redemption_id: str
    reference: str
    content: IdempotencyContent
    notes: str
    redeem_value: str
    redeem_local_value: str
    points_currency_ratio: str
    active_points: int
    draws: tuple[Allocation, ...]
    holds: tuple[AccountHold, ...]
    created_at_ms: int
    settle_by_ms: int
    actor: str = ""
    """The id of the token that redeemed; empty without tokens."""

    @property
    def reversed_points(self) -> int:
        """The sum of all reversals."""
        return sum([draw.reversed_points for draw in self.draws])

    def held_points(self, *states: HoldState) -> int:
        """Return the sum of the holds in some states."""
        return sum([hold.points for hold in self.holds if hold.state in states])

    def state(self, now_ms: int) -> RedemptionState:
        """Return the state at a time; an open hold ends without a write."""
        open_points = self.held_points(HoldState.OPEN)
        if open_points and now_ms < self.settle_by_ms:
            return RedemptionState.PENDING
        if self.reversed_points == self.content.points:
            return RedemptionState.REVERSED
        if open_points or self.held_points(HoldState.RELEASED):
            return RedemptionState.UNSETTLED
        return RedemptionState.SETTLED

    def with_settled(self, keys: Iterable[AccountKey]) -> "Redemption":
        """Return a copy whose holds of some accounts are settled."""
        return self._with_state(HoldState.SETTLED, keys)

    def with_released(self, keys: Iterable[AccountKey]) -> "Redemption":
        """Return a copy whose holds of some accounts are released."""
        return self._with_state(HoldState.RELEASED, keys)

    def with_open_released(self) -> "Redemption":
        """Return a copy whose open holds are released."""
        return self.with_released(hold.key for hold in self.holds if hold.state is HoldState.OPEN)

    def _with_state(self, state: HoldState, keys: Iterable[AccountKey]) -> "Redemption":
        changed = set(keys)
        holds = tuple(hold._replace(state=state) if hold.key in changed else hold for hold in self.holds)
        return self._replace(holds=holds)

    def reverse(self, points: int) -> "Redemption":
        """Return a copy with more points reversed; 0 reverses all that are left.

        The last draws are reversed first. Raises ALREADY_REVERSED if fewer are left, and REDEMPTION_SETTLED if SHOPLINE
        has booked too many of them.
        Source: docs/reference/redemption.md#reversing
        """
        left = self.content.points - self.reversed_points
        reversible = self.held_points(HoldState.OPEN, HoldState.RELEASED)
        if not left or points > left:
            raise already_reversed(self)
        if not reversible or points > reversible:
            raise _refused(
                Reason.REDEMPTION_SETTLED,
                "SHOPLINE has booked the redemption: reverse it there, and its webhook returns the points.",
                self,
                reversible_points=reversible,
            )
        return self._reverse_draws(points or reversible)

    def _reverse_draws(self, points: int) -> "Redemption":
        states = {hold.key: hold.state for hold in self.holds}
        draws = []
        for draw in reversed(self.draws):
            reversible = 0 if states[draw.key] is HoldState.SETTLED else draw.points - draw.reversed_points
            reversed_points = min(points, reversible)
            points -= reversed_points
            draws.append(draw._replace(reversed_points=draw.reversed_points + reversed_points))
        draws.reverse()
        left = points_by_account(draws)
        return self._replace(
            draws=tuple(draws),
            holds=tuple(hold._replace(points=left.get(hold.key, 0)) for hold in self.holds),
        )


@dataclass(frozen=True, slots=True)
class StoredReversal:
    """A reversal as it is stored; `points` are the points reversed, never 0."""

    redemption_id: str
    reference: str
    points: int
    notes: str
    created_at_ms: int
    actor: str


@dataclass(frozen=True, slots=True)
class RedemptionDetails:
    """A redemption with its newest reversals.

    `current_active_points` are the points that its customer could redeem now in the same way.
    """

    redemption: Redemption
    reversals: tuple[StoredReversal, ...]
    has_more_reversals: bool
    current_active_points: int


@dataclass(frozen=True, slots=True)
class Closing:
    """An audit record of holds that were settled by hand, or released."""

    closing_id: str
    redemption_id: str
    at_ms: int
    action: str
    points: int
    reason: str
    actor: str


def new_redemption_id() -> str:
    """Return a new random id."""
    return f"r-{secrets.token_hex(12)}"


def redemption_not_found(redemption_id: str) -> PointbookError:
    """Return the error for a redemption that the merchant does not have."""
    metadata = {"redemption_id": redemption_id} if redemption_id else {}
    return PointbookError(Reason.REDEMPTION_NOT_FOUND, "The merchant has no such redemption.", metadata=metadata)


def reference_reused(reference: str) -> PointbookError:
    """Return the error for a reference that belongs to a call with other content."""
    return PointbookError(
        Reason.REFERENCE_REUSED,
        "This external_reference_number belongs to a call with other content; use a new one for each call.",
        metadata={"external_reference_number": reference},
    )


def already_reversed(redemption: Redemption) -> PointbookError:
    """Return the error for a redemption with too few points left."""
    left = redemption.content.points - redemption.reversed_points
    message = "The redemption has too few points that are not reversed yet."
    return _refused(Reason.ALREADY_REVERSED, message, redemption, left_points=left)


def _refused(reason: Reason, message: str, redemption: Redemption, **points: int) -> PointbookError:
    metadata = {"redemption_id": redemption.redemption_id} | {name: str(value) for name, value in points.items()}
    if reason in STATUS_CODES:
        metadata["status_code"] = str(STATUS_CODES[reason])
    return PointbookError(reason, message, metadata=metadata)
