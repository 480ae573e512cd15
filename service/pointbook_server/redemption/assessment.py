"""Who asks to redeem what, and what the rules say to it: pure, on facts that were read before."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

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
from pointbook_server.errors import Reason
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.programs.model import Channel, Program
from pointbook_server.redemption.allocation import Source
from pointbook_server.redemption.bookings import Booking, booking_of
from pointbook_server.redemption.rules import (
    Eligibility,
    Usage,
    Violation,
    check_amount,
    check_caps,
    check_missed_call,
    check_program,
    check_standing,
    finding,
    points_of,
)

NO_ACCOUNT = Account()


@dataclass(frozen=True, slots=True)
class GroupRef:
    """By what a user group is chosen: every selector that is given must choose the same one."""

    keys: tuple[tuple[GroupKey, str], ...] = ()
    primary: Identifier | None = None
    use_default: bool = False


@dataclass(frozen=True, slots=True)
class RedemptionRequest:
    """Who wants to redeem what, where. `key` is None when a buyer's ids have no valid form; others are as they came."""

    merchant_id: str
    identifier: str
    key: CustomerKey | None
    program_id: int
    points: int
    currency_value: Decimal | None
    group_redemption: bool
    group: GroupRef | None
    channel: Channel | None

    def key_in(self, program: Program | None) -> CustomerKey | None:
        """Write the identifier as it is kept, by the program's region; None where it has no valid form."""
        if self.key is None or isinstance(self.key, AccountKey):
            return self.key
        value = normalize_identifier(self.key.kind, self.key.value, "" if program is None else program.default_region)
        return None if value is None else replace(self.key, value=value)


@dataclass(frozen=True, slots=True)
class RedemptionContext:
    """What there is to an ask. `others` are the merchant's other programs that allow their points to be redeemed.

    `is_shop` tells whether the store of a buyer whom nobody registered is the merchant's, `one_group` whether all
    selectors choose the same group, and `sources` the accounts that may be drawn on, each once. `bookings` are the
    decreases that the redemption may claim, among others.
    """

    now_ms: int
    program: Program | None
    others: tuple[Program, ...]
    key: CustomerKey | None
    customer: Customer | None
    is_shop: bool
    group: UserGroup | None
    one_group: bool
    sources: tuple[Source, ...]
    accounts: Mapping[AccountKey, Account]
    usage: Usage
    bookings: tuple[Booking, ...] = ()

    @property
    def redeemer(self) -> str:
        """Name who redeems: ids have no spaces, so that no two have one name. Empty where nobody is known."""
        if self.customer is not None:
            return customer_ref(self.customer.customer_id)
        if isinstance(self.key, AccountKey) and self.is_shop:
            return buyer_ref(self.key)
        return ""

    @property
    def redeemers(self) -> list[str]:
        """Name all under whom the same person has redeemed: a registered buyer's earlier redemptions are theirs."""
        if self.customer is None:
            return [self.redeemer] if self.redeemer else []
        return [self.redeemer, *map(buyer_ref, self.customer.buyers)]

    @property
    def account_keys(self) -> set[AccountKey]:
        """Name the accounts that count: those of the pool, and the redeemer's own.

        All of their own, since a redemption that is still running may be of a buyer who was nobody's when it began.
        """
        return {source.key for source in (*self.sources, *own_sources(self.key, self.customer))}

    def before(self, booking: Booking) -> "RedemptionContext":
        """Return the facts as they would be without a booking: what it took is active."""
        return replace(
            self, accounts={**self.accounts, booking.account: booking.before(self.accounts[booking.account])}
        )

    def active_points(self, sources: Iterable[Source]) -> int:
        """Sum what some accounts have active."""
        return sum(self.accounts.get(source.key, NO_ACCOUNT).points_at(self.now_ms).active for source in sources)


def own_sources(key: CustomerKey | None, customer: Customer | None) -> list[Source]:
    """Tell the redeemer's own accounts, wherever they are."""
    if customer is not None:
        return [Source(buyer, customer.customer_id) for buyer in customer.buyers]
    return [Source(key)] if isinstance(key, AccountKey) else []


def sources_of(
    ask: RedemptionRequest, programs: Sequence[Program], own: Sequence[Source], group: UserGroup | None
) -> tuple[Source, ...]:
    """Tell the accounts that may be drawn on: the redeemer's own, or those of a group's members.

    The first of the programs is the one that the ask names; all of them lend their stores.
    """
    sources = own
    if programs and pools(ask, programs[0]):
        members = group.members if group is not None else ()
        sources = [
            Source(key, member.customer_id)
            for member in members
            if not member.blocked and not member.fraud_blocked
            for key in member.buyers
        ]
    stores = {store_id for program in programs for store_id in program.store_ids}
    return tuple(sorted({source for source in sources if source.key.store_id in stores}))


def pools(ask: RedemptionRequest, program: Program) -> bool:
    """Tell whether a group's points are asked for, and may be."""
    return ask.group is not None and program.allow_group_redemption


@dataclass(frozen=True, slots=True)
class Assessment:
    """The outcome of the rules for an ask: how many points it is for, and every violation, with the facts behind it.

    Where SHOPLINE has already booked the redemption as `booking`, the facts are those of before the booking;
    `active_points` are the points that are active now.
    """

    facts: RedemptionContext
    points: int
    active_points: int
    violations: tuple[Violation, ...]
    booking: Booking | None = None

    @property
    def active_points_left(self) -> int:
        """What is active after the redemption."""
        return self.active_points - (self.points if self.booking is None else 0)

    @property
    def demanding(self) -> list[Program]:
        """The programs that want the customer to be validated: the named one, and others whose points may be drawn."""
        facts, program = self.facts, self.facts.program
        if program is None:
            return []
        foreign = [source for source in facts.sources if source.key.store_id not in program.store_ids]
        drawn = {source.key.store_id for source in foreign if facts.active_points([source])}
        others = (other for other in facts.others if drawn.intersection(other.store_ids))
        return [each for each in (program, *others) if each.validation.required]


def assess(ask: RedemptionRequest, facts: RedemptionContext) -> Assessment:
    """Check an ask against all that there is to it; every check runs that can."""
    points, violations, booking = ask.points, [], None
    active_points = redeemable_points = facts.active_points(facts.sources)
    if facts.program is None:
        violations.append(
            finding(Reason.PROGRAM_NOT_FOUND, "The merchant has no such program.", program_id=ask.program_id)
        )
    else:
        points, violations = _check_rules(ask, facts, facts.program)
        accounts = {source.key: facts.accounts.get(source.key, NO_ACCOUNT) for source in facts.sources}
        booking = booking_of(points, facts.program, accounts, facts.bookings, facts.now_ms)
        if booking is not None:
            facts = facts.before(booking)
            redeemable_points = facts.active_points(facts.sources)
    violations += _check_customer(ask, facts)
    if facts.program is not None and facts.redeemer:
        outsider = list(_check_group(facts)) if pools(ask, facts.program) else []
        violations += outsider
        if not outsider:
            violations += check_standing(points, facts.program, _standing(facts, facts.program, redeemable_points))
    if facts.program is not None:
        violations += check_caps(points, facts.program, facts.usage)
    return Assessment(facts, points, active_points, tuple(violations), booking)


def requested_points(ask: RedemptionRequest, program: Program) -> int | Violation:
    """Return how many points an ask is for, or that its currency value is no whole number of them."""
    return ask.points if ask.currency_value is None else points_of(ask.currency_value, program)


def _check_rules(ask: RedemptionRequest, facts: RedemptionContext, program: Program) -> tuple[int, list[Violation]]:
    """Tell how many points are asked for, and what the program has against them, whoever the customer is."""
    violations = [*_check_features(ask, facts, program), *check_program(program)]
    points = requested_points(ask, program)
    if isinstance(points, Violation):
        return 0, [*violations, points]
    violations += check_amount(points, program)
    if ask.channel is Channel.MISSED_CALL:
        violations += check_missed_call(points, program)
    return points, violations


def _check_features(ask: RedemptionRequest, facts: RedemptionContext, program: Program) -> Iterator[Violation]:
    """Find what the program does not allow."""
    if ask.group_redemption and not program.allow_cross_program_redemption:
        yield finding(
            Reason.CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED, "The program does not take points of other programs."
        )
    if ask.group is not None and not program.allow_group_redemption:
        yield finding(Reason.GROUP_REDEMPTION_NOT_ALLOWED, "The program does not let groups pool points.")
    worth = (program.point_value, program.currency_code)
    for other in facts.others:
        if (other.point_value, other.currency_code) != worth:
            yield finding(
                Reason.CROSS_PROGRAM_MISCONFIGURED,
                "Another program that allows its points to be redeemed gives them another value or currency.",
                program_id=other.program_id,
            )


def _check_customer(ask: RedemptionRequest, facts: RedemptionContext) -> list[Violation]:
    """Find out that nobody is known who could redeem, or that they must not."""
    if facts.key is None:
        return [finding(Reason.IDENTIFIER_INVALID, "The identifier has no valid form.", identifier=ask.identifier)]
    if not facts.redeemer:
        return [finding(Reason.CUSTOMER_NOT_FOUND, "Nobody has this identifier.", identifier=ask.identifier)]
    if facts.customer is not None and facts.customer.fraud_blocked:
        return [finding(Reason.CUSTOMER_BLOCKED, "The customer is blocked.")]
    return []


def _check_group(facts: RedemptionContext) -> Iterator[Violation]:
    """Find out that there is no such group, or that the customer may not redeem from its pool."""
    if facts.group is None:
        yield finding(Reason.GROUP_NOT_FOUND, "There is no such user group.")
        return
    customer_id = facts.customer.customer_id if facts.customer is not None else None
    may_redeem = {member.customer_id for member in facts.group.members if member.can_redeem and not member.blocked}
    if customer_id not in may_redeem:
        yield finding(Reason.NOT_A_GROUP_MEMBER, "The customer is no member who may redeem from this group.")


def _standing(facts: RedemptionContext, program: Program, active_points: int) -> Eligibility:
    own = [source for source in own_sources(facts.key, facts.customer) if source.key.store_id in program.store_ids]
    return Eligibility(
        active_points=active_points,
        own_active_points=active_points if facts.sources == tuple(own) else facts.active_points(own),
        lifetime_points=sum(facts.accounts.get(source.key, NO_ACCOUNT).lifetime_points for source in own),
    )
