"""The assessment of a redemption request by every rule, in a loaded context; pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple

from pointbook_server.customers.model import (
    Customer,
    CustomerKey,
    GroupKey,
    Identifier,
    UserGroup,
    buyer_ref,
    customer_ref,
)
from pointbook_server.customers.rules import normalize_identifier
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.programs.model import Channel, Program
from pointbook_server.reasons import Reason
from pointbook_server.redemption.allocation import SourceAccount
from pointbook_server.redemption.bookings import Booking, find_booking
from pointbook_server.redemption.caps import NO_USAGE, Usage, check_caps, has_caps
from pointbook_server.redemption.currency import to_points
from pointbook_server.redemption.rules import (
    Eligibility,
    check_amount,
    check_eligibility,
    check_missed_call,
    check_program,
)
from pointbook_server.redemption.violations import Violation

NO_ACCOUNT = Account()


@dataclass(frozen=True, slots=True)
class GroupRef:
    """The selectors of a user group, all of which must select the same group."""

    keys: tuple[tuple[GroupKey, str], ...] = ()
    primary: Identifier | None = None
    use_default: bool = False


class RedemptionRequest(NamedTuple):
    """The points, the program and the customer of a redemption to assess.

    `identifier` is the name of the identifier's field. `key` is None if a buyer's ids are malformed; other identifiers
    are as they were sent.
    """

    merchant_id: str
    identifier: str
    key: CustomerKey | None
    program_id: int
    points: int
    currency_value: Decimal | None = None
    group_redemption: bool = False
    group: GroupRef | None = None
    channel: Channel | None = None

    def normalised_key(self, program: Program | None) -> CustomerKey | None:
        """Return the key in its stored form; None if it is malformed.

        National phone numbers are read in the program's region.
        """
        if self.key is None or isinstance(self.key, AccountKey):
            return self.key
        value = normalize_identifier(self.key.kind, self.key.value, "" if program is None else program.default_region)
        return None if value is None else replace(self.key, value=value)


class RedemptionContext(NamedTuple):
    """The loaded data with which a request is assessed.

    `own` are the redeemer's own accounts in every store, `sources` those that may be drawn on, each once.
    `other_programs` are the merchant's other programs whose points may be redeemed. `is_own_store` is false if an
    unregistered buyer's store is not the merchant's, `selects_one_group` if the group's selectors disagree. `bookings`
    contains those that the redemption may claim. Contexts that were loaded together share their `accounts`.
    """

    now_ms: int
    program: Program | None
    key: CustomerKey | None
    customer: Customer | None
    own: Sequence[SourceAccount]
    sources: tuple[SourceAccount, ...]
    accounts: dict[AccountKey, Account]
    other_programs: tuple[Program, ...] = ()
    group: UserGroup | None = None
    selects_one_group: bool = True
    is_own_store: bool = True
    usage: Usage = NO_USAGE
    bookings: tuple[Booking, ...] = ()

    @property
    def has_redeemer(self) -> bool:
        """Whether there is a customer or a buyer who may redeem."""
        return self.customer is not None or (isinstance(self.key, AccountKey) and self.is_own_store)

    @property
    def redeemer(self) -> str:
        """The unique name of the customer or buyer who redeems; empty if there is none."""
        if self.customer is not None:
            return customer_ref(self.customer.customer_id)
        if isinstance(self.key, AccountKey) and self.is_own_store:
            return buyer_ref(self.key)
        return ""

    @property
    def redeemers(self) -> list[str]:
        """All names under which the redeemer has redeemed.

        A customer's buyers may have redeemed before they were registered.
        """
        if self.customer is None:
            return [self.redeemer] if self.redeemer else []
        return [self.redeemer, *map(buyer_ref, self.customer.buyers)]

    @property
    def account_keys(self) -> set[AccountKey]:
        """The accounts to load: those that may be drawn on, and all of the redeemer's own.

        Locking all of their own serializes a customer's redemptions even with those that began when a buyer was still
        unregistered.
        """
        return {source.key for source in (*self.sources, *self.own)}

    def without_booking(self, booking: Booking) -> "RedemptionContext":
        """Return the context before a booking: the points that it took are active."""
        return self._replace(accounts={**self.accounts, booking.account: booking.undo(self.accounts[booking.account])})

    def active_points(self, sources: Iterable[SourceAccount]) -> int:
        """Return the sum of the active points of some accounts."""
        found = [self.accounts[key] for key, _ in sources if key in self.accounts]
        return sum([account.points_at(self.now_ms).active for account in found])


def own_sources(key: CustomerKey | None, customer: Customer | None) -> list[SourceAccount]:
    """Return the redeemer's own accounts, in every store."""
    if customer is not None:
        return [SourceAccount(buyer, customer.customer_id) for buyer in customer.buyers]
    return [SourceAccount(key)] if isinstance(key, AccountKey) else []


def redeemable_sources(
    request: RedemptionRequest, programs: Sequence[Program], own: Sequence[SourceAccount], group: UserGroup | None
) -> tuple[SourceAccount, ...]:
    """Return the accounts that may be drawn on: the redeemer's own, or a group's.

    Only accounts in stores of the programs count; the first program is the requested one.
    """
    sources = own
    if programs and draws_on_group(request, programs[0]):
        members = group.members if group is not None else ()
        sources = [
            SourceAccount(key, member.customer_id)
            for member in members
            if not member.blocked and not member.fraud_blocked
            for key in member.buyers
        ]
    stores = programs[0].store_ids if len(programs) == 1 else {store for each in programs for store in each.store_ids}
    drawable = [source for source in sources if source.key.store_id in stores]
    return tuple(drawable if len(drawable) <= 1 else sorted(set(drawable)))


def draws_on_group(request: RedemptionRequest, program: Program) -> bool:
    """Return whether the request may draw on a group's points."""
    return request.group is not None and program.allow_group_redemption


class Assessment(NamedTuple):
    """The outcome of all rules for a request: its points, and every violation.

    If SHOPLINE has already booked the redemption as `booking`, `context` is that before the booking, but
    `active_points` are those after it.
    """

    context: RedemptionContext
    points: int
    active_points: int
    violations: tuple[Violation, ...]
    booking: Booking | None = None

    @property
    def active_points_left(self) -> int:
        """The active points after the redemption."""
        return self.active_points - (self.points if self.booking is None else 0)

    @property
    def programs_requiring_validation(self) -> list[Program]:
        """The programs that require validation.

        Only the requested program and those whose points may be drawn are considered.
        """
        context, program = self.context, self.context.program
        if program is None:
            return []
        if not context.other_programs:
            return [program] if program.validation.required else []
        foreign = [source for source in context.sources if source.key.store_id not in program.store_ids]
        stores = {source.key.store_id for source in foreign if context.active_points([source])}
        others = (other for other in context.other_programs if stores.intersection(other.store_ids))
        return [each for each in (program, *others) if each.validation.required]


def assess(request: RedemptionRequest, context: RedemptionContext) -> Assessment:
    """Apply every rule that the context allows to a request.

    Source: docs/reference/redemption.md#validating-a-redemption
    """
    program, points, booking = context.program, request.points, None
    active_points = redeemable_points = context.active_points(context.sources)
    if program is None:
        violations = [
            Violation.of(Reason.PROGRAM_NOT_FOUND, "The merchant has no such program.", program_id=request.program_id)
        ]
    else:
        points, violations = _check_program_rules(request, context, program)
        if context.bookings:
            accounts = {source.key: context.accounts.get(source.key, NO_ACCOUNT) for source in context.sources}
            booking = find_booking(points, program, accounts, context.bookings, context.now_ms)
        if booking is not None:
            context = context.without_booking(booking)
            redeemable_points = context.active_points(context.sources)
    violations += _check_customer(request, context)
    if program is not None and context.has_redeemer:
        group_violations = list(_check_group(context)) if draws_on_group(request, program) else []
        violations += group_violations
        if not group_violations:
            violations += check_eligibility(points, program, _eligibility(context, program, redeemable_points))
    if program is not None and has_caps(program):
        violations += check_caps(points, program, context.usage)
    return Assessment(context, points, active_points, tuple(violations), booking)


def requested_points(request: RedemptionRequest, program: Program) -> int | Violation:
    """Return the requested points; a violation if they are not a whole number."""
    return request.points if request.currency_value is None else to_points(request.currency_value, program)


def _check_program_rules(
    request: RedemptionRequest, context: RedemptionContext, program: Program
) -> tuple[int, list[Violation]]:
    """Return the requested points, and the violations for every customer."""
    violations = [*_check_features(request, context, program), *check_program(program)]
    points = requested_points(request, program)
    if isinstance(points, Violation):
        return 0, [*violations, points]
    violations += check_amount(points, program)
    if request.channel is Channel.MISSED_CALL:
        violations += check_missed_call(points, program)
    return points, violations


def _check_features(request: RedemptionRequest, context: RedemptionContext, program: Program) -> Iterator[Violation]:
    """Check that the program allows what the request uses.

    Source: docs/reference/redemption.md#cross-program-redemption
    """
    if request.group_redemption and not program.allow_cross_program_redemption:
        yield Violation.of(
            Reason.CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED, "The program does not accept points of other programs."
        )
    if request.group is not None and not program.allow_group_redemption:
        yield Violation.of(Reason.GROUP_REDEMPTION_NOT_ALLOWED, "The program does not allow groups to pool points.")
    for other in context.other_programs:
        if (other.point_value, other.currency_code) != (program.point_value, program.currency_code):
            yield Violation.of(
                Reason.CROSS_PROGRAM_MISCONFIGURED,
                "Another program that allows its points to be redeemed gives them another value or currency.",
                program_id=other.program_id,
            )


def _check_customer(request: RedemptionRequest, context: RedemptionContext) -> list[Violation]:
    """Check that there is a customer or a buyer who may redeem."""
    if context.key is None:
        return [
            Violation.of(Reason.IDENTIFIER_INVALID, "The identifier has no valid form.", identifier=request.identifier)
        ]
    if not context.has_redeemer:
        return [
            Violation.of(Reason.CUSTOMER_NOT_FOUND, "No customer has this identifier.", identifier=request.identifier)
        ]
    if context.customer is not None and context.customer.fraud_blocked:
        return [Violation.of(Reason.CUSTOMER_BLOCKED, "The customer is blocked.")]
    return []


def _check_group(context: RedemptionContext) -> Iterator[Violation]:
    """Check that the group exists, and that the customer may redeem from its pool."""
    if context.group is None:
        yield Violation.of(Reason.GROUP_NOT_FOUND, "The merchant has no such user group.")
        return
    customer_id = context.customer.customer_id if context.customer is not None else None
    redeeming = {member.customer_id for member in context.group.members if member.can_redeem and not member.blocked}
    if customer_id not in redeeming:
        yield Violation.of(Reason.NOT_A_GROUP_MEMBER, "The customer is not a member who may redeem from this group.")


def _eligibility(context: RedemptionContext, program: Program, active_points: int) -> Eligibility:
    own = [source for source in context.own if source.key.store_id in program.store_ids]
    accounts = [context.accounts[key] for key, _ in own if key in context.accounts]
    return Eligibility(
        active_points=active_points,
        own_active_points=active_points if context.sources == tuple(own) else context.active_points(own),
        lifetime_points=sum([account.lifetime_points for account in accounts]),
    )
