"""A redemption as it is kept: what it holds of which account, and what became of it."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption.allocation import Allocation
from pointbook_server.redemption.status_codes import STATUS_CODES


class RedemptionState(StrEnum):
    """Where a redemption stands."""

    PENDING = "PENDING"
    SETTLED = "SETTLED"
    REVERSED = "REVERSED"
    UNSETTLED = "UNSETTLED"


class HoldState(StrEnum):
    """Whether SHOPLINE has booked what a redemption holds of an account; a released hold may be booked yet."""

    OPEN = "OPEN"
    SETTLED = "SETTLED"
    RELEASED = "RELEASED"


class AccountHold(NamedTuple):
    """What a redemption holds of one account: what it drew, less what was reversed."""

    store_id: str
    buyer_id: str
    points: int
    state: HoldState

    @property
    def key(self) -> AccountKey:
        """The account."""
        return AccountKey(self.store_id, self.buyer_id)


@dataclass(frozen=True, slots=True)
class IdempotencyContent:
    """What makes two calls the same redemption: neither the code nor the notes."""

    redeemer: str
    program_id: int
    points: int
    group_redemption: bool
    group_id: str
    transaction_number: str


@dataclass(frozen=True, slots=True)
class Redemption:
    """Points redeemed once; `active_points` is what was left then."""

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
        """What was given back."""
        return sum(draw.reversed_points for draw in self.draws)

    def held(self, *states: HoldState) -> int:
        """Sum what is held in some states."""
        return sum(hold.points for hold in self.holds if hold.state in states)

    def state(self, now_ms: int) -> RedemptionState:
        """Tell where it stands at a moment: an open hold ends by itself. Source: redemption.md."""
        open_points = self.held(HoldState.OPEN)
        if open_points and now_ms < self.settle_by_ms:
            return RedemptionState.PENDING
        if self.reversed_points == self.content.points:
            return RedemptionState.REVERSED
        if open_points or self.held(HoldState.RELEASED):
            return RedemptionState.UNSETTLED
        return RedemptionState.SETTLED

    def settled(self, keys: Iterable[AccountKey]) -> "Redemption":
        """Tell it as SHOPLINE has booked what it holds of some accounts."""
        return self._with_state(keys, HoldState.SETTLED)

    def unsettled(self, keys: Iterable[AccountKey]) -> "Redemption":
        """Return a copy whose holds of some accounts are released again, since SHOPLINE has not booked them."""
        return self._with_state(keys, HoldState.RELEASED)

    def _with_state(self, keys: Iterable[AccountKey], state: HoldState) -> "Redemption":
        wanted = set(keys)
        return replace(
            self, holds=tuple(hold._replace(state=state) if hold.key in wanted else hold for hold in self.holds)
        )

    def released(self) -> "Redemption":
        """Tell it as SHOPLINE has not booked it in time."""
        return replace(
            self,
            holds=tuple(
                hold._replace(state=HoldState.RELEASED) if hold.state is HoldState.OPEN else hold for hold in self.holds
            ),
        )

    def give_back(self, points: int) -> "Redemption":
        """Give points back, 0 for all that is left: the last draws first, and none that SHOPLINE has booked.

        Raises ALREADY_REVERSED where fewer are left, and REDEMPTION_SETTLED where SHOPLINE has booked too many of them.
        """
        left = self.content.points - self.reversed_points
        reversible = self.held(HoldState.OPEN, HoldState.RELEASED)
        if not left or points > left:
            raise already_reversed(self)
        if not reversible or points > reversible:
            raise _refused(
                Reason.REDEMPTION_SETTLED,
                "SHOPLINE has booked it: reverse it there, and its webhook gives the points back.",
                self,
                reversible_points=reversible,
            )
        return self._given_back(points or reversible)

    def _given_back(self, points: int) -> "Redemption":
        states = {hold.key: hold.state for hold in self.holds}
        draws = []
        for draw in reversed(self.draws):
            may_return = 0 if states[draw.key] is HoldState.SETTLED else draw.points - draw.reversed_points
            returned = min(points, may_return)
            points -= returned
            draws.append(draw._replace(reversed_points=draw.reversed_points + returned))
        draws.reverse()
        left: dict[AccountKey, int] = dict.fromkeys(states, 0)
        for draw in draws:
            left[draw.key] += draw.points - draw.reversed_points
        return replace(
            self, draws=tuple(draws), holds=tuple(hold._replace(points=left[hold.key]) for hold in self.holds)
        )


@dataclass(frozen=True, slots=True)
class StoredReversal:
    """A reversal as it is stored: `points` is what it gave back."""

    redemption_id: str
    reference: str
    points: int
    notes: str
    created_at_ms: int
    actor: str


@dataclass(frozen=True, slots=True)
class RedemptionDetails:
    """A redemption with its newest reversals, and what its customer could redeem from now in the same way."""

    redemption: Redemption
    reversals: tuple[StoredReversal, ...]
    has_more_reversals: bool
    current_active_points: int


@dataclass(frozen=True, slots=True)
class Closing:
    """Holds of a redemption that an operator settled by hand, or that were released."""

    closing_id: str
    redemption_id: str
    at_ms: int
    action: str
    points: int
    reason: str
    actor: str


def new_redemption_id() -> str:
    """Make an id that no other server makes."""
    return f"r-{secrets.token_hex(12)}"


def redemption_not_found(redemption_id: str) -> PointbookError:
    """Tell that the merchant has no such redemption."""
    metadata = {"redemption_id": redemption_id} if redemption_id else {}
    return PointbookError(Reason.REDEMPTION_NOT_FOUND, "The merchant has no such redemption.", metadata=metadata)


def reference_reused(reference: str) -> PointbookError:
    """Tell that a reference belongs to a call with other content."""
    return PointbookError(
        Reason.REFERENCE_REUSED,
        "This external_reference_number belongs to a call with other content; give every one a number of its own.",
        metadata={"external_reference_number": reference},
    )


def already_reversed(redemption: Redemption) -> PointbookError:
    """Tell that fewer points are left than are to be reversed, or none to be settled."""
    left = redemption.content.points - redemption.reversed_points
    message = "No more than what is left of it can be reversed."
    return _refused(Reason.ALREADY_REVERSED, message, redemption, left_points=left)


def _refused(reason: Reason, message: str, redemption: Redemption, **values: int) -> PointbookError:
    metadata = {"redemption_id": redemption.redemption_id} | {name: str(value) for name, value in values.items()}
    if reason in STATUS_CODES:
        metadata["status_code"] = str(STATUS_CODES[reason])
    return PointbookError(reason, message, metadata=metadata)
